"""Is a scorer's own uncertainty worth anything? Its standard deviations and intervals against the errors it makes.

Scores are first mapped to the labels' units by the straight line of least squares, which maps standard deviations and
intervals along with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vqr1_metric.evaluation.agreement import rank_correlation
from vqr1_metric.functional.distribution import ScoreDistribution

LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Below this many pictures the figures would be noise.
MIN_PICTURES = 20
_BINS = 10
_KEPT = tuple(round(0.1 * i, 1) for i in range(1, 11))


def calibration(
    scores: ArrayLike,
    stds: ArrayLike,
    opinions: ArrayLike,
    probabilities: Sequence[Sequence[float] | None] | None = None,
) -> dict[str, Any]:
    """Figures about the uncertainty of one scorer.

    Args:
        scores, stds: shape ``(N,)``, in score units; pictures with NaN in either are left out.
        opinions: shape ``(N,)``, higher meaning better.
        probabilities: the 401 probabilities of each picture, from which the intervals come; without them intervals are
            those of a normal distribution.

    Returns:
        ``reason`` alone where there is nothing to say, else

        - ``n``; ``rmse`` of the mapped scores; ``mean_std``, root mean square of the mapped standard deviations;
        - ``scale``: standard deviations times this have the size of the errors (1 is calibrated, above is too sure);
        - ``std_error_srcc``: rank correlation of standard deviation and absolute error (above 0: it knows its errors);
        - ``ence``: expected normalised calibration error over ten bins (Levi et al., 2019), 0 is calibrated;
        - ``bins``: ``(mean_std, rmse)`` of each bin;
        - ``coverage``: share of the opinions inside the interval of each level, ``intervals`` says of what kind;
        - ``risk``: ``(kept share, rmse, rmse if the largest errors were dropped)``, the most certain pictures first;
        - ``aurc``, ``aurc_best``: means of the two last over the kept shares; ``rmse`` is what chance would give.
    """
    x, s, y = (np.asarray(values, float) for values in (scores, stds, opinions))
    known = np.isfinite(x) & np.isfinite(s) & np.isfinite(y)
    if known.sum() < MIN_PICTURES:
        return {"reason": f"{known.sum()} pictures with a score and a standard deviation; {MIN_PICTURES} are needed"}
    x, s, y = x[known], s[known], y[known]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"reason": "scores or labels are constant"}
    if not s.any():
        return {"reason": "every standard deviation is 0"}
    slope, offset = np.polyfit(x, y, 1)
    errors = slope * x + offset - y
    mapped_std = abs(slope) * s
    rows = None
    if probabilities is not None:
        kept = [row for row, use in zip(probabilities, known, strict=True) if use]
        rows = None if any(row is None for row in kept) else np.asarray(kept, float)
    risk = _risk(s, errors)
    bins = _bin(mapped_std, errors)
    return {
        "n": len(x),
        "rmse": _rms(errors),
        "mean_std": _rms(mapped_std),
        "scale": _rms(errors) / _rms(mapped_std),
        "std_error_srcc": math.nan if np.ptp(s) == 0 else rank_correlation(s, np.abs(errors)),
        "ence": float(np.mean([abs(rmse - std) / std for std, rmse in bins if std > 0])),
        "bins": bins,
        "coverage": {f"{level:g}": _coverage(x, s, y, slope, offset, rows, level) for level in LEVELS},
        "intervals": "normal" if rows is None else "distribution",
        "risk": risk,
        "aurc": float(np.mean([point[1] for point in risk])),
        "aurc_best": float(np.mean([point[2] for point in risk])),
    }


def _coverage(
    x: NDArray[Any],
    s: NDArray[Any],
    y: NDArray[Any],
    slope: float,
    offset: float,
    rows: NDArray[Any] | None,
    level: float,
) -> float:
    if rows is None:
        z = NormalDist().inv_cdf((1 + level) / 2)
        low, high = x - z * s, x + z * s
    else:
        low, high = (end.numpy() for end in ScoreDistribution(torch.from_numpy(rows)).interval(level))
    ends = np.sort(np.stack([slope * low + offset, slope * high + offset]), axis=0)
    return float(((y >= ends[0] - 1e-9) & (y <= ends[1] + 1e-9)).mean())


def _bin(stds: NDArray[Any], errors: NDArray[Any]) -> list[tuple[float, float]]:
    """Bins of equal count by standard deviation, at least five pictures each."""
    parts = np.array_split(np.argsort(stds, kind="stable"), min(_BINS, len(stds) // 5))
    return [(_rms(stds[part]), _rms(errors[part])) for part in parts]


def _risk(stds: NDArray[Any], errors: NDArray[Any]) -> list[tuple[float, float, float]]:
    by_std, by_error = np.argsort(stds, kind="stable"), np.argsort(np.abs(errors), kind="stable")
    counts = [max(1, round(share * len(stds))) for share in _KEPT]
    return [
        (share, _rms(errors[by_std[:n]]), _rms(errors[by_error[:n]])) for share, n in zip(_KEPT, counts, strict=True)
    ]


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(values**2)))
