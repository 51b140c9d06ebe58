"""Scores of what a pipeline gives out: pictures as they would be saved, frames of videos, pictures that are none."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.results import ImageScore

#: Gives a number for each of the pictures, higher for better; the second argument is the prompt.
AlsoScorer = Callable[[Sequence[Image.Image], str | None], Sequence[float]]
Combine = Literal["sum", "product", "rank"]
BLANKED = "blanked by the safety checker of the pipeline"
NOT_FINITE = "NaN or infinity in the picture, or in the latents that it was decoded from"
BLACK = "entirely black, as pictures are whose decoding gave NaN"


class PictureScorer:
    """The scorer of a metric, or a scorer, for the outputs of a pipeline.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer.
        frames: frames scored of a video, evenly spaced; its distribution is their mixture.
        also: by name, another scorer and its weight: a function of PIL pictures and the prompt that gives a number for
            each, or an object with ``score(pictures)`` or ``score(pictures, prompts=[...])`` that gives results with a
            ``score``, such as a :class:`~vqr1_metric.scorer.QualityScorer` that asks another question.
        combine: what a candidate is chosen by: ``"sum"``, its score plus the weighted numbers; ``"product"``, its score
            times each number to the power of its weight (numbers from 0 up); ``"rank"``, the weighted mean of its ranks
            among its rivals, as a share from 0 (worst) to 1, the score's weight being 1, which needs no common unit.
        thresholds: by name, ``"quality"`` included, the least number of a candidate. Those that miss one come after all
            that do not.
    """

    def __init__(
        self,
        metric: Any,
        frames: int = 4,
        also: Mapping[str, tuple[Any, float]] | None = None,
        combine: Combine = "sum",
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.scorer = getattr(metric, "scorer", metric)
        if not hasattr(self.scorer, "score"):
            raise TypeError(f"Expected a metric with a scorer or a QualityScorer, but got {type(metric).__name__}.")
        if frames < 1:
            raise ValueError(f"Expected frames of at least 1, but got {frames}.")
        self.frames, self.combine = frames, combine
        self.also, self.thresholds = dict(also or {}), dict(thresholds or {})
        for name, pair in self.also.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and (callable(pair[0]) or hasattr(pair[0], "score"))):
                raise TypeError(
                    f"Expected also[{name!r}] to be a pair of a function and a weight (or a scorer and a weight), but "
                    f"got {pair!r}."
                )
        if combine not in ("sum", "product", "rank"):
            raise ValueError(f"Expected combine to be sum, product or rank, but got {combine!r}.")
        if unknown := sorted(set(self.thresholds) - {"quality", *self.also}):
            raise ValueError(f"Expected thresholds of quality or of what also holds, but got {', '.join(unknown)}.")

    def load(self) -> None:
        """Load the model now, so that one that does not load fails before minutes of denoising."""
        _ = self.scorer.backend

    def parts(self, picture: Any) -> list[Image.Image]:
        """What is scored of one picture (itself) or video (evenly spaced frames)."""
        if isinstance(picture, Image.Image) or (not isinstance(picture, (list, tuple)) and picture.ndim < 4):
            return [as_pil(picture)]
        count = min(self.frames, len(picture))
        places = [round((i + 0.5) * len(picture) / count - 0.5) for i in range(count)]
        return [as_pil(picture[place]) for place in places]

    def __call__(
        self, pictures: Sequence[Any], reasons: Sequence[str | None] | None = None, prompt: str | None = None
    ) -> list[ImageScore]:
        """Scores of pictures or videos. Where there is a reason against one, it gets NaN and says so.

        A scorer that fails costs no picture: all of them get NaN with what it said, and a warning.
        """
        reasons = [
            why or flaw(picture) for picture, why in zip(pictures, reasons or [None] * len(pictures), strict=True)
        ]
        groups = [[] if why else self.parts(picture) for picture, why in zip(pictures, reasons, strict=True)]
        try:
            asks = prompt is not None and getattr(getattr(self.scorer, "question", None), "needs_prompt", False)
            parts = [part for group in groups for part in group]
            scores = iter(self.scorer.score(parts, **({"prompts": [prompt] * len(parts)} if asks else {})))
            results = [[next(scores) for _ in group] for group in groups]
        except Exception as error:  # whatever a model may raise: the pictures are made
            failure = f"the scorer failed: {type(error).__name__}: {error}"
            warnings.warn(f"Pictures without a score: {failure}", stacklevel=2)
            return [ImageScore.failed(f"candidate {i}", why or failure) for i, why in enumerate(reasons)]
        return [
            ImageScore.failed(f"candidate {i}", why) if why else _merged(f"candidate {i}", result)
            for i, (why, result) in enumerate(zip(reasons, results, strict=True))
        ]

    def extras(self, pictures: Sequence[Any], prompt: str | None) -> list[dict[str, float]]:
        """What the other scorers say of each picture (of a video: the mean over its frames); NaN where they fail."""
        groups = [[] if flaw(picture) else self.parts(picture) for picture in pictures] if self.also else []
        values: list[dict[str, float]] = [{} for _ in pictures]
        parts = [part for group in groups for part in group]
        for name, (scorer, _) in self.also.items():
            try:
                numbers = _numbers(scorer, parts, prompt) if parts else []
            except Exception as error:
                warnings.warn(f"{name} failed, and is left out: {type(error).__name__}: {error}", stacklevel=2)
                numbers = [math.nan] * len(parts)
            if len(numbers) != len(parts):
                raise ValueError(f"Expected {len(parts)} numbers from {name}, one a picture, but got {len(numbers)}.")
            following = iter(numbers)
            for value, group in zip(values, groups, strict=True):
                value[name] = sum(next(following) for _ in group) / len(group) if group else math.nan
        return values

    def choose_by(
        self, scores: Sequence[float], extras: Sequence[Mapping[str, float]]
    ) -> list[tuple[float, list[str]]]:
        """For each of several rivals: what it is chosen by (NaN without a score), and the thresholds that it misses.

        A number that is NaN counts as the mean of its rivals' numbers; a scorer that gives no number is left out.
        """
        values = list(scores)
        by_rank = {"quality": (1.0, values)}
        for name, (_, weight) in self.also.items():
            numbers = [extra.get(name, math.nan) for extra in extras]
            known = [number for number, score in zip(numbers, scores, strict=True) if math.isfinite(number + score)]
            if not known:
                continue
            numbers = [n if math.isfinite(n) else sum(known) / len(known) for n in numbers]
            if self.combine == "sum":
                values = [value + weight * n for value, n in zip(values, numbers, strict=True)]
            elif self.combine == "product":
                values = [value * max(n, 0.0) ** weight for value, n in zip(values, numbers, strict=True)]
            by_rank[name] = (weight, numbers)
        if self.combine == "rank" and self.also:
            shares = [(weight, _rank_shares(numbers)) for weight, numbers in by_rank.values()]
            total = sum(abs(weight) for weight, _ in shares)
            ranked = [sum(w * share[i] for w, share in shares) / total for i in range(len(values))]
            values = [r if math.isfinite(score) else math.nan for r, score in zip(ranked, scores, strict=True)]
        missed = [
            [
                n
                for n, least in self.thresholds.items()
                if not (score if n == "quality" else extra.get(n, math.nan)) >= least
            ]
            for score, extra in zip(scores, extras, strict=True)
        ]
        return list(zip(values, missed, strict=True))


def _numbers(scorer: Any, parts: list[Image.Image], prompt: str | None) -> list[float]:
    if not hasattr(scorer, "score"):
        return [float(number) for number in scorer(parts, prompt)]
    asks = prompt is not None and "prompts" in inspect.signature(scorer.score).parameters
    results = scorer.score(parts, **({"prompts": [prompt] * len(parts)} if asks else {}))
    return [float(getattr(result, "score", result)) for result in results]


def _rank_shares(numbers: Sequence[float]) -> list[float]:
    """Rank of each number among the others, from 0 (the least) to 1; ties share the middle of theirs."""
    known = [n for n in numbers if math.isfinite(n)]
    below = [(sum(o < n for o in known) + sum(o <= n for o in known) - 1) / 2 for n in numbers]
    return [b / max(len(known) - 1, 1) for b in below]


def _merged(name: str, scores: list[ImageScore]) -> ImageScore:
    if len(scores) == 1:
        return scores[0]
    scored = [score.distribution for score in scores if score.error is None]
    if not scored:
        return ImageScore.failed(name, scores[0].error or "no frames")
    return ImageScore.of(name, ScoreDistribution.stack(scored).mixture())


def flaw(picture: Any) -> str | None:
    """Why this picture or video is none, or None: it holds NaN or infinity, or is entirely black."""
    frames = list(picture) if isinstance(picture, (list, tuple)) else [picture]
    arrays = [np.asarray(frame)[..., :3] if isinstance(frame, Image.Image) else _array(frame) for frame in frames]
    if not all(np.isfinite(array).all() for array in arrays):
        return NOT_FINITE
    return None if any(array.any() for array in arrays) else BLACK


def _array(picture: Any) -> np.ndarray[Any, Any]:
    return picture.detach().float().cpu().numpy() if hasattr(picture, "detach") else np.asarray(picture)


def as_pil(picture: Any) -> Image.Image:
    """A picture as it would be saved: 8-bit.

    Args:
        picture: a PIL picture, an array ``(H, W, 3)``, floating in [0, 1] or of uint8, or a tensor ``(3, H, W)``.
    """
    if isinstance(picture, Image.Image):
        return picture
    array = _array(picture)
    if hasattr(picture, "detach"):
        array = array.transpose(1, 2, 0) if picture.dtype.is_floating_point else array.transpose(1, 2, 0) / 255
    if array.dtype != np.uint8:
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
