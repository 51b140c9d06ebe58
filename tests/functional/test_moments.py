"""Moments that come in parts are those of the whole."""

import math

import pytest
import torch

from vqr1_metric.functional.intervals import interval_of_moments, mean_interval
from vqr1_metric.functional.moments import combine_moments, moments_of, moments_state, read_moments


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (1, 1, 1, 1), (0, 7, 0), (1000, 1, 500), (0, 0)])
def test_parts_equal_the_whole(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [(1 + 4 * torch.rand(size, generator=generator, dtype=torch.float64) ** 3).tolist() for size in sizes]
    together = combine_moments(torch.stack([moments_state(part) for part in parts]))
    one_by_one = moments_state([])
    for part in parts:
        for value in part:
            one_by_one = combine_moments(torch.stack([one_by_one, moments_state([value])]))
    values = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
    for state in (together, one_by_one):
        assert state.shape == (4, 2) and state.dtype == torch.float32
        count, mean, squares, cubes = read_moments(state)
        assert count == len(values)
        if count:
            gaps = values - values.mean()
            assert mean == pytest.approx(float(values.mean()), abs=1e-11)
            assert squares == pytest.approx(float(gaps.square().sum()), rel=1e-10, abs=1e-10)
            assert cubes == pytest.approx(float(gaps.pow(3).sum()), rel=1e-8, abs=1e-9)


def test_a_million_scores_keep_their_mean():
    state = moments_state([3.1] * 1000 + [3.2])
    for _ in range(10):
        state = combine_moments(torch.stack([state, state]))
    count, mean, _, _ = read_moments(state)
    assert count == 1001 * 1024 and mean == pytest.approx((3100 + 3.2) / 1001, abs=1e-12)


def test_nan_is_left_out_and_nothing_gives_zeros():
    assert torch.equal(moments_state([2.0, math.nan, 4.0]), moments_state([2.0, 4.0]))
    assert moments_of(moments_state([])) == (0, 0.0, 0.0, 0.0)


def test_the_interval_from_moments_is_that_of_the_values():
    values = torch.tensor([1.2, 1.3, 1.9, 2.0, 4.6, 2.2], dtype=torch.float64)
    low, high = mean_interval(values, 0.9)
    found = interval_of_moments(*moments_of(moments_state(values.tolist())), 0.9)
    assert found == pytest.approx((float(low), float(high)), abs=1e-9)
