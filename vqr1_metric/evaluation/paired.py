"""Methods on the same scenes: which is better, how surely, and how many scenes would settle it?

A verdict needs two things at once: an interval of the mean difference (Student's and Hall's, see
:func:`~vqr1_metric.functional.intervals.mean_interval`) without 0, and, where there are few scenes, an exact test that
counts out all ways to flip the signs of the differences. ``python -m benchmarks.verdicts`` measures how often that is
wrong; its table stands in docs/evaluation.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from vqr1_metric.evaluation.significance import holm
from vqr1_metric.evaluation.uncertainty import find_units
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.functional.intervals import hall_statistic, interval_of_moments
from vqr1_metric.functional.thurstone import win_probability

#: The sample size asked for finds a real difference of the size seen this often.
POWER = 0.8
#: Up to so many differences all flips of their signs are counted out, 2 to the power of this.
EXACT = 14
_LARGEST = 10_000_000


@dataclass(frozen=True)
class PairedDifference:
    """Scores ``after`` minus scores ``before``, scene by scene.

    Args:
        n: scenes with both scores; with groups, groups of them.
        left_out: scenes without one of the scores.
        mean: mean difference, in score units; with groups the mean over groups of their means.
        interval: of the mean.
        p: two-sided, of "no difference"; no smaller than each of the tests behind it gives.
        better, worse, equal: scenes (groups) in which the score rose, fell, stayed.
        win_probability: mean over scenes (groups) of the probability that a draw from the score distribution of
            ``after`` exceeds one of ``before``; NaN where there are no distributions.
        effect: mean difference over its standard deviation (Cohen's d of paired data).
        needed: scenes (groups) at which a two-sided t test finds a true difference of the size seen with a probability
            of 80%; None where that is no number (no difference seen, or no spread).
        verdict: ``after``, ``before`` or ``open``: whose mean is higher, open while chance would give as much.
        level: probability of the interval; a verdict needs ``p`` of at most 1 minus this.
        reason: why no test could tell, or None.
        images: scenes that the groups hold; ``n`` without groups.
        p_holm: ``p`` corrected for the number of comparisons; ``p`` where there is one.
    """

    n: int
    left_out: int
    mean: float
    interval: tuple[float, float]
    p: float
    better: int
    worse: int
    equal: int
    win_probability: float
    effect: float
    needed: int | None
    verdict: str
    level: float = 0.95
    reason: str | None = None
    images: int = 0
    p_holm: float = math.nan


def compare_paired(
    before: ArrayLike,
    after: ArrayLike,
    wins: ArrayLike | None = None,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int | None = None,
    seed: int | None = None,
) -> PairedDifference:
    """Compare two sets of scores of the same scenes.

    Args:
        before, after: shape ``(N,)``, higher meaning better; NaN in either leaves the scene out.
        wins: probability for each scene that ``after`` looks better, see
            :func:`~vqr1_metric.functional.thurstone.win_probability`.
        groups: for each scene the group (clip, data set) whose members are not independent; each group counts once.
        level: probability of the interval.
        resamples, seed: of version 0.1.0, which resampled; without effect.
    """
    first, second = np.asarray(before, float), np.asarray(after, float)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"Expected two vectors of one length, but got shapes {first.shape} and {second.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected a confidence level in (0, 1), such as 0.95, but got {level!r}.")
    chances = np.full(len(first), math.nan) if wins is None else np.asarray(wins, float)
    known = np.isfinite(first) & np.isfinite(second)
    named = None if groups is None else [g for g, use in zip(groups, known, strict=True) if use]
    images = int(known.sum())
    units = find_units(images, named)
    if named and len(set(named)) == 1:
        units = [np.arange(images)]
    gaps = np.array([(second - first)[known][unit].mean() for unit in units])
    win = float(np.mean([chances[known][unit].mean() for unit in units])) if images else math.nan
    # Means of equal numbers differ in the last digits.
    gaps[np.abs(gaps) <= 1e-12 * (1 + np.abs(second[known]).max(initial=0))] = 0
    n, alpha = len(gaps), 1 - level
    counts = int((gaps > 0).sum()), int((gaps < 0).sum()), int((gaps == 0).sum())
    mean = float(gaps.mean()) if n else math.nan
    interval, p = _interval_and_p(gaps, level)
    spread = float(gaps.std(ddof=1)) if n > 1 else math.nan
    effect = mean / spread if spread > 1e-12 * abs(mean) else math.nan
    needed = scenes_needed(effect, alpha)
    reason = _too_few(counts, n, alpha, "scenes" if groups is None else "groups")
    significant = p <= alpha and not interval[0] <= 0 <= interval[1]
    verdict = "open" if not significant else "after" if mean > 0 else "before"
    left_out = len(known) - images
    return PairedDifference(
        n, left_out, mean, interval, p, *counts, win, effect, needed, verdict, level, reason, images, p
    )


def _too_few(counts: tuple[int, int, int], n: int, alpha: float, units: str) -> str | None:
    """With k differences no exact test gives less than 2 / 2**k: too few of them and nothing can be said."""
    least = math.ceil(1 + math.log2(1 / alpha) - 1e-9)
    if n < least:
        return f"too few {units} to say: {n}, and no test could tell with fewer than {least}"
    if n - counts[2] < least:
        return f"too few {units} differ to say: {n - counts[2]} of {n}, and no test could tell with fewer than {least}"
    return None


def _interval_and_p(gaps: NDArray[np.float64], level: float) -> tuple[tuple[float, float], float]:
    n = len(gaps)
    if n < 2:
        return (math.nan, math.nan), math.nan
    mean, spread, third = float(gaps.mean()), float(gaps.std()), float(((gaps - gaps.mean()) ** 3).mean())
    interval = interval_of_moments(n, mean, spread, third, level)
    p_values = [sign_flip_p(gaps)] if n <= EXACT else []
    if spread > 1e-12 * max(1.0, abs(mean)):
        t = mean / spread * math.sqrt(n - 1)
        p_values += [float(2 * stats.t.sf(abs(s), n - 1)) for s in (t, hall_statistic(n, mean, spread, third))]
    return interval, max(p_values or [1.0 if mean == 0 else 2.0 ** (1 - n)])


def sign_flip_p(gaps: NDArray[np.float64]) -> float:
    """Two-sided p of "each difference is as likely one way as the other": all flips of their signs counted out."""
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return 1.0
    sums = np.zeros(1)
    for gap in gaps[1:]:  # the first sign may stay: flipping all changes no size
        sums = np.concatenate([sums + gap, sums - gap])
    sums += gaps[0]
    return float(np.mean(np.abs(sums) >= abs(gaps.sum()) * (1 - 1e-9)))


def scenes_needed(effect: float, alpha: float = 0.05, power: float = POWER) -> int | None:
    """Fewest scenes at which a two-sided paired t test at level ``alpha`` finds a true effect with this power.

    Args:
        effect: mean difference over its standard deviation.

    Returns:
        From 2 on; None for an effect of 0, or one so small that no sample settles it.
    """
    if not math.isfinite(effect) or effect == 0:
        return None

    def missing(n: float) -> float:
        # The square of the noncentral t is a noncentral F, which SciPy computes well at every size.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy before 1.14 warns on its way to the right figure
            return power - float(stats.ncf.sf(stats.f.isf(alpha, 1, n - 1), 1, n - 1, effect**2 * n))

    # The normal approximation says where to look, and is exact for all purposes far out.
    guess = ((stats.norm.isf(alpha / 2) + stats.norm.isf(1 - power)) / abs(effect)) ** 2
    if guess > _LARGEST:
        return None
    if guess > 1000:
        return math.ceil(float(guess))
    if missing(2) <= 0:
        return 2
    return math.ceil(float(optimize.brentq(missing, 2, guess + 20, xtol=1e-6)) - 1e-6)


@dataclass(frozen=True)
class MethodOrder:
    """Several methods on the same scenes.

    Args:
        names: best mean first.
        means: mean score of each, over scenes that all have (over groups, with groups).
        letters: for each method the groups of methods it does not differ from: two that share no letter differ.
        pairs: ``(better, worse, difference)`` of every two methods, the better mean as ``after``; verdicts by
            ``p_holm``.
        left_out: scenes that lack a score of one of the methods.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    letters: tuple[str, ...]
    pairs: tuple[tuple[str, str, PairedDifference], ...]
    left_out: int = field(default=0)


def compare_methods(
    scores: Mapping[str, ArrayLike], *, groups: Sequence[str] | None = None, level: float = 0.95
) -> MethodOrder:
    """Order methods by their mean score, with every two compared and corrected for their number (Holm, 1979).

    Args:
        scores: name -> scores of the same scenes, shape ``(N,)``, NaN where there is none.
        groups, level: as for :func:`compare_paired`.
    """
    table = np.array([np.asarray(values, float) for values in scores.values()])
    known = np.isfinite(table).all(axis=0)
    kept = table[:, known]
    named = None if groups is None else [g for g, use in zip(groups, known, strict=True) if use]
    units = find_units(kept.shape[1], named)
    means = [float(np.mean([row[unit].mean() for unit in units])) if units else math.nan for row in kept]
    names = list(scores)
    order = sorted(range(len(names)), key=lambda i: (-means[i] if math.isfinite(means[i]) else math.inf, i))
    found = [
        (names[a], names[b], compare_paired(kept[b], kept[a], groups=named, level=level))
        for a, b in combinations(order, 2)
    ]
    corrected = holm([pair.p for _, _, pair in found])
    pairs = [
        (a, b, replace(d, p_holm=p, verdict=d.verdict if p <= 1 - level else "open"))
        for (a, b, d), p in zip(found, corrected, strict=True)
    ]
    differ = {(a, b) for a, b, pair in pairs if pair.verdict != "open"}
    ordered = [names[i] for i in order]
    return MethodOrder(
        tuple(ordered), tuple(means[i] for i in order), _letters(ordered, differ), tuple(pairs), int((~known).sum())
    )


def _letters(ordered: Sequence[str], differ: set[tuple[str, str]]) -> tuple[str, ...]:
    """Letters of the largest groups within which no two methods differ (Piepho, 2004: insert and absorb)."""
    groups = [set(ordered)]
    for a, b in sorted(differ, key=lambda pair: (ordered.index(pair[0]), ordered.index(pair[1]))):
        split = [part for group in groups for part in ([group - {a}, group - {b}] if {a, b} <= group else [group])]
        groups = [
            g for i, g in enumerate(split) if g and not any(g < h or (g == h and i > j) for j, h in enumerate(split))
        ]
    groups.sort(key=lambda group: sorted(ordered.index(name) for name in group))
    return tuple("".join(chr(ord("a") + i % 26) for i, group in enumerate(groups) if name in group) for name in ordered)


def win_probabilities(
    before: Sequence[Mapping[str, object] | None], after: Sequence[Mapping[str, object] | None]
) -> list[float]:
    """Of each scene, from the distributions of two rows of scores; NaN where one has none."""
    found = []
    for first, second in zip(before, after, strict=True):
        a, b = (second or {}).get("probabilities"), (first or {}).get("probabilities")
        if a is None or b is None:
            found.append(math.nan)
            continue
        ours, theirs = (ScoreDistribution(torch.tensor(p, dtype=torch.float64)) for p in (a, b))
        found.append(float(win_probability(ours, theirs)))
    return found


def __getattr__(name: str) -> object:
    if name == "match_folders":
        raise ImportError(f"{__name__}.{name} of version 0.1.0 is now vqr1_metric.evaluation.pairing.pair_names.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
