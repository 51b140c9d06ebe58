"""Numbers of agreement between scores and opinions, with intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from vqr1_metric.evaluation.uncertainty import find_units, intervals
from vqr1_metric.functional.agreement import plcc, srcc

#: Fewer pictures than this give no correlation worth the name.
MIN_PICTURES = 4
#: Fewer pictures than this are too few for a map of four or five parameters: it would fit whatever there is.
MIN_PICTURES_FOR_MAP = 10
#: A scene with fewer versions has no order to get right.
MIN_VERSIONS = 3

#: Statistics in the order of tables, and what they are.
STATISTICS = {
    "srcc": "Spearman rank correlation",
    "plcc": "Pearson correlation of the scores as they are",
    "plcc_4": "Pearson correlation after the 4-parameter logistic map",
    "plcc_5": "Pearson correlation after the 5-parameter logistic map",
    "krcc": "Kendall rank correlation, tau-b",
    "rmse_4": "root mean square error after the 4-parameter map, in the labels' units",
    "rmse_5": "root mean square error after the 5-parameter map, in the labels' units",
    "pairwise": "share of pairs of different opinion that the scores order rightly, a tie counting half",
    "scene_srcc": "mean of the rank correlations within each scene",
}


@dataclass(frozen=True)
class Agreement:
    """Agreement of one scorer with the opinions on one data set.

    Args:
        n: pictures that had a score and an opinion.
        left_out: pictures without a score.
        values: a value for each of ``STATISTICS``; NaN where it is undefined.
        intervals: ``(low, high)`` for each of them.
        reasons: why a value is NaN.
        scenes: scenes that entered ``scene_srcc``.
        level: probability of the intervals.
        resamples, seed: of the bootstrap.
        resampled: what intervals take as independent: ``"pictures"``, whole ``"scenes"`` or ``"groups"``.
    """

    n: int
    left_out: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    reasons: dict[str, str] = field(default_factory=dict)
    scenes: int = 0
    level: float = 0.95
    resamples: int = 1000
    seed: int = 0
    resampled: str = "pictures"


def agreement(
    scores: ArrayLike,
    opinions: ArrayLike,
    scenes: Sequence[str | None] | None = None,
    *,
    groups: Sequence[str | None] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    only: Sequence[str] = tuple(STATISTICS),
) -> Agreement:
    """Statistics of ``STATISTICS`` with their intervals, see :mod:`~vqr1_metric.evaluation.uncertainty`.

    The maps are fitted once, to the full sample; the intervals of what comes after them leave that fit as it is.

    Args:
        scores: shape ``(N,)``, higher meaning better; NaN where there is none, which leaves the picture out.
        opinions: shape ``(N,)``, higher meaning better, any units.
        scenes: what each picture shows; with at least two versions a scene on average, and two scenes, intervals are
            about other scenes, since versions of one scene are not independent.
        groups: pictures that are not independent, in place of scenes.
        level: probability of the intervals.
        resamples: of the bootstrap, for many pictures; 0 computes no intervals.
        seed: of the resampling.
        only: statistics that are computed; the others are NaN.
    """
    scores, opinions = np.asarray(scores, float), np.asarray(opinions, float)
    if scores.ndim != 1 or scores.shape != opinions.shape:
        raise ValueError(f"Expected two vectors of one length, but got shapes {scores.shape} and {opinions.shape}.")
    known = np.isfinite(scores) & np.isfinite(opinions)
    x, y = scores[known], opinions[known]
    kept = None if scenes is None else [scene for scene, use in zip(scenes, known, strict=True) if use]
    codes = None if kept is None else scene_codes(kept)
    values, reasons = point_statistics(x, y, codes, None, only)
    units = find_units(len(x), independent(kept, groups, known))
    found = dict.fromkeys(STATISTICS, (math.nan, math.nan))
    if resamples and len(x) >= MIN_PICTURES:
        maps = {name: fit(x, y, name) for name in CURVES} if set(only) - {"srcc", "plcc", "krcc", "pairwise"} else {}

        def statistic(i: NDArray[Any]) -> dict[str, float]:
            part = None if codes is None else codes[i]
            drawn = point_statistics(x[i], y[i], part, maps, only)[0]
            return {name: drawn[name] for name in only}

        n, r = len(x), values["srcc"]
        # Standard errors for independent pictures: Bonett and Wright, 2000, for ranks; Fisher, 1921.
        least = {"srcc": math.sqrt((1 + r * r / 2) / (n - 3)), "plcc": 1 / math.sqrt(n - 3)}
        found |= intervals(statistic, units, level=level, resamples=resamples, seed=seed, scales=_SCALES, least=least)
    scene_count = 0 if codes is None else len(_scene_correlations(x, y, codes))
    resampled = "pictures" if len(units) == len(x) else "scenes" if groups is None else "groups"
    return Agreement(
        len(x), int((~known).sum()), values, found, reasons, scene_count, level, resamples, seed, resampled
    )


#: Scales on which statistics are nearly normal; see :func:`vqr1_metric.evaluation.uncertainty.intervals`.
_SCALES = {
    **dict.fromkeys(("srcc", "plcc", "plcc_4", "plcc_5", "krcc", "scene_srcc"), "correlation"),
    **dict.fromkeys(("rmse_4", "rmse_5"), "positive"),
    "pairwise": "share",
}


def independent(
    scenes: Sequence[str | None] | None, groups: Sequence[str | None] | None = None, known: NDArray[Any] | None = None
) -> list[str | None] | None:
    """What is drawn at random: groups where they are given, scenes of two or more versions, else None for pictures."""
    if groups is not None:
        return [g for g, use in zip(groups, [True] * len(groups) if known is None else known, strict=True) if use]
    if scenes is None or not all(scenes) or len(scenes) < 2 * len(set(scenes)):
        return None
    return list(scenes)


def point_statistics(
    x: NDArray[Any],
    y: NDArray[Any],
    groups: NDArray[Any] | None = None,
    maps: dict[str, Map | None] | None = None,
    only: Sequence[str] = tuple(STATISTICS),
) -> tuple[dict[str, float], dict[str, str]]:
    """``(values, reasons)`` of ``STATISTICS`` for finite scores ``x`` and opinions ``y``.

    Args:
        groups: number of each picture's scene, -1 for none.
        maps: fitted maps to use; None fits them to these pictures. The bootstrap keeps those of the full sample: a fit
            for each resample costs a hundred times as much and changes the intervals little.
        only: others are left NaN.
    """
    values = dict.fromkeys(STATISTICS, math.nan)
    reason = undefined(x, y)
    if reason is not None:
        return values, dict.fromkeys(STATISTICS, reason)
    reasons: dict[str, str] = {}
    values["srcc"] = rank_correlation(x, y)
    values["plcc"] = correlation(x, y)
    if {"krcc", "pairwise"} & set(only):
        # The method decides on the p value only, and the exact one is slow.
        values["krcc"] = float(stats.kendalltau(x, y, method="asymptotic").statistic)
        values["pairwise"] = _pairwise(values["krcc"], x, y)
    for name in CURVES if {f"plcc_{n}" for n in CURVES} & set(only) else ():
        curve = fit(x, y, name) if maps is None else maps[name]
        if curve is None:
            few = len(x) < MIN_PICTURES_FOR_MAP
            why = f"a map needs at least {MIN_PICTURES_FOR_MAP} pictures" if few else "the map could not be fitted"
            reasons[f"plcc_{name}"] = reasons[f"rmse_{name}"] = why
            continue
        mapped = curve(x)
        values[f"rmse_{name}"] = float(np.sqrt(np.mean((mapped - y) ** 2)))
        if np.ptp(mapped) > 1e-12 * max(1.0, float(np.abs(mapped).max())):
            values[f"plcc_{name}"] = correlation(mapped, y)
        else:
            reasons[f"plcc_{name}"] = "the fitted map is constant"
    per_scene = [] if groups is None or "scene_srcc" not in only else _scene_correlations(x, y, groups)
    if per_scene:
        values["scene_srcc"] = float(np.mean(per_scene))
    else:
        told = "the labels name no scenes" if groups is None else f"no scene has {MIN_VERSIONS} versions that differ"
        reasons["scene_srcc"] = told
    return values, reasons


def rank_correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """SRCC of arrays, see :func:`vqr1_metric.functional.agreement.srcc`."""
    return srcc(torch.from_numpy(np.ascontiguousarray(x, float)), torch.from_numpy(np.ascontiguousarray(y, float)))


def correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """PLCC of arrays, see :func:`vqr1_metric.functional.agreement.plcc`."""
    return plcc(torch.from_numpy(np.ascontiguousarray(x, float)), torch.from_numpy(np.ascontiguousarray(y, float)))


def undefined(x: NDArray[Any], y: NDArray[Any]) -> str | None:
    """Why a correlation of these is undefined, None if it is not."""
    if len(x) < MIN_PICTURES:
        return f"{len(x)} pictures with a score are too few: at least {MIN_PICTURES} are needed"
    if np.ptp(x) == 0:
        return f"every picture has the same score, {x[0]:g}: a correlation is undefined"
    if np.ptp(y) == 0:
        return f"every picture has the same label, {abs(y[0]):g}: a correlation is undefined"
    return None


def logistic_4(x: NDArray[Any], top: float, bottom: float, middle: float, width: float) -> NDArray[Any]:
    """``(top - bottom) / (1 + exp(-(x - middle) / |width|)) + bottom`` (VQEG, FR-TV phase I report, 2000)."""
    z = np.clip((x - middle) / max(abs(width), 1e-9), -700, 700)
    return bottom + (top - bottom) / (1 + np.exp(-z))


def logistic_5(
    x: NDArray[Any], height: float, slope: float, middle: float, linear: float, offset: float
) -> NDArray[Any]:
    """``height (1/2 - 1/(1 + exp(slope (x - middle)))) + linear x + offset`` (Sheikh, Sabir and Bovik, 2006)."""
    z = np.clip(slope * (x - middle), -700, 700)
    return height * (0.5 - 1 / (1 + np.exp(z))) + linear * x + offset


#: Maps from scores to opinions, by the number of their parameters.
CURVES: dict[str, Callable[..., NDArray[Any]]] = {"4": logistic_4, "5": logistic_5}
Map = Callable[[ArrayLike], NDArray[Any]]


def fit(x: ArrayLike, y: ArrayLike, parameters: str = "4") -> Map | None:
    """The least-squares map of scores to opinions as a function, None where it cannot be fitted or pictures are few.

    Fitted in standard units, where every parameter is of the order of one. The 5-parameter map starts from the line of
    least squares, which it contains, and so cannot end worse than that line.

    Args:
        x, y: shape ``(N,)``, finite.
        parameters: ``"4"`` or ``"5"``, see :data:`CURVES`.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    curve = CURVES[parameters]
    if len(x) < MIN_PICTURES_FOR_MAP or np.ptp(x) == 0:
        return None
    mean_x, scale_x, mean_y, scale_y = x.mean(), x.std(), y.mean(), y.std() or 1.0
    u, v = (x - mean_x) / scale_x, (y - mean_y) / scale_y
    slope, intercept = np.polyfit(u, v, 1)
    sign = 1.0 if slope >= 0 else -1.0
    if parameters == "4":
        starts = [[sign * v.max(), sign * v.min(), 0.0, 0.5], [sign * 3.0, -sign * 3.0, 0.0, 2.0]]
    else:
        starts = [[0.0, 1.0, 0.0, slope, intercept]]
        starts += [[sign * np.ptp(v), steepness, 0.0, 0.1 * slope, intercept] for steepness in (1.0, 4.0)]
    best, best_cost = None, math.inf
    for start in starts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = optimize.least_squares(lambda p: curve(u, *p) - v, start, max_nfev=500)
            except (ValueError, FloatingPointError):
                continue
        if np.isfinite(result.cost) and result.cost < best_cost:
            best, best_cost = result.x, result.cost
    if best is None:
        return None
    return lambda values: curve((np.asarray(values, float) - mean_x) / scale_x, *best) * scale_y + mean_y


def _pairwise(tau: float, x: NDArray[Any], y: NDArray[Any]) -> float:
    """Of tau-b: concordant minus discordant pairs are tau sqrt(pairs untied in x · pairs untied in y)."""
    pairs = len(x) * (len(x) - 1) / 2
    untied_x, untied_y = pairs - _tied_pairs(x), pairs - _tied_pairs(y)
    return 0.5 + 0.5 * tau * math.sqrt(untied_x * untied_y) / untied_y


def _tied_pairs(values: NDArray[Any]) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1) / 2).sum())


def scene_codes(scenes: Sequence[str | None]) -> NDArray[Any] | None:
    """A number for each scene, -1 for a picture without; None where no picture has one."""
    names = sorted({scene for scene in scenes if scene})
    if not names:
        return None
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(scene, -1) if scene else -1 for scene in scenes])


def _scene_correlations(x: NDArray[Any], y: NDArray[Any], groups: NDArray[Any]) -> list[float]:
    """Rank correlation of each scene with enough versions. Constant scores within a scene count as no correlation."""
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    found = []
    for members in np.split(order, bounds):
        if len(members) < MIN_VERSIONS or groups[members[0]] < 0 or np.ptp(y[members]) == 0:
            continue
        # Scores that order nothing must not drop out, or a scorer could gain by refusing to judge.
        constant = np.ptp(x[members]) == 0
        found.append(0.0 if constant else rank_correlation(x[members], y[members]))
    return found
