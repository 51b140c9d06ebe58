"""Statistics against SciPy, hand calculations and published values."""

import math

import numpy as np
import pytest
from scipy import stats

from vqr1_metric.evaluation.agreement import STATISTICS, agreement, fit, logistic_4, logistic_5
from vqr1_metric.evaluation.significance import compare_scorers, holm, williams
from vqr1_metric.evaluation.uncertainty import difference, find_units, intervals, resample_units


def pair(n: int = 60, noise: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    opinions = random.normal(size=n)
    return opinions + noise * random.normal(size=n), opinions


def test_correlations_are_those_of_scipy() -> None:
    x, y = pair()
    x = np.round(x, 1)  # with ties
    found = agreement(x, y, resamples=0).values
    assert found["srcc"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found["plcc"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found["krcc"] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_pairwise_accuracy_by_counting() -> None:
    random = np.random.default_rng(1)
    x, y = random.integers(0, 6, 30).astype(float), random.integers(0, 5, 30).astype(float)
    right = total = 0.0
    for i in range(30):
        for j in range(i):
            if y[i] != y[j]:
                total += 1
                right += 0.5 if x[i] == x[j] else float((x[i] > x[j]) == (y[i] > y[j]))
    assert agreement(x, y, resamples=0).values["pairwise"] == pytest.approx(right / total, abs=1e-12)


def test_logistic_maps_recover_what_made_the_data() -> None:
    x = np.linspace(1, 5, 80)
    four = logistic_4(x, 90.0, 10.0, 3.2, 0.4)
    five = logistic_5(x, 40.0, 2.5, 2.8, 3.0, 50.0)
    assert np.abs(fit(x, four, "4")(x) - four).max() < 1e-3
    assert np.abs(fit(x, five, "5")(x) - five).max() < 1e-3
    assert fit(x, four, "4")(3.2) == pytest.approx(50.0, abs=1e-3)
    found = agreement(x, four, resamples=0).values
    assert found["plcc_4"] == pytest.approx(1.0, abs=1e-6) and found["rmse_4"] < 1e-3
    assert found["plcc"] < 0.999


def test_five_parameter_map_is_never_worse_than_a_line() -> None:
    for seed in range(8):
        x, y = pair(40, 1.5, seed)
        found = agreement(x, y, resamples=0).values
        assert found["plcc_5"] >= abs(found["plcc"]) - 1e-9
        line = np.polyval(np.polyfit(x, y, 1), x)
        assert found["rmse_5"] <= np.sqrt(np.mean((line - y) ** 2)) + 1e-9


def test_scene_correlation_is_the_mean_over_scenes() -> None:
    scenes = ["a"] * 4 + ["b"] * 4 + ["c"] * 2 + ["d"] * 4
    x = np.array([1, 2, 3, 4, 4, 3, 2, 1, 1, 2, 5, 5, 5, 5], float)
    y = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 1, 2, 3, 4], float)
    found = agreement(x, y, scenes, resamples=0)
    # a: 1, b: -1, c has two versions only, d is judged all the same, which counts as no agreement
    assert found.values["scene_srcc"] == pytest.approx(0.0) and found.scenes == 3
    assert found.resampled == "scenes"
    assert math.isnan(agreement(x, y, resamples=0).values["scene_srcc"])


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    x, y = pair(80)
    found = agreement(x, y, resamples=2000)
    wanted = stats.bootstrap(
        (x, y),
        lambda a, b: stats.pearsonr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
    ).confidence_interval
    assert found.intervals["plcc"] == pytest.approx((wanted.low, wanted.high), abs=0.02)
    assert agreement(x, y, resamples=200) == agreement(x, y, resamples=200)
    assert agreement(x, y, resamples=200).intervals != agreement(x, y, resamples=200, seed=1).intervals


def test_bootstrap_draws_whole_scenes() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    for draw in resample_units(find_units(9, [str(g) for g in groups]), 20, 0):
        counts = np.bincount(groups[draw], minlength=3) / np.array([3, 2, 4])
        assert (counts == counts.round()).all() and counts.sum() == 3


def test_one_scene_says_nothing_of_others_but_its_pictures_are_a_sample() -> None:
    x, y = pair(9)
    alone, one = agreement(x, y), agreement(x, y, ["s"] * 9)
    assert one.resampled == "pictures" and one.intervals["srcc"] == alone.intervals["srcc"]
    low, high = one.intervals["srcc"]
    assert high - low > 0.3
    random = np.random.default_rng(4)
    found = compare_scorers(random.normal(size=9), random.normal(size=9), random.normal(size=9), ["s"] * 9)
    assert found.interval[1] - found.interval[0] > 0.5 and found.p > found.p_williams / 4


def test_few_scenes_give_wide_intervals_with_no_more_than_the_pictures_can_say() -> None:
    random = np.random.default_rng(5)
    x = random.normal(size=40)
    y = x + random.normal(size=40)
    by_picture = agreement(x, y, only=("srcc",)).intervals["srcc"]
    by_scene = agreement(x, y, [str(i // 10) for i in range(40)], only=("srcc",))
    assert by_scene.resampled == "scenes"
    assert (
        by_scene.intervals["srcc"][0] <= by_picture[0] + 0.05 and by_scene.intervals["srcc"][1] >= by_picture[1] - 0.05
    )
    two = agreement(x, y, [str(i // 20) for i in range(40)], only=("srcc",))
    assert math.isnan(two.intervals["srcc"][0])  # two scenes are not enough for an interval


@pytest.mark.parametrize("n", [6, 10, 25])
def test_intervals_of_srcc_hold_it(n: int) -> None:
    random = np.random.default_rng(n)
    truth, held = 6 / math.pi * math.asin(0.7 / 2), 0
    for _ in range(200):
        x = random.normal(size=n)
        y = 0.7 * x + math.sqrt(1 - 0.49) * random.normal(size=n)
        low, high = agreement(x, y, only=("srcc",)).intervals["srcc"]
        held += low <= truth <= high
    assert held >= 182  # 190 expected, standard deviation 3


def test_perfect_agreement_of_few_pictures_is_not_certain() -> None:
    low, high = agreement([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], only=("srcc",)).intervals["srcc"]
    assert low < 0.6 and 0.95 < high <= 1


def test_edges_of_intervals() -> None:
    units = find_units(3)
    assert math.isnan(intervals(lambda i: {"v": 1.0}, units[:2])["v"][0])
    assert intervals(lambda i: {"v": 1.0}, units)["v"] == (1.0, 1.0)
    assert difference(lambda i: 0.0, units) == ((0.0, 0.0), 1.0)
    assert math.isnan(difference(lambda i: 0.5, units)[1])


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1, 2, 3], [1, 2, 3], "3 pictures with a score are too few"),
        ([3, 3, 3, 3, 3], [1, 2, 3, 4, 5], "every picture has the same score, 3"),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], "every picture has the same label, 2"),
        ([], [], "0 pictures"),
    ],
)
def test_undefined_is_nan_with_a_reason(x: list, y: list, reason: str) -> None:
    found = agreement(x, y, resamples=50)
    assert all(math.isnan(found.values[name]) for name in STATISTICS)
    assert all(math.isnan(end) for ends in found.intervals.values() for end in ends)
    assert reason in found.reasons["srcc"]


def test_few_pictures_get_no_map() -> None:
    x, y = pair(9)
    found = agreement(x, y, resamples=20)
    assert math.isfinite(found.values["srcc"]) and math.isnan(found.values["plcc_4"]) and fit(x, y) is None
    assert found.reasons["rmse_5"] == "a map needs at least 10 pictures"


def test_pictures_without_a_score_are_left_out_and_counted() -> None:
    x, y = pair()
    full = agreement(x, y, resamples=0)
    holes = agreement(np.r_[x, math.nan, math.inf], np.r_[y, 1.0, 2.0], resamples=0)
    assert (holes.n, holes.left_out) == (60, 2)
    assert holes.values == pytest.approx(full.values, nan_ok=True)
    with pytest.raises(ValueError, match="Expected two vectors of one length"):
        agreement([1, 2], [1, 2, 3])


def test_williams_golden_values() -> None:
    # The example of R's psych::r.test(103, .4, .5, .1) prints t value -0.89 and p < 0.37.
    t, p = williams(0.4, 0.5, 0.1, 103)
    assert (round(t, 2), round(p, 2)) == (-0.89, 0.37)
    assert williams(0.5, 0.4, 0.1, 103) == (-t, p)
    assert williams(0.6, 0.6, 1.0, 50) == (0.0, 1.0)
    assert math.isnan(williams(0.6, 0.6, 0.5, 3)[0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[0] == pytest.approx(0.02) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.04)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_real_difference_is_found_and_a_tie_is_not() -> None:
    random = np.random.default_rng(2)
    y = random.normal(size=150)
    good, bad = y + 0.4 * random.normal(size=150), y + 2.0 * random.normal(size=150)
    found = compare_scorers(good, bad, y, resamples=300)
    assert found.interval[0] > 0 and found.p < 0.02 and found.p_williams < 1e-4
    assert found.difference == pytest.approx(found.a - found.b)
    turned = compare_scorers(bad, good, y, resamples=300)
    assert turned.difference == -found.difference and turned.p_williams == pytest.approx(found.p_williams)
    same = compare_scorers(good, good * 2, y, resamples=100)
    assert same.difference == 0 and same.p == 1.0 and same.p_williams == 1.0
    constant = compare_scorers(np.ones(150), good, y)
    assert math.isnan(constant.difference) and "same score" in constant.reason


def test_false_alarms_are_as_rare_as_stated() -> None:
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(200):
        y = random.normal(size=60)
        a, b = y + random.normal(size=60), y + random.normal(size=60)
        ranks = [stats.rankdata(v) for v in (a, b, y)]
        r = np.corrcoef(ranks)
        alarms += williams(r[0, 2], r[1, 2], r[0, 1], 60)[1] < 0.05
    assert alarms <= 20  # 10 expected, standard deviation 3
