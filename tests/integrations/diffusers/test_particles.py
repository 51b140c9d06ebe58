"""Feynman-Kac steering: particles resampled by the scores of their previews."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers_matrix import difference
from stub_scorer import formula_scorer
from tiny_pipelines import build

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.integrations.diffusers.strategies import log_potential, resampled

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def run(tiny, **options):
    arguments = tiny.arguments | {"output_type": "np"}
    best = BestOfN(tiny.pipe, formula_scorer(), batch_size=4)
    return best.particles(arguments.pop("prompt"), **{"n": 6, "resample_at": (0.2, 0.5)} | options, **arguments)


def plain(tiny, **options):
    arguments = tiny.arguments | {"output_type": "np"}
    return BestOfN(tiny.pipe, formula_scorer(), batch_size=4)(
        arguments.pop("prompt"), n=6, keep=6, **options, **arguments
    )


@pytest.mark.parametrize(
    ("family", "scheduler", "settings"),
    [
        ("sd", "EulerAncestralDiscreteScheduler", {}),
        ("sdxl", "DDPMScheduler", {}),
        ("flux", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("wan22", "FlowMatchLCMScheduler", {}),
    ],
)
def test_particles_that_are_not_resampled_are_the_pictures_of_their_seeds(family, scheduler, settings):
    """With a strength of nothing every particle lives on once: several stops on the way change no picture."""
    tiny = build(family, scheduler, **settings)
    out, whole = run(tiny, strength=0.0, keep=6), plain(tiny)
    assert [record.seed for record in out.records] == [0, 1, 2, 3, 4, 5]
    assert out.denoiser_rows == whole.denoiser_rows
    for record, same in zip(out.records, whole.records, strict=True):
        assert difference(record.picture, same.picture) <= 1e-5


def test_good_particles_live_on_in_copies_that_differ():
    tiny = build("sd", "EulerAncestralDiscreteScheduler")
    out = run(tiny, strength=10.0, keep=3)
    assert out.strategy == "particles"
    assert out.denoiser_rows == plain(tiny).denoiser_rows
    finished = [record for record in out.records if record.survived]
    assert len(finished) == 6
    copies = [record for record in finished if record.parent is not None]
    assert copies
    assert len({record.seed for record in out.records}) == len(out.records)
    pictures = [record.picture for record in finished]
    assert min(difference(a, b) for i, a in enumerate(pictures) for b in pictures[:i]) > 1e-4
    dropped = [record for record in out.records if not record.survived]
    assert dropped
    first = [record for record in out.records if record.round == 0]
    worst = min(first, key=lambda record: record.preview_score)
    assert not worst.survived
    assert out.scores == sorted(out.scores, reverse=True)
    again = run(tiny, strength=10.0, keep=3)
    assert (again.seeds, again.scores) == (out.seeds, out.scores)
    with pytest.raises(ValueError, match="made by its run only"):
        BestOfN(tiny.pipe, formula_scorer()).remake(copies[0], **tiny.arguments)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(UnsupportedError, match="the scheduler draws no noise"):
        run(build("sd"))
    with pytest.raises(UnsupportedError, match="IPNDMScheduler"):
        run(build("sd", "IPNDMScheduler"))
    tiny = build("sd", "EulerAncestralDiscreteScheduler")
    for match, options in [
        ("potential to be", {"potential": "mean"}),
        ("ascending ratios", {"resample_at": (0.5, 0.2)}),
        ("ascending ratios", {"resample_at": ()}),
        ("keep from 1 to n=6", {"keep": 7}),
        ("leave a step to run", {"resample_at": (0.2, 0.99)}),
    ]:
        with pytest.raises(ValueError, match=match):
            run(tiny, **options)


def test_systematic_resampling_is_in_proportion():
    logs = [math.log(0.5), math.log(0.25), math.log(0.25), -math.inf]
    counts = Counter()
    for seed in range(400):
        drawn = resampled(logs, seed)
        assert len(drawn) == 4
        assert Counter(drawn)[0] == 2  # never off by one or more
        counts.update(drawn)
    assert counts[3] == 0
    assert counts[1] / 1600 == pytest.approx(0.25, abs=0.01)
    assert sorted(resampled([0.0] * 5, 3)) == [0, 1, 2, 3, 4]


def test_potentials():
    seen = [2.0, 3.5, 3.0]
    assert [log_potential(seen, kind) for kind in ("max", "difference", "sum")] == [3.5, -0.5, 8.5]
    assert log_potential([2.0], "difference") == 2.0
    assert log_potential([math.nan, 3.0], "max") == 3.0
    assert log_potential([3.0, math.nan], "max") == -math.inf
    assert np.isfinite(log_potential([math.nan, 3.0], "difference"))
