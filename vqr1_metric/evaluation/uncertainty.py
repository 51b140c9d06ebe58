"""How far would a statistic be off with other pictures, or other scenes? Intervals and p values for all of them.

What is drawn at random is a unit: a picture, or a group of pictures that are not independent (the versions of a scene,
the frames of a clip). Few units: the jackknife leaves out each in turn, and its spread is compared with Student's t.
Many units: the bootstrap draws them. Both work on a scale on which the statistic is nearly normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

#: Fewer units give no interval.
MIN_UNITS = 3
#: Up to so many units the jackknife is used.
_FEW = 50
#: An interval is only given if at least this share of the resamples had a value.
_SHARE = 0.9
#: An infinite end of a transformed value, such as the z of a correlation of 1, is put here.
_FAR = 1 - 1e-9

Values = Mapping[str, float]
Statistic = Callable[[NDArray[np.intp]], Values]


def find_units(count: int, groups: Sequence[str | None] | None = None) -> list[NDArray[np.intp]]:
    """Positions of each unit's pictures: groups where every picture names one and there are several, else pictures."""
    if groups is None or not all(groups) or len(set(groups)) < 2:
        return [np.array([i]) for i in range(count)]
    members: dict[str | None, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return [np.array(positions) for positions in members.values()]


def resample_units(units: Sequence[NDArray[np.intp]], resamples: int, seed: int) -> list[NDArray[np.intp]]:
    """Positions of bootstrap samples: as many units as there are, drawn with replacement."""
    random = np.random.default_rng(seed)
    draws = (random.integers(0, len(units), len(units)) for _ in range(resamples))
    return [np.concatenate([units[i] for i in draw]) for draw in draws]


def intervals(
    statistic: Statistic,
    units: Sequence[NDArray[np.intp]],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    scales: Mapping[str, str] | None = None,
    least: Mapping[str, float] | None = None,
) -> dict[str, tuple[float, float]]:
    """Interval of each value of a statistic.

    Args:
        statistic: positions of pictures -> values by name, NaN where undefined.
        units: see :func:`find_units`.
        level: probability of the intervals.
        resamples, seed: of the bootstrap.
        scales: name -> ``"correlation"`` (in -1..1), ``"share"`` (in 0..1), ``"positive"``; others stay as they are.
        least: name -> a standard error, on its scale, that the interval must not claim to beat.

    Returns:
        Name -> ``(low, high)``; NaN for fewer than :data:`MIN_UNITS` units, and where the value itself, or too many of
        those of the samples, are undefined.
    """
    count = sum(len(unit) for unit in units)
    whole = statistic(np.arange(count))
    nothing = dict.fromkeys(whole, (math.nan, math.nan))
    n = len(units)
    if n < MIN_UNITS or not resamples:
        return nothing
    if n > _FEW:
        drawn = [statistic(i) for i in resample_units(units, resamples, seed)]
        return {name: percentile_interval([row[name] for row in drawn], level) for name in whole}
    positions = [np.concatenate([units[j] for j in range(n) if j != i]) for i in range(n)]
    left_out = [statistic(i) for i in positions]
    student, normal = stats.t.ppf((1 + level) / 2, n - 1), stats.norm.ppf((1 + level) / 2)
    found = {}
    for name, value in whole.items():
        scale = (scales or {}).get(name, "")
        at = _forward(value, scale, count)
        rows = np.array([_forward(row[name], scale, len(i)) for row, i in zip(left_out, positions, strict=True)])
        rows = rows[np.isfinite(rows)]
        if not math.isfinite(at) or len(rows) < _SHARE * n or len(rows) < MIN_UNITS:
            found[name] = nothing[name]
            continue
        error = float(np.std(n * at - (n - 1) * rows, ddof=1)) / math.sqrt(n)
        reach = max(student * error, normal * (least or {}).get(name, 0.0))
        found[name] = (_back(at - reach, scale), _back(at + reach, scale))
    return found


def difference(
    statistic: Callable[[NDArray[np.intp]], float],
    units: Sequence[NDArray[np.intp]],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[tuple[float, float], float]:
    """Interval, and two-sided p of "0", of a difference, by Student's t of its jackknife or bootstrap error.

    Returns:
        ``((low, high), p)``; NaN as for :func:`intervals`.
    """
    n, nan = len(units), math.nan
    value = statistic(np.arange(sum(len(unit) for unit in units)))
    if n < MIN_UNITS or not resamples or not math.isfinite(value):
        return (nan, nan), nan
    if n > _FEW:
        drawn = np.array([statistic(i) for i in resample_units(units, resamples, seed)])
        drawn = drawn[np.isfinite(drawn)]
        error = float(drawn.std(ddof=1)) if len(drawn) >= _SHARE * resamples else nan
    else:
        rows = np.array([statistic(np.concatenate([units[j] for j in range(n) if j != i])) for i in range(n)])
        error = float(np.std(n * value - (n - 1) * rows, ddof=1)) / math.sqrt(n) if np.isfinite(rows).all() else nan
    if not math.isfinite(error):
        return (nan, nan), nan
    if error == 0:
        return (value, value), 1.0 if value == 0 else nan
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return (value - reach, value + reach), float(2 * stats.t.sf(abs(value) / error, n - 1))


def percentile_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Central interval of bootstrap values; NaN if more than a tenth of them is undefined."""
    table = np.asarray(values, float)
    finite = table[np.isfinite(table)]
    if not len(table) or len(finite) < _SHARE * len(table):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _forward(value: float, scale: str, count: int) -> float:
    if not math.isfinite(value):
        return math.nan
    if scale == "correlation":  # half a step of the rank correlation short of 1, where every order would be right
        far = min(_FAR, 1 - 6 / (count**3 - count)) if count > 2 else 0.5
        return math.atanh(min(max(value, -far), far))
    if scale == "share":
        far = 1 / (2 * count + 2)
        value = min(max(value, far), 1 - far)
        return math.log(value / (1 - value))
    return math.log(max(value, 1e-300)) if scale == "positive" else value


def _back(value: float, scale: str) -> float:
    if scale == "correlation":
        return math.tanh(value)
    if scale == "share":
        return 1 / (1 + math.exp(-max(min(value, 700.0), -700.0)))
    return math.exp(min(value, 700.0)) if scale == "positive" else value
