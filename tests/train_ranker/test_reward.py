"""Rewards against the metric's own function and against loops; the sampler's promises."""

import itertools
import math

import pytest
import torch

from vqr1_metric.functional.reward import comparison_labels, ranking_reward
from vqr1_metric.train_ranker.reward import FormatReward, RankingReward, batch_rewards, comparison_groups, set_metrics
from vqr1_metric.train_ranker.sampler import ComparisonSampler


def scores_with_gaps(pictures: int = 6, replies: int = 5) -> torch.Tensor:
    scores = (1 + 4 * torch.rand(pictures, replies, dtype=torch.float64)).round(decimals=2)
    scores[0, 2] = scores[3, :4] = scores[5] = torch.nan  # one gap, one readable reply, none
    return scores


def test_a_batch_in_any_order_is_rewarded_like_its_comparison_sets() -> None:
    """Two data sets, the replies shuffled as an engine balances them, one reply of one image missing."""
    scores, mos = scores_with_gaps(), [10.0, 20, 20, 0.35, 0.1, 0.7]
    texts = ["no score" if math.isnan(s) else f"<answer>{s:.2f}</answer>" for s in scores.flatten().tolist()]
    rows = [(texts[i], f"{i // 5}.png", mos[i // 5], "ab"[i // 15]) for i in range(30)]
    order = [i for i in torch.randperm(30).tolist() if i != 29]
    found = dict(zip(order, batch_rewards(*zip(*(rows[i] for i in order), strict=True)), strict=True))
    for at in (0, 3):
        expected = ranking_reward(scores[at : at + 3], torch.tensor(mos[at : at + 3], dtype=torch.float64))
        for i in range(15):
            if at * 5 + i in found:
                assert found[at * 5 + i] == pytest.approx(float(expected.flatten()[i]), nan_ok=True, abs=1e-12)
    with pytest.raises(ValueError, match="Expected one MOS for an image, but got several for 'x'"):
        batch_rewards(["<answer>1</answer>"] * 2, ["x", "x"], [1.0, 2.0])


def test_the_binary_rule_counts_right_orders() -> None:
    scores, mos = scores_with_gaps(), torch.tensor([10.0, 20, 20, 35, 1, 7], dtype=torch.float64)
    found = ranking_reward(scores, mos, rule="binary")
    for i, k in itertools.product(range(6), range(5)):
        if scores[i, k].isnan():
            continue
        partners = [j for j in range(5) if j != i]  # picture 5 has no readable score
        right = sum(
            bool(torch.sign(scores[i, k] - scores[j].nanmean()) == torch.sign(mos[i] - mos[j])) for j in partners
        )
        assert found[i, k] == pytest.approx(right / len(partners))


def test_the_averaged_rule_averages_probabilities() -> None:
    scores = torch.tensor([[3.0, 4.0], [2.0, 5.0]], dtype=torch.float64)
    found = ranking_reward(scores, torch.tensor([2.0, 1.0]), rule="averaged")
    spread = math.sqrt(0.5 + 4.5 + 1e-6)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for k, q in enumerate((3.0, 4.0)):
        probability = (phi((q - 2) / spread) + phi((q - 5) / spread)) / 2
        assert found[0, k] == pytest.approx(math.sqrt(probability + 1e-6) + math.sqrt(1e-6))


def test_preferences_reward_the_order_of_a_pair_only() -> None:
    share = torch.tensor([0.8, 0.2, 1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor(comparison_groups([True] * 4, size=4))
    label = comparison_labels(torch.zeros(4, dtype=torch.float64), groups, share)
    assert torch.isfinite(label).sum() == 4 and label[2, 3] == 1 and label[1, 0] == pytest.approx(0.2)
    scores = torch.tensor([[4.0, 4.1], [3.0, 3.1], [1.0, 1.1], [5.0, 4.9]], dtype=torch.float64)
    reward = ranking_reward(scores, torch.zeros(4), group_B=groups, share_B=share)
    assert (reward[:2] > 0.89).all() and (reward[2:] < 0.1).all()


def test_groups_of_ratings_and_of_pairs() -> None:
    assert comparison_groups([False] * 4, 2, repeats=2) == [-1, -1, -1, -1, -2, -2, -2, -2]
    assert comparison_groups([True] * 4 + [False] * 4, 4) == [0, 0, 2, 2, -2, -2, -2, -2]


def batch(scores, names, quality, k: int, share=None) -> dict:
    """What TRL passes for these scores: K consecutive replies of each picture."""
    texts = [
        "<answer>none</answer>" if math.isnan(s) else f"<answer>{s:.2f}</answer>" for s in scores.flatten().tolist()
    ]
    repeat = lambda values: [v for v in values for _ in range(k)]  # noqa: E731
    return {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "data_set": repeat(names),
        "quality": repeat(quality),
        "share": repeat(share or [None] * len(names)),
    }


def test_each_comparison_set_is_its_own() -> None:
    scores = scores_with_gaps()
    reward = RankingReward(images_per_comparison=3, num_generations=5)
    logged: dict[str, list[float]] = {}
    quality = [0.1, 0.9, 0.4, 70, 20, 50]
    found = reward(
        **batch(scores, ["biq"] * 3 + ["kadid"] * 3, quality, 5),
        log_metric=lambda name, value: logged.setdefault(name, []).append(value),
    )
    expected = torch.cat(
        [ranking_reward(scores[i : i + 3], torch.tensor(quality[i : i + 3], dtype=torch.float64)) for i in (0, 3)]
    ).flatten()
    told = torch.tensor([math.nan if r is None else r for r in found], dtype=torch.float64)
    torch.testing.assert_close(told, expected, equal_nan=True)
    assert logged["readable"] == [pytest.approx(20 / 30)]
    assert all(math.isfinite(v) for values in logged.values() for v in values)
    with pytest.raises(ValueError, match="Expected a comparison set of one data set, but got biq, kadid"):
        RankingReward(6, 5)(**batch(scores, ["biq"] * 3 + ["kadid"] * 3, quality, 5))
    with pytest.raises(ValueError, match="Expected a multiple of 4 pictures x 5 replies, but got 30"):
        RankingReward(4, 5)(**batch(scores, ["biq"] * 6, quality, 5))


def test_replies_without_a_score_earn_nothing_and_change_nothing() -> None:
    scores = torch.tensor([[2.0, 3.0, torch.nan], [4.0, 4.5, 5.0]], dtype=torch.float64)
    found = RankingReward(2, 3)(**batch(scores, ["a"] * 2, [1.0, 2.0], 3))
    assert found[2] is None
    lonely = RankingReward(2, 3)(**batch(torch.full((2, 3), torch.nan), ["a"] * 2, [1.0, 2.0], 3))
    assert lonely == [None] * 6
    expected = ranking_reward(scores, torch.tensor([1.0, 2.0]))
    assert found[0] == pytest.approx(float(expected[0, 0])) and found[5] == pytest.approx(float(expected[1, 2]))


@pytest.mark.parametrize(
    ("text", "thinking", "reward"),
    [
        ("<think>Sharp.</think>\n<answer>4.25</answer>", True, 1),
        ("<think>Sharp.\nYes.</think><answer> 4 </answer>", True, 1),
        ("<answer>4.25</answer>", True, 0),
        ("<answer>4.25</answer>", False, 1),
        ("It is <answer>4.25</answer>", False, 0),
        ("<think>Sharp.</think><answer>4.25</answer> So.", True, 0),
        ("<think>Sharp.</think><answer>good</answer>", True, 0),
        ("<think>Sharp.</think><answer>7</answer>", True, 0),
        ("", False, 0),
    ],
)
def test_the_format_reward(text: str, thinking: bool, reward: int) -> None:
    assert FormatReward(thinking)(completions=[[{"role": "assistant", "content": text}]]) == [reward]


def test_what_is_watched() -> None:
    scores = torch.tensor([[3.0, 3.0], [3.0, 3.0]], dtype=torch.float64)
    same = set_metrics(scores, ranking_reward(scores, torch.tensor([1.0, 2.0])))
    assert same["fidelity"] == pytest.approx(0.708, abs=1e-3) and same["spread"] == 0 and same["zero_spread"] == 1
    scores = torch.tensor([[2.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    some = set_metrics(scores, ranking_reward(scores, torch.tensor([1.0, 2.0])))
    assert some["zero_spread"] == 0.5 and some["score_std"] == pytest.approx(0.5**0.5 / 2)
    nothing = set_metrics(scores * torch.nan, scores * torch.nan)
    assert math.isnan(nothing["spread"]) and nothing["zero_spread"] == 1


UNITS = [[(i,) for i in range(10)], [(i,) for i in range(10, 17)], [(17, 18), (19, 20), (21, 22)]]


def test_comparison_sets_never_cross_data_sets() -> None:
    sampler = ComparisonSampler(UNITS, images_per_comparison=4, seed=3)
    seen = sampler.comparison_sets()
    assert len(seen) == 2 + 1 + 1 == sampler.sets_per_epoch
    for one in seen:
        assert len(one) == 4 and len({0 if i < 10 else 1 if i < 17 else 2 for i in one}) == 1
    assert len(set(itertools.chain(*seen))) == 16  # no picture twice
    (pairs,) = [one for one in seen if one[0] >= 17]
    assert all((a + 1, a % 2) == (b, 1) for a, b in zip(pairs[::2], pairs[1::2], strict=True))  # pairs stay together


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ComparisonSampler(UNITS, 4, repeats=2, batch_repeats=2, seed=seed)
        list(sampler)  # an earlier pass leaves no trace
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1) != order(0, 2) != order(1, 1)
    assert len(order(0, 0)) == 4 * 4 * 2 * 2


def test_repeats_are_those_of_trl() -> None:
    sampler = ComparisonSampler(UNITS, 4, sets_per_batch=2, repeats=3, batch_repeats=2)
    order, sets = list(sampler), sampler.comparison_sets()
    assert len(order) == len(sampler)
    first = [i for i in sets[0] + sets[1] for _ in range(3)]
    assert order[:48] == first * 2


def test_uniform_mixing_draws_sets_not_pictures() -> None:
    units = [[(i,) for i in range(400)], [(i,) for i in range(400, 404)]]
    sampler = ComparisonSampler(units, 4, mixing="uniform")
    small = sum(one[0] >= 400 for one in sampler.comparison_sets())
    assert sampler.sets_per_epoch == 101 and 30 < small < 70
    proportional = ComparisonSampler(units, 4).comparison_sets()
    assert sum(one[0] >= 400 for one in proportional) == 1


def test_too_few_pictures_for_a_batch() -> None:
    with pytest.raises(ValueError, match="one batch of 5 comparison sets of 4, but there are only 4"):
        ComparisonSampler(UNITS, 4, sets_per_batch=5)


def test_the_authors_order_uses_every_picture_once_and_small_sets_early() -> None:
    units = [[(i,) for i in range(400)], [(i,) for i in range(400, 480)]]
    sampler = ComparisonSampler(units, 8, mixing="authors", seed=1)
    sets = sampler.comparison_sets()
    used = list(itertools.chain(*sets))
    assert len(sets) == 60 and sorted(used) == list(range(480))
    # The set is drawn uniformly while both have pictures, so 10 small sets are used up after about 20 draws.
    small = [i for i, one in enumerate(sets) if one[0] >= 400]
    assert len(small) == 10 and small[-1] < 40
