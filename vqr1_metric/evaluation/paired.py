"""Two methods on the same scenes: which is better, how surely, and how many scenes would settle it?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from vqr1_metric.evaluation.agreement import percentile_interval, resample
from vqr1_metric.evaluation.significance import two_sided
from vqr1_metric.ratings import Problem, RatingError
from vqr1_metric.ratings.lookup import image_files

#: The sample size asked for finds a real difference of the size seen this often.
POWER = 0.8
_LARGEST = 10_000_000


@dataclass(frozen=True)
class PairedDifference:
    """Scores ``after`` minus scores ``before``, scene by scene.

    Args:
        n: scenes with both scores.
        left_out: scenes without one of them.
        mean: mean difference, in score units.
        interval: percentile bootstrap interval of the mean, scenes resampled.
        p_bootstrap: two-sided, of "no difference".
        p_wilcoxon: two-sided Wilcoxon signed-rank test; NaN if all differences are 0.
        better, worse, equal: scenes in which the score rose, fell, stayed.
        win_probability: mean over scenes of the probability that a draw from the score distribution of ``after``
            exceeds one of ``before``; NaN where there are no distributions.
        effect: mean difference over its standard deviation (Cohen's d of paired data).
        needed: scenes at which a two-sided t test finds a true difference of the size seen with a probability of 80%;
            None where that is no number (no difference seen, or no spread).
        verdict: ``after``, ``before`` or ``open``: whose mean is higher, open while the interval holds 0.
        level: probability of the interval.
        reason: why there is no answer, or None.
    """

    n: int
    left_out: int
    mean: float
    interval: tuple[float, float]
    p_bootstrap: float
    p_wilcoxon: float
    better: int
    worse: int
    equal: int
    win_probability: float
    effect: float
    needed: int | None
    verdict: str
    level: float = 0.95
    reason: str | None = None


def compare_paired(
    before: ArrayLike,
    after: ArrayLike,
    wins: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two sets of scores of the same scenes.

    Args:
        before, after: shape ``(N,)``, higher meaning better; NaN in either leaves the scene out.
        wins: probability for each scene that ``after`` looks better, see
            :func:`~vqr1_metric.functional.thurstone.win_probability`.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"Expected two vectors of one length, but got shapes {before.shape} and {after.shape}.")
    known = np.isfinite(before) & np.isfinite(after)
    gaps, n = (after - before)[known], int(known.sum())
    chances = np.full(len(known), math.nan) if wins is None else np.asarray(wins, float)
    win = float(np.mean(chances[known])) if n else math.nan
    counts = int((gaps > 0).sum()), int((gaps < 0).sum()), int((gaps == 0).sum())
    left_out = len(known) - n
    if n < 2:
        nan, told = math.nan, f"{n} scenes with two scores: at least 2 are needed"
        mean = float(gaps[0]) if n else nan
        return PairedDifference(n, left_out, mean, (nan, nan), nan, nan, *counts, win, nan, None, "open", level, told)
    draws = [gaps[i].mean() for i in resample(n, resamples, seed)]
    interval = percentile_interval(draws, level)
    spread = float(gaps.std(ddof=1))
    effect = float(gaps.mean()) / spread if spread > 0 else math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few scenes with ties: SciPy says that its normal approximation is rough
        p_wilcoxon = float(stats.wilcoxon(gaps[gaps != 0]).pvalue) if gaps.any() else math.nan
    verdict = "after" if interval[0] > 0 else "before" if interval[1] < 0 else "open"
    return PairedDifference(
        n,
        left_out,
        float(gaps.mean()),
        interval,
        two_sided(draws),
        p_wilcoxon,
        *counts,
        win,
        effect,
        scenes_needed(effect, 1 - level),
        verdict,
        level,
    )


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
        return math.ceil(guess)
    if missing(2) <= 0:
        return 2
    return math.ceil(optimize.brentq(missing, 2, guess + 20, xtol=1e-6) - 1e-6)


def match_folders(before: Path, after: Path) -> tuple[list[tuple[str, Path, Path]], list[Problem]]:
    """Pictures of the same scene in two folders, ``(scene, before, after)``, and those without a partner.

    A scene is the path below the folder without its suffix, in any case: ``a/1.png`` and ``a/1.jpg`` belong together.

    Raises:
        RatingError: if no scene is in both.
    """
    tables = []
    problems = []
    for folder in (before, after):
        if not folder.is_dir():
            raise RatingError(f"Expected a folder of pictures, but {str(folder)!r} is none.")
        table: dict[str, Path] = {}
        for path in image_files(folder):
            scene = path.relative_to(folder).with_suffix("").as_posix().lower()
            if scene in table:
                problems.append(Problem("duplicate", str(path), "another picture has its name: left out"))
            else:
                table[scene] = path
        tables.append(table)
    first, second = tables
    for table, other, folder in ((first, second, after), (second, first, before)):
        lonely = [path for scene, path in table.items() if scene not in other]
        problems += [Problem("missing picture", str(path), f"no partner in {folder}: left out") for path in lonely]
    shared = [(path.relative_to(before).as_posix(), path, second[s]) for s, path in first.items() if s in second]
    if not shared:
        raise RatingError(
            f"Expected pictures of the same name in {str(before)!r} ({len(first)} pictures) and {str(after)!r} "
            f"({len(second)} pictures), but no name is in both."
        )
    return shared, problems


def win_probabilities(before: Sequence[dict | None], after: Sequence[dict | None]) -> list[float]:
    """Of each scene, from the distributions of two rows of scores; NaN where one has none."""
    found = []
    for first, second in zip(before, after, strict=True):
        a, b = (second or {}).get("probabilities"), (first or {}).get("probabilities")
        if a is None or b is None:
            found.append(math.nan)
            continue
        low = np.cumsum(b) - 0.5 * np.asarray(b)
        found.append(float(np.clip(np.dot(a, low), 0, 1)))
    return found
