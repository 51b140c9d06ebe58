"""Numbers of agreement between scores and opinions, with bootstrap intervals. SciPy computes the correlations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

#: Fewer pictures than this give no correlation worth the name.
MIN_PICTURES = 4
#: Fewer pictures than this are too few for a map of four or five parameters: it would fit whatever there is.
MIN_PICTURES_FOR_MAP = 10
#: A scene with fewer versions has no order to get right.
MIN_VERSIONS = 3
#: An interval is only given if at least this share of the resamples had a value.
_MIN_RESAMPLES = 0.9

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
        resampled: what was drawn: ``"pictures"``, or ``"scenes"`` with all their versions.
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
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """All statistics of ``STATISTICS`` with percentile bootstrap intervals.

    The maps are fitted once, to the full sample; the intervals of what comes after them leave that fit as it is.

    Args:
        scores: shape ``(N,)``, higher meaning better; NaN where there is none, which leaves the picture out.
        opinions: shape ``(N,)``, higher meaning better, any units.
        scenes: what each picture shows; with at least two versions a scene on average, scenes are resampled whole,
            since versions of one scene are not independent.
        level: probability of the intervals.
        resamples: 0 computes no intervals.
        seed: of the resampling.
    """
    scores, opinions = np.asarray(scores, float), np.asarray(opinions, float)
    if scores.ndim != 1 or scores.shape != opinions.shape:
        raise ValueError(f"Expected two vectors of one length, but got shapes {scores.shape} and {opinions.shape}.")
    known = np.isfinite(scores) & np.isfinite(opinions)
    x, y = scores[known], opinions[known]
    groups = None
    if scenes is not None:
        kept = [scene for scene, use in zip(scenes, known, strict=True) if use]
        groups = scene_codes(kept)
    values, reasons = point_statistics(x, y, groups)
    by_scene = groups is not None and bool((groups >= 0).all()) and len(groups) >= 2 * len(np.unique(groups))
    intervals = dict.fromkeys(STATISTICS, (math.nan, math.nan))
    if resamples and len(x) >= MIN_PICTURES:
        maps = {name: fit(x, y, name) for name in CURVES}
        draws = resample(len(x), resamples, seed, groups if by_scene else None)
        table = [point_statistics(x[i], y[i], None if groups is None else groups[i], maps)[0] for i in draws]
        for name in STATISTICS:
            intervals[name] = percentile_interval([row[name] for row in table], level)
    scene_count = 0 if groups is None else len(_scene_correlations(x, y, groups))
    return Agreement(
        len(x),
        int((~known).sum()),
        values,
        intervals,
        reasons,
        scene_count,
        level,
        resamples,
        seed,
        "scenes" if by_scene else "pictures",
    )


def point_statistics(
    x: NDArray, y: NDArray, groups: NDArray | None = None, maps: dict[str, Map | None] | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """``(values, reasons)`` of ``STATISTICS`` for finite scores ``x`` and opinions ``y``.

    Args:
        groups: number of each picture's scene, -1 for none.
        maps: fitted maps to use; None fits them to these pictures. The bootstrap keeps those of the full sample: a fit
            for each resample costs a hundred times as much and changes the intervals little.
    """
    values = dict.fromkeys(STATISTICS, math.nan)
    reason = undefined(x, y)
    if reason is not None:
        return values, dict.fromkeys(STATISTICS, reason)
    reasons: dict[str, str] = {}
    values["srcc"] = float(stats.spearmanr(x, y).statistic)
    values["plcc"] = float(stats.pearsonr(x, y).statistic)
    # The method decides on the p value only, and the exact one is slow.
    values["krcc"] = float(stats.kendalltau(x, y, method="asymptotic").statistic)
    values["pairwise"] = _pairwise(values["krcc"], x, y)
    for name in CURVES:
        curve = fit(x, y, name) if maps is None else maps[name]
        if curve is None:
            few = len(x) < MIN_PICTURES_FOR_MAP
            why = f"a map needs at least {MIN_PICTURES_FOR_MAP} pictures" if few else "the map could not be fitted"
            reasons[f"plcc_{name}"] = reasons[f"rmse_{name}"] = why
            continue
        mapped = curve(x)
        values[f"rmse_{name}"] = float(np.sqrt(np.mean((mapped - y) ** 2)))
        if np.ptp(mapped) > 1e-12 * max(1.0, float(np.abs(mapped).max())):
            values[f"plcc_{name}"] = float(stats.pearsonr(mapped, y).statistic)
        else:
            reasons[f"plcc_{name}"] = "the fitted map is constant"
    per_scene = [] if groups is None else _scene_correlations(x, y, groups)
    if per_scene:
        values["scene_srcc"] = float(np.mean(per_scene))
    else:
        told = "the labels name no scenes" if groups is None else f"no scene has {MIN_VERSIONS} versions that differ"
        reasons["scene_srcc"] = told
    return values, reasons


def undefined(x: NDArray, y: NDArray) -> str | None:
    """Why a correlation of these is undefined, None if it is not."""
    if len(x) < MIN_PICTURES:
        return f"{len(x)} pictures with a score are too few: at least {MIN_PICTURES} are needed"
    if np.ptp(x) == 0:
        return f"every picture has the same score, {x[0]:g}: a correlation is undefined"
    if np.ptp(y) == 0:
        return f"every picture has the same label, {abs(y[0]):g}: a correlation is undefined"
    return None


def logistic_4(x: NDArray, top: float, bottom: float, middle: float, width: float) -> NDArray:
    """``(top - bottom) / (1 + exp(-(x - middle) / |width|)) + bottom`` (VQEG, FR-TV phase I report, 2000)."""
    z = np.clip((x - middle) / max(abs(width), 1e-9), -700, 700)
    return bottom + (top - bottom) / (1 + np.exp(-z))


def logistic_5(x: NDArray, height: float, slope: float, middle: float, linear: float, offset: float) -> NDArray:
    """``height (1/2 - 1/(1 + exp(slope (x - middle)))) + linear x + offset`` (Sheikh, Sabir and Bovik, 2006)."""
    z = np.clip(slope * (x - middle), -700, 700)
    return height * (0.5 - 1 / (1 + np.exp(z))) + linear * x + offset


#: Maps from scores to opinions, by the number of their parameters.
CURVES: dict[str, Callable[..., NDArray]] = {"4": logistic_4, "5": logistic_5}
Map = Callable[[ArrayLike], NDArray]


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


def _pairwise(tau: float, x: NDArray, y: NDArray) -> float:
    """Of tau-b: concordant minus discordant pairs are tau sqrt(pairs untied in x · pairs untied in y)."""
    pairs = len(x) * (len(x) - 1) / 2
    untied_x, untied_y = pairs - _tied_pairs(x), pairs - _tied_pairs(y)
    return 0.5 + 0.5 * tau * math.sqrt(untied_x * untied_y) / untied_y


def _tied_pairs(values: NDArray) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1) / 2).sum())


def scene_codes(scenes: Sequence[str | None]) -> NDArray | None:
    """A number for each scene, -1 for a picture without; None where no picture has one."""
    names = sorted({scene for scene in scenes if scene})
    if not names:
        return None
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(scene, -1) if scene else -1 for scene in scenes])


def _scene_correlations(x: NDArray, y: NDArray, groups: NDArray) -> list[float]:
    """Rank correlation of each scene with enough versions. Constant scores within a scene count as no correlation."""
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    found = []
    for members in np.split(order, bounds):
        if len(members) < MIN_VERSIONS or groups[members[0]] < 0 or np.ptp(y[members]) == 0:
            continue
        # Scores that order nothing must not drop out, or a scorer could gain by refusing to judge.
        constant = np.ptp(x[members]) == 0
        found.append(0.0 if constant else float(stats.spearmanr(x[members], y[members]).statistic))
    return found


def resample(n: int, resamples: int, seed: int, groups: NDArray | None = None) -> list[NDArray]:
    """Indices of bootstrap samples of ``n`` pictures; with ``groups`` whole groups are drawn."""
    random = np.random.default_rng(seed)
    if groups is None:
        return [random.integers(0, n, n) for _ in range(resamples)]
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = [random.integers(0, len(members), len(members)) for _ in range(resamples)]
    return [np.concatenate([members[group] for group in draw]) for draw in drawn]


def percentile_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Central interval of bootstrap values; NaN if more than a tenth of them is undefined."""
    table = np.asarray(values, float)
    finite = table[np.isfinite(table)]
    if not len(table) or len(finite) < _MIN_RESAMPLES * len(table):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
