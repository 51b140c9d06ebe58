"""Several scorers together, and zero-order search round the best noise."""

import math

import numpy as np
import pytest
import torch
from diffusers_matrix import difference
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import FAMILIES, build

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.integrations.diffusers.strategies import neighbour

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

#: Pipelines that add noise to an input picture; the others take it as ``latents``.
ADDED = ["img2img", "sdxl_img2img", "sdxl_inpaint", "controlnet_img2img", "sdxl_controlnet_img2img", "flux_img2img",
         "flux_fill"]  # fmt: skip


def green(pictures, prompt):
    """Another scorer: mean green in [0, 1]."""
    assert prompt == "a lighthouse"
    return [np.asarray(picture)[..., 1].mean() / 255 for picture in pictures]


def test_other_scorers_take_part_in_every_choice(sd):
    quality = BestOfN(sd.pipe, formula_scorer())(n=5, keep=5, **sd.arguments)
    both = BestOfN(sd.pipe, formula_scorer(), also={"green": (green, -40.0)})(n=5, keep=5, **sd.arguments)
    for record, same in zip(both.records, quality.records, strict=True):
        assert record.score == same.score
        assert record.extras == {"green": pytest.approx(green([record.picture], "a lighthouse")[0])}
        assert record.value == pytest.approx(record.score - 40 * record.extras["green"])
    values = [both.records[place.index].value for place in both.ranking]
    assert values == sorted(values, reverse=True)
    heavy = [BestOfN(sd.pipe, formula_scorer(), also={"green": (green, w)}) for w in (1e6, -1e6)]
    up, down = (best(n=5, keep=5, **sd.arguments).seeds for best in heavy)
    assert up == down[::-1]
    assert 0.5 <= both.win_probability <= 1

    pruned = BestOfN(sd.pipe, formula_scorer(), also={"green": (green, -40.0)})
    out = pruned(n=5, preview_at_ratio=0.5, survivors=2, **sd.arguments)
    best = sorted(out.records, key=lambda r: -r.preview_value)[:2]
    assert all(record.survived for record in best)
    assert best[0].preview_extras["green"] > 0


def test_other_scorers_that_cannot_be_used(sd):
    with pytest.raises(TypeError, match="a pair of a function and a weight"):
        BestOfN(sd.pipe, formula_scorer(), also={"green": green})
    with pytest.raises(ValueError, match="Expected 2 numbers from short"):
        BestOfN(sd.pipe, formula_scorer(), also={"short": (lambda pictures, prompt: [1.0], 1.0)})(n=2, **sd.arguments)


def test_pictures_without_a_score_stay_last_whatever_others_say(sd, monkeypatch):
    def blank_the_first(image, device, dtype):
        return image, [True] + [False] * (len(image) - 1)

    monkeypatch.setattr(sd.pipe, "run_safety_checker", blank_the_first)
    out = BestOfN(sd.pipe, formula_scorer(), also={"one": (lambda p, _: [1.0] * len(p), 9.0)})(
        n=3, keep=3, **sd.arguments
    )
    assert out.seeds[-1] == 0
    assert [place.rank for place in out.ranking][-1] is None
    assert math.isnan(out.scores[-1])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"flux2", "flux2_klein"}))
def test_a_search_starts_from_the_noise_it_chose(family):
    """Whatever the pipe calls it: noise passed as latents, or put in the place of what is added to an input picture."""
    tiny = build(family)
    arguments = tiny.arguments | {"output_type": "np"}
    best = BestOfN(tiny.pipe, formula_scorer())
    out = best.search(arguments.pop("prompt"), budget=20 * 4, n=2, neighbours=2, **arguments)
    assert [record.parent is None for record in out.records[:4]] == [True, True, False, False]
    assert out.interrupted is None
    assert all(record.noise_added is (family in ADDED) for record in out.records)
    start = out.records[out.records[2].parent]
    assert difference(out.records[2].picture, start.picture) > 1e-3
    for record in (start, out.records[2]):
        again = best.remake(record, **tiny.arguments | {"output_type": "np"})
        assert difference(again, record.picture) <= 1e-5
    if family not in ADDED and not hasattr(tiny.pipe, "blocks"):
        generator = torch.Generator().manual_seed(out.records[2].seed)
        again = tiny.pipe(**tiny.arguments | {"output_type": "np"}, latents=out.records[2].noise, generator=generator)
        again = again.frames[0] if hasattr(again, "frames") else again.images[0]
        assert difference(again, out.records[2].picture) <= 1e-5


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "EulerDiscreteScheduler"])
def test_candidates_of_a_search_are_made_again_as_documented(scheduler):
    """Also where the scheduler draws noise, from the generator that drew a first candidate's latents before."""
    tiny = build("sd", scheduler)
    arguments = tiny.arguments | {"output_type": "np"}
    out = BestOfN(tiny.pipe, formula_scorer()).search(budget=12 * 4, n=2, neighbours=2, **arguments)
    assert len(out.records) == 4
    for place, record in enumerate(out.records):
        noise = {} if place < 2 else {"latents": record.noise}
        again = tiny.pipe(**arguments, **noise, generator=torch.Generator().manual_seed(record.seed)).images[0]
        assert difference(again, record.picture) <= 1e-5


def test_search_keeps_to_its_budget_and_climbs(sd):
    best = BestOfN(sd.pipe, formula_scorer())
    per_candidate = 2 * 6
    out = best.search(budget=15 * per_candidate, n=3, neighbours=4, step=0.1, keep=2, **sd.arguments)
    assert out.denoiser_rows == (3 + 4 + 4 + 4) * per_candidate
    assert out.strategy == "search"
    assert len(out.records) == 15
    starts = max(record.score for record in out.records[:3])
    assert out.scores[0] >= starts
    assert len(out.images) == 2
    assert len(best.search(budget=14 * per_candidate, n=3, neighbours=4, **sd.arguments).records) == 11


def test_a_search_that_stalls_starts_anew_and_its_trace_can_be_drawn(sd, tmp_path):
    pytest.importorskip("matplotlib")
    best = BestOfN(sd.pipe, Flat())
    out = best.search(budget=2 * 6 * 11, n=2, neighbours=3, patience=2, **sd.arguments)
    assert [record.round for record in out.records] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [record.parent for record in out.records] == [None, None, *[0] * 6, None, None]
    assert [rows for rows, _ in out.trace] == [24, 60, 96, 120]
    out.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="the output of a search"):
        best(n=1, **sd.arguments).plot()


class Flat:
    """A scorer to which all pictures are alike."""

    backend = None

    def score(self, images):
        grey = Image.new("RGB", (32, 32), "grey")
        return formula_scorer().score([grey] * len(images))


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_the_direction_is_not_the_noise_that_the_sampler_draws(step):
    """Both follow from one seed, and must not be one another's copies."""
    tiny = build("sd", "EulerAncestralDiscreteScheduler")
    out = BestOfN(tiny.pipe, formula_scorer(), batch_size=1).search(
        budget=12 * 6, n=2, neighbours=4, step=step, **tiny.arguments
    )
    for record in out.records[2:]:
        drawn = torch.randn(record.noise.shape, generator=torch.Generator().manual_seed(record.seed))
        start = out.records[record.parent].noise
        direction = (record.noise - (1 - step**2) ** 0.5 * start) / step
        correlation = float(torch.corrcoef(torch.stack([direction.flatten(), drawn.flatten()]))[0, 1])
        assert abs(correlation) < 0.15


def test_lists_of_prompts_are_searched_one_by_one(sd):
    best = BestOfN(sd.pipe, formula_scorer())
    common = {name: value for name, value in sd.arguments.items() if name != "prompt"}
    outputs = best.search(["a", "b"], budget=60, n=2, neighbours=2, **common)
    alone = best.search("b", budget=60, n=2, neighbours=2, **common)
    assert outputs[1].scores == alone.scores
    assert [out.denoiser_rows for out in outputs] == [48, 48]


def test_neighbours_keep_the_variance_and_the_direction():
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    near, far = neighbour(noise, 1, 0.2), neighbour(noise, 1, 1.0)
    for other in (near, far):
        assert float(other.std()) == pytest.approx(1, abs=0.03)
    correlation = [float(torch.corrcoef(torch.stack([noise.flatten(), o.flatten()]))[0, 1]) for o in (near, far)]
    assert correlation[0] == pytest.approx(math.sqrt(1 - 0.2**2), abs=0.02)
    assert correlation[1] == pytest.approx(0, abs=0.02)


def test_bad_arguments_of_a_search(sd):
    best = BestOfN(sd.pipe, formula_scorer())
    for match, options in [
        ("step in", {"budget": 100, "step": 0.0}),
        ("neighbours, budget and patience", {"budget": 0}),
        ("keep from 1 to n=2", {"budget": 100, "n": 2, "keep": 3}),
        ("48 denoiser rows, but got 20", {"budget": 20, "n": 4}),
    ]:
        with pytest.raises(ValueError, match=match):
            best.search(**options, **sd.arguments)
    with pytest.raises(TypeError, match="no generator here"):
        best.search(budget=100, generator=torch.Generator(), **sd.arguments)
    with pytest.raises(UnsupportedError, match="no noise to start from"):
        BestOfN(build("flux2").pipe, formula_scorer()).search("a cat", budget=100)
