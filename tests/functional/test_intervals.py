"""Intervals of a mean: against SciPy's quantiles, by simulation, and at the edges."""

import math

import pytest
import torch
from scipy import stats

from vqr1_metric.functional.agreement import pairs_agreement, plcc, ranks, srcc
from vqr1_metric.functional.intervals import hall_statistic, interval_of_moments, mean_interval, student_t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 19, 59, 60, 61, 100, 1000, 100_000])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.95, 0.975, 0.995, 0.025])
def test_student_t_quantile(df: int, p: float) -> None:
    assert student_t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-6, abs=1e-9)


def test_symmetric_values_get_students_interval() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    low, high = mean_interval(values)
    want = stats.t.interval(0.95, 4, 3, stats.sem(values.numpy()))
    assert (float(low), float(high)) == pytest.approx(want)


def test_skewed_values_get_an_interval_that_reaches_further_into_the_tail() -> None:
    values = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.4, 3.0])
    low, high = (float(end) for end in mean_interval(values))
    student = stats.t.interval(0.95, 5, float(values.mean()), stats.sem(values.numpy()))
    assert low == pytest.approx(student[0]) and high > student[1] + 0.1
    # the end is where Hall's statistic is at Student's quantile
    gaps = values.double() - high
    moments = (6, float(gaps.mean()), float(values.double().std(correction=0)))
    third = float((values.double() - values.double().mean()).pow(3).mean())
    assert hall_statistic(*moments, third) == pytest.approx(-stats.t.ppf(0.975, 5), abs=1e-5)


@pytest.mark.parametrize("n", [5, 10, 40])
def test_the_interval_holds_the_mean_as_often_as_it_says(n: int) -> None:
    """One in a hundred such tests of a right interval would leave these bounds; the seed is fixed."""
    torch.manual_seed(n)
    for draw in (torch.randn(400, n), torch.empty(400, n).exponential_() - 1):
        held = [low <= 0 <= high for low, high in map(mean_interval, draw)]
        assert 0.92 <= sum(held) / len(held) <= 0.99


def test_edges() -> None:
    assert all(math.isnan(end) for end in mean_interval(torch.tensor([3.0])))
    assert [float(end) for end in mean_interval(torch.full((4,), 2.5))] == [2.5, 2.5]
    low, high = mean_interval(torch.tensor([2.0, 4.0]))
    assert float(low) < -9 and float(high) > 15  # two values say little
    assert mean_interval(torch.tensor([1.0, 2.0], dtype=torch.float16))[0].dtype == torch.float16
    with pytest.raises(ValueError, match="Expected a confidence level"):
        mean_interval(torch.ones(3), 95)
    values = torch.rand(30).double()
    deviations = values - values.mean()
    moments = float(values.mean()), float(deviations.square().mean().sqrt()), float(deviations.pow(3).mean())
    assert interval_of_moments(30, *moments, 0.9) == pytest.approx([float(end) for end in mean_interval(values, 0.9)])


def test_correlations_against_scipy() -> None:
    torch.manual_seed(0)
    for make in (torch.randn, lambda n: torch.randint(0, 4, (n,)).double()):
        x, y = make(50), make(50)
        assert ranks(x).tolist() == stats.rankdata(x.numpy()).tolist()
        assert srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
    assert math.isnan(srcc(torch.ones(4), torch.rand(4))) and math.isnan(plcc(torch.rand(1), torch.rand(1)))


def test_pairs() -> None:
    gaps = torch.tensor([1.0, -1.0, 0.0, math.nan, 2.0])
    assert pairs_agreement(gaps, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0])) == pytest.approx(0.5)
    assert math.isnan(pairs_agreement(gaps[:1], torch.zeros(1)))
