"""Is the difference between two scorers on the same pictures real?

Two answers stand side by side: Williams' t test (exact for normal variables, applied to ranks as is common; only for
independent pictures), and Student's t of the difference with its jackknife or bootstrap error, which assumes nothing
but that the pictures (or scenes) are a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from vqr1_metric.evaluation.agreement import independent, rank_correlation, undefined
from vqr1_metric.evaluation.uncertainty import difference, find_units


@dataclass(frozen=True)
class Difference:
    """Rank correlation of scorer ``a`` minus that of scorer ``b``, on the pictures that both have scored.

    Args:
        n: pictures.
        a, b: the two rank correlations (SRCC) with the opinions.
        difference: ``a - b``.
        interval: of the difference.
        p: two-sided, of "no difference".
        p_williams: two-sided, Williams' t test on ranks; NaN where pictures are not independent.
        reason: why there is no difference, or None.
    """

    n: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float
    p_williams: float
    reason: str | None = None


def compare_scorers(
    a: ArrayLike,
    b: ArrayLike,
    opinions: ArrayLike,
    scenes: Sequence[str | None] | None = None,
    *,
    groups: Sequence[str | None] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Compare the rank correlations of two scorers with the same opinions.

    Args:
        a, b: scores, shape ``(N,)``, higher meaning better, NaN where there is none.
        opinions: shape ``(N,)``, higher meaning better.
        scenes, groups: pictures that are not independent, see :func:`~vqr1_metric.evaluation.agreement.agreement`.
    """
    x, z, y = (np.asarray(values, float) for values in (a, b, opinions))
    known = np.isfinite(x) & np.isfinite(z) & np.isfinite(y)
    kept = None if scenes is None else [scene for scene, use in zip(scenes, known, strict=True) if use]
    units = find_units(int(known.sum()), independent(kept, groups, known))
    x, z, y = x[known], z[known], y[known]
    reason = undefined(x, y) or undefined(z, y)
    if reason is not None:
        nan = math.nan
        return Difference(len(y), nan, nan, nan, (nan, nan), nan, nan, reason)
    first, second = rank_correlation(x, y), rank_correlation(z, y)
    interval, p = difference(
        lambda i: rank_correlation(x[i], y[i]) - rank_correlation(z[i], y[i]),
        units,
        level=level,
        resamples=resamples,
        seed=seed,
    )
    alone = len(units) == len(y)
    p_williams = williams(first, second, rank_correlation(x, z), len(y))[1] if alone else math.nan
    return Difference(len(y), first, second, first - second, interval, p, p_williams)


def williams(r_ay: float, r_by: float, r_ab: float, n: int) -> tuple[float, float]:
    r"""Williams' test of two correlations that share a variable, as ``(t, two-sided p)``.

    .. math:: t = (r_{ay} - r_{by}) \sqrt{\frac{(n-1)(1+r_{ab})}{2\frac{n-1}{n-3}|R| + \bar r^2 (1-r_{ab})^3}},
        \quad |R| = 1 - r_{ay}^2 - r_{by}^2 - r_{ab}^2 + 2 r_{ay} r_{by} r_{ab}, \quad \bar r = (r_{ay}+r_{by})/2

    with n - 3 degrees of freedom. Source: Williams, "The comparison of regression variables", 1959, in the form of
    Steiger, "Tests for comparing elements of a correlation matrix", 1980, equation 7.
    """
    if n < 4:
        return math.nan, math.nan
    determinant = max(0.0, 1 - r_ay**2 - r_by**2 - r_ab**2 + 2 * r_ay * r_by * r_ab)
    mean = (r_ay + r_by) / 2
    below = 2 * (n - 1) / (n - 3) * determinant + mean**2 * (1 - r_ab) ** 3
    if below <= 0:  # the two scorers order the pictures alike
        return 0.0, 1.0
    t = (r_ay - r_by) * math.sqrt((n - 1) * (1 + r_ab) / below)
    return t, float(2 * stats.t.sf(abs(t), n - 3))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979); NaN stays NaN and is not counted."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, running = [math.nan] * len(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - place) * p_values[index]))
        corrected[index] = running
    return corrected
