"""What scoring gives back: orders that agree, plain values, packing."""

import itertools
import json
import math
import pickle

import pytest
import torch

from vqr1_metric.functional.distribution import GRID_SIZE, ScoreDistribution
from vqr1_metric.protocol import ParsedReply
from vqr1_metric.results import Comparison, ImageScore, pack_results, rank_results, unpack_results


def result(name: str, **mass: float) -> ImageScore:
    """Probabilities by score: ``s30=.6`` for 3.0."""
    probabilities = torch.zeros(GRID_SIZE)
    for score, share in mass.items():
        probabilities[int(score[1:]) * 10 - 100] += share
    return ImageScore.of(name, ScoreDistribution(probabilities))


def random_results(count: int, seed: int) -> list[ImageScore]:
    """As of models that answer round numbers, where means and win probabilities disagree most."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for index in range(count):
        scores = torch.randint(10, 51, (3,), generator=generator).tolist()
        shares = torch.rand(3, generator=generator).softmax(0).tolist()
        mass: dict[str, float] = {}
        for score, share in zip(scores, shares, strict=True):
            mass[f"s{score}"] = mass.get(f"s{score}", 0) + share
        results.append(result(str(index), **mass))
    return results


def test_a_pair_whose_win_probability_speaks_against_its_means_ties():
    a, b = result("a", s30=0.6, s50=0.4), result("b", s37=1.0)
    assert a.score > b.score and Comparison.of(a, b).win_probability == pytest.approx(0.4)
    assert Comparison.of(a, b).winner == Comparison.of(b, a).winner == "tie"
    assert [(place.rank, place.index, place.tied) for place in rank_results([a, b])] == [(1, 0, True), (1, 1, True)]


@pytest.mark.parametrize("seed", range(4))
def test_rank_and_compare_agree_on_every_pair(seed):
    ranking = rank_results(random_results(25, seed))
    assert [place.result.score for place in ranking] == sorted((p.result.score for p in ranking), reverse=True)
    for better, worse in itertools.combinations(ranking, 2):
        winner = Comparison.of(better.result, worse.result).winner
        assert Comparison.of(worse.result, better.result).winner == {"a": "b", "b": "a", "tie": "tie"}[winner]
        assert winner == "tie" if better.rank == worse.rank else winner in ("a", "tie")
    for place in ranking:
        assert place.tied == ([other.rank for other in ranking].count(place.rank) > 1)


def test_plain_values():
    row = result("x.png", s30=0.5, s40=0.5).to_dict(probabilities=True)
    assert row["name"] == "x.png" and row["score"] == pytest.approx(3.5) and row["reliable"] is True
    assert len(row["probabilities"]) == GRID_SIZE and row["replies"] == [] and "values" not in row
    failed = ImageScore.failed("y.png", "is empty", [ParsedReply(math.nan, "no answer", "hm")])
    row = failed.to_dict(probabilities=True)
    assert row["score"] is None and row["error"] == "is empty" and row["probabilities"] is None
    assert row["replies"] == [{"score": None, "reason": "no answer", "reasoning": "hm"}]
    json.dumps(row, allow_nan=False)


def test_packed_results_come_back_as_they_were():
    words = ScoreDistribution(
        torch.tensor([0.25, 0.75], dtype=torch.float64), values=(1.0, 5.0), answers=("bad", "good")
    )
    replies = [ParsedReply(3.0, None, "a reason\nin two lines")]
    results = [
        ImageScore.of("a\nb", result("", s30=0.4, s31=0.6).distribution, replies),
        ImageScore.failed("c", "is empty"),
        ImageScore.of("d", words),
    ]
    back = unpack_results(pack_results(results))
    for old, new in zip(results, back, strict=True):
        assert (old.name, old.error, old.replies) == (new.name, new.error, new.replies)
        assert old.score == new.score or (math.isnan(old.score) and math.isnan(new.score))
        torch.testing.assert_close(new.distribution.probabilities, old.distribution.probabilities, equal_nan=True)
        assert (new.distribution.values, new.distribution.answers) == (
            old.distribution.values,
            old.distribution.answers,
        )
    assert unpack_results(b"") == []


def test_a_result_has_memory_of_its_own():
    batch = ScoreDistribution(torch.rand(500, GRID_SIZE).softmax(-1))
    assert len(pickle.dumps(ImageScore.of("x", batch[3]))) < 3500


@pytest.mark.parametrize("level", [95, -0.1, 1.5, math.nan])
def test_levels_outside_0_to_1_are_refused(level):
    one = result("x", s30=1.0)
    for call in (one.interval, one.distribution.interval):
        with pytest.raises(ValueError, match=r"Expected a level in \[0, 1\], such as 0.95, but got"):
            call(level)


def test_the_gradient_of_std_at_a_point_mass_is_a_number():
    probabilities = torch.zeros(2, GRID_SIZE)
    probabilities[0, 200] = 1
    probabilities[1, 100:300:50] = 0.25
    probabilities.requires_grad_()
    std = ScoreDistribution(probabilities).std
    assert std[0] == 0 and std[1] > 0
    (std.sum() + ScoreDistribution(probabilities).entropy.sum()).backward()
    assert probabilities.grad.isfinite().all() and probabilities.grad[1].abs().sum() > 0
    assert ScoreDistribution(torch.full((GRID_SIZE,), torch.nan)).std.isnan()
