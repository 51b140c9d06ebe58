"""Uncertainty figures on data whose calibration is known."""

import math

import numpy as np
import pytest
from scipy import stats

from vqr1_metric.evaluation.calibration import calibration


def known(n: int = 4000, sure: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores whose errors have the stated standard deviations, ``sure`` times too small; labels in other units."""
    random = np.random.default_rng(0)
    truth, stds = random.uniform(1.5, 4.5, n), random.uniform(0.05, 0.3, n)
    scores = truth + stds * random.standard_normal(n)
    return scores, stds / sure, 10 + 20 * truth


def test_calibrated_uncertainty() -> None:
    found = calibration(*known())
    assert found["scale"] == pytest.approx(1.0, abs=0.05) and found["ence"] < 0.12
    assert found["std_error_srcc"] > 0.35 and found["intervals"] == "normal"
    for level, share in found["coverage"].items():
        assert share == pytest.approx(float(level), abs=0.03)
    risks = [point[1] for point in found["risk"]]
    assert risks == sorted(risks) and risks[-1] == pytest.approx(found["rmse"])
    assert found["aurc_best"] < found["aurc"] < found["rmse"]
    assert found["rmse"] == pytest.approx(20 * math.sqrt(np.mean(known()[1] ** 2)), rel=0.05)


def test_overconfidence_is_measured() -> None:
    found = calibration(*known(sure=3.0))
    assert found["scale"] == pytest.approx(3.0, rel=0.05)
    assert found["coverage"]["0.95"] < 0.6 and found["ence"] > 1


def test_uncertainty_that_knows_nothing() -> None:
    scores, stds, opinions = known()
    found = calibration(scores, np.random.default_rng(1).permutation(stds), opinions)
    assert abs(found["std_error_srcc"]) < 0.06
    assert found["aurc"] == pytest.approx(found["rmse"], rel=0.08)


def test_intervals_come_from_the_distribution() -> None:
    grid = np.linspace(1, 5, 401)
    scores, stds, opinions = known(200)
    rows = np.exp(-0.5 * ((grid - scores[:, None]) / stds[:, None]) ** 2)
    rows /= rows.sum(1, keepdims=True)
    found = calibration(scores, stds, opinions, rows.tolist())
    assert found["intervals"] == "distribution" and found["coverage"]["0.8"] == pytest.approx(0.8, abs=0.08)
    assert calibration(scores, stds, opinions, [None, *rows.tolist()[1:]])["intervals"] == "normal"


@pytest.mark.parametrize(
    ("scores", "stds", "reason"),
    [
        (np.arange(10.0), np.ones(10), "20 are needed"),
        (np.ones(30), np.ones(30), "constant"),
        (np.arange(30.0), np.zeros(30), "every standard deviation is 0"),
    ],
)
def test_nothing_is_said_without_data(scores, stds, reason: str) -> None:
    assert reason in calibration(scores, stds, np.arange(float(len(scores))))["reason"]
    holes = np.where(np.arange(len(scores)) < len(scores), math.nan, stds)
    assert "0 pictures" in calibration(scores, holes, np.arange(float(len(scores))))["reason"]


def test_rank_correlation_is_scipys() -> None:
    scores, stds, opinions = known(100)
    slope, offset = np.polyfit(scores, opinions, 1)
    wanted = stats.spearmanr(stds, np.abs(slope * scores + offset - opinions)).statistic
    assert calibration(scores, stds, opinions)["std_error_srcc"] == pytest.approx(wanted)
