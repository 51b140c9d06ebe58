"""``vqr1 calibrate`` and ``vqr1 reference``: what a model's intervals are worth, and what its scores mean."""

from __future__ import annotations

import bisect
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqr1_metric.evaluation.columns import Progress, no_progress
from vqr1_metric.evaluation.scoring import made_by, score_items
from vqr1_metric.functional.calibration import Calibration, temper
from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE, ScoreDistribution
from vqr1_metric.ratings import RatedImage, RatingError, RatingSet
from vqr1_metric.ratings.lookup import image_files
from vqr1_metric.scorer import QualityScorer

#: Fewer rated images say too little of how often an interval fails.
MIN_IMAGES = 50
_FOLDS = 5
#: Temperatures that are tried: from a tenth to ten thousand, where nearly nothing is left of a distribution.
_TEMPERATURES = np.geomspace(0.1, 1e4, 251)
_NAMES = ("model", "revision", "short_edge", "calibration")


def calibrate(
    scorer: QualityScorer,
    ratings: RatingSet,
    scale: tuple[float, float] | None = None,
    *,
    level: float = 0.95,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Fit a model's temperature to rated images.

    Args:
        scorer: the model.
        ratings: opinion scores of images.
        scale: worst and best score of the ratings' scale, which become 1 and 5; may be left out for scores within 1..5.
        level: probability of the intervals that shall hold the opinions.
        cache: keep the scores in this folder.
        progress: makes a progress bar.

    Returns:
        With the coverage that folds of images which the fit did not see have (whole scenes at a time).

    Raises:
        RatingError: too few images, or a scale that is not told.
    """
    with tempfile.TemporaryDirectory() as folder, progress(ratings.name, len(ratings)) as bar:
        rows = score_items(scorer, ratings.images, Path(cache or folder), ratings.short_edge, bar.update)
    opinions = on_score_scale(ratings, scale)
    known = [i for i, row in enumerate(rows) if row.get("probabilities") is not None]
    if len(known) < MIN_IMAGES:
        raise RatingError(f"Expected at least {MIN_IMAGES} rated images with a score, but got {len(known)}.")
    probabilities = np.array([rows[i]["probabilities"] for i in known])
    scenes = [ratings.images[i].scene or ratings.images[i].name for i in known]
    temperature, inside, before = fit_temperature(probabilities, opinions[known], scenes, level)
    made = made_by(scorer)
    identity = {key: value for key, value in made.items() if key not in _NAMES}
    return Calibration(temperature, level, len(known), inside, before, ratings.name, str(made["model"]), identity)


def on_score_scale(ratings: RatingSet, scale: tuple[float, float] | None = None) -> NDArray[np.float64]:
    """Opinions on 1 to 5, higher meaning better.

    Raises:
        RatingError: scores outside the scale, or outside 1 to 5 without one.
    """
    worst, best = scale or (MIN_SCORE, MAX_SCORE)
    if scale is None:
        _ = ratings.quality  # the direction must be settled
    mos = np.array([image.mos for image in ratings.images])
    if scale is None and ratings.lower_is_better:
        worst, best = best, worst
    low, high = min(worst, best), max(worst, best)
    if low == high or not len(mos) or mos.min() < low - 1e-9 or mos.max() > high + 1e-9:
        got = f"{mos.min():g} to {mos.max():g}" if len(mos) else "none"
        raise RatingError(
            f"Expected scores of {ratings.name!r} within {worst:g} to {best:g}, but got {got}: tell the worst and the "
            "best score of its scale, as scale=(0, 1) (--scale 0 1)."
        )
    found: NDArray[np.float64] = MIN_SCORE + (mos - worst) / (best - worst) * (MAX_SCORE - MIN_SCORE)
    return found


def fit_temperature(
    probabilities: NDArray[Any], opinions: NDArray[Any], groups: Sequence[str], level: float = 0.95
) -> tuple[float, float, float]:
    """The lowest temperature whose intervals hold a share ``level`` of opinions, as a split conformal quantile.

    Args:
        probabilities: shape ``(N, 401)``.
        opinions: shape ``(N,)``, on 1 to 5.
        groups: of each image; whole groups are held out.
        level: probability of the intervals.

    Returns:
        ``(temperature, coverage of held-out folds, coverage at temperature 1)``.

    Source: Lei et al., Distribution-free predictive inference for regression, 2018, over nested intervals (Gupta et
    al., 2022).
    """
    needed = _needed_temperature(probabilities, opinions, level)
    names = sorted(set(groups))
    random = np.random.default_rng(0)
    fold_of = dict(zip(names, random.permutation(len(names)) % _FOLDS, strict=True))
    folds = np.array([fold_of[name] for name in groups])
    inside = np.zeros(len(needed), bool)
    for fold in range(min(_FOLDS, len(names))):
        held_out = folds == fold
        if held_out.any() and not held_out.all():
            inside[held_out] = needed[held_out] <= _conformal(needed[~held_out], level)
    low, high = _ends(probabilities, 1.0, level)
    before = float(np.mean((opinions >= low - 1e-9) & (opinions <= high + 1e-9)))
    return _conformal(needed, level), float(inside.mean()), before


def _needed_temperature(probabilities: NDArray[Any], opinions: NDArray[Any], level: float) -> NDArray[Any]:
    """For each image the lowest temperature from which on its interval holds the opinion."""
    needed = np.full(len(opinions), _TEMPERATURES[0])
    for last, temperature in enumerate(_TEMPERATURES):
        low, high = _ends(probabilities, float(temperature), level)
        outside = (opinions < low - 1e-9) | (opinions > high + 1e-9)
        needed[outside] = _TEMPERATURES[min(last + 1, len(_TEMPERATURES) - 1)]
    return needed


def _ends(probabilities: NDArray[Any], temperature: float, level: float) -> tuple[NDArray[Any], NDArray[Any]]:
    low, high = ScoreDistribution(temper(torch.from_numpy(probabilities), temperature)).interval(level)
    return low.numpy(), high.numpy()


def _conformal(needed: NDArray[Any], level: float) -> float:
    rank = min(len(needed), math.ceil((len(needed) + 1) * level))
    return float(np.sort(needed)[rank - 1])


@dataclass(frozen=True)
class Reference:
    """Scores of a set of images, which say what a score means: better than so many percent of them.

    Args:
        name: of the set, such as ``photographs``.
        images: how many had a score.
        scores: at the percentiles 0, 1, ... 100, not falling.
        model: the model's name.
        identity: what the scores were made with.
    """

    name: str
    images: int
    scores: tuple[float, ...]
    model: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)

    def percentile(self, score: float) -> float:
        """Percent of the images with a lower score, those with the same counting half; NaN for NaN."""
        if math.isnan(score):
            return math.nan
        below, upto = (f(self.scores, score) for f in (bisect.bisect_left, bisect.bisect_right))
        if upto > below:  # on a percentile, or several
            return (below + upto - 1) / 2
        if below in (0, len(self.scores)):
            return 0.0 if below == 0 else 100.0
        low, high = self.scores[below - 1], self.scores[below]
        return below - 1 + (score - low) / (high - low)

    def write(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Reference:
        """From a file that :meth:`write` made, or the folder of a model that holds a ``reference.json``.

        Raises:
            RatingError: a file that is none.
        """
        path = Path(path)
        path = path / "reference.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            scores = tuple(float(score) for score in found["scores"])
            if len(scores) != 101 or list(scores) != sorted(scores):
                raise ValueError("it does not hold 101 rising scores")
            more = (str(found.get("model", "")), dict(found.get("identity") or {}))
            return cls(str(found["name"]), int(found["images"]), scores, *more)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RatingError(
                f"Expected a reference that vqr1 reference wrote, but {str(path)!r} is none ({error})."
            ) from None


def reference(
    scorer: QualityScorer,
    folder: str | Path,
    name: str | None = None,
    *,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> Reference:
    """Percentiles of a model's scores for the images of a folder and its subfolders.

    Raises:
        RatingError: fewer than 20 images with a score.
    """
    images = [RatedImage(path.name, path=path) for path in image_files(Path(folder))]
    with tempfile.TemporaryDirectory() as kept, progress("reference", len(images)) as bar:
        rows = score_items(scorer, images, Path(cache or kept), progress=bar.update)
    scores = [row["score"] for row in rows if row["score"] is not None]
    if len(scores) < 20:
        raise RatingError(f"Expected at least 20 images with a score in {str(folder)!r}, but got {len(scores)}.")
    made = made_by(scorer)
    identity = {key: value for key, value in made.items() if key not in _NAMES}
    table = tuple(round(float(score), 4) for score in np.percentile(scores, np.arange(101)))
    return Reference(name or Path(folder).name, len(scores), table, str(made["model"]), identity)
