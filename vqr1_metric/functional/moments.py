"""Moments of scores that come in parts, in a state of eight numbers: count, mean, squared and cubed deviations.

A moment is held as two float32 numbers that add up to it, to 48 bits: float32 alone would lose the mean of a million
scores in its fifth digit, and float64 does not exist on every device (MPS).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Moments = tuple[int, float, float, float]


def moments_state(values: Iterable[float]) -> Tensor:
    """State of some values, NaN left out: shape ``(4, 2)``, float32, on the CPU."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return torch.zeros(4, 2)
    mean = math.fsum(known) / len(known)
    squares, cubes = (math.fsum((value - mean) ** power for value in known) for power in (2, 3))
    return _as_state((len(known), mean, squares, cubes))


def combine_moments(states: Tensor) -> Tensor:
    """One state for the values of several, shape ``(n, 4, 2)``, on their device.

    Source: P. Pébay, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
    moments, 2008, (2.1) to (2.4).
    """
    total: Moments = (0, 0.0, 0.0, 0.0)
    for state in states.cpu():
        n, m, m2, m3 = total
        k, mean, k2, k3 = read_moments(state)
        if k == 0:
            continue
        both, gap = n + k, mean - m
        cubes = m3 + k3 + gap**3 * n * k * (n - k) / both**2 + 3 * gap * (n * k2 - k * m2) / both
        total = (both, m + gap * k / both, m2 + k2 + gap**2 * n * k / both, cubes)
    return _as_state(total).to(states.device)


def read_moments(state: Tensor) -> Moments:
    """Count, mean, and sums of squared and of cubed deviations from the mean."""
    count, mean, squares, cubes = state.cpu().double().sum(1).tolist()
    return round(count), mean, squares, cubes


def moments_of(state: Tensor) -> Moments:
    """Count, mean, root mean squared deviation, and mean cubed deviation; zeros without values."""
    count, mean, squares, cubes = read_moments(state)
    return (count, mean, math.sqrt(max(squares, 0) / count), cubes / count) if count else (0, 0.0, 0.0, 0.0)


def _as_state(moments: Moments) -> Tensor:
    exact = torch.tensor(moments, dtype=torch.float64)
    high = exact.float()
    return torch.stack([high, (exact - high.double()).float()], 1)
