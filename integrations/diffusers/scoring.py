"""Scores of what a pipeline gives out: pictures as they would be saved, frames of videos, blanked pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.results import ImageScore

#: Gives a number for each of the pictures, higher for better; the second argument is the prompt.
AlsoScorer = Callable[[Sequence[Image.Image], str | None], Sequence[float]]
BLANKED = "blanked by the safety checker of the pipeline"


class PictureScorer:
    """The scorer of a metric, or a scorer, for the outputs of a pipeline.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer.
        frames: frames scored of a video, evenly spaced; its distribution is their mixture.
        also: by name, a function of PIL pictures and the prompt that gives a number for each, and its weight.
    """

    def __init__(
        self, metric: Any, frames: int = 4, also: Mapping[str, tuple[AlsoScorer, float]] | None = None
    ) -> None:
        self.scorer = getattr(metric, "scorer", metric)
        if not hasattr(self.scorer, "score"):
            raise TypeError(f"Expected a metric with a scorer or a QualityScorer, but got {type(metric).__name__}.")
        if frames < 1:
            raise ValueError(f"Expected frames of at least 1, but got {frames}.")
        self.frames = frames
        self.also = dict(also or {})
        for name, pair in self.also.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0])):
                raise TypeError(f"Expected also[{name!r}] to be a pair of a function and a weight, but got {pair!r}.")

    def load(self) -> None:
        """Load the model now, so that one that does not load fails before minutes of denoising."""
        _ = self.scorer.backend

    def parts(self, picture: Any) -> list[Image.Image]:
        """What is scored of one picture (itself) or video (evenly spaced frames)."""
        if not isinstance(picture, list) and getattr(picture, "ndim", 3) == 3:
            return [as_pil(picture)]
        count = min(self.frames, len(picture))
        places = [round((i + 0.5) * len(picture) / count - 0.5) for i in range(count)]
        return [as_pil(picture[place]) for place in places]

    def __call__(self, pictures: Sequence[Any], blanked: Sequence[bool] | None = None) -> list[ImageScore]:
        """Scores of pictures or videos; those that a safety checker has blanked get NaN and say so."""
        blanked = blanked or [False] * len(pictures)
        groups = [[] if flag else self.parts(picture) for picture, flag in zip(pictures, blanked, strict=True)]
        scores = iter(self.scorer.score([part for group in groups for part in group]))
        return [_merged(f"candidate {i}", [next(scores) for _ in group]) for i, group in enumerate(groups)]

    def extras(self, pictures: Sequence[Any], prompt: str | None) -> tuple[list[dict[str, float]], list[float]]:
        """What the other scorers say of each picture (of a video: the mean over its frames), and their weighted sum."""
        groups = [self.parts(picture) for picture in pictures] if self.also else []
        values: list[dict[str, float]] = [{} for _ in pictures]
        for name, (function, _) in self.also.items():
            numbers = [float(number) for number in function([part for group in groups for part in group], prompt)]
            expected = sum(map(len, groups))
            if len(numbers) != expected:
                raise ValueError(f"Expected {expected} numbers from {name}, one a picture, but got {len(numbers)}.")
            following = iter(numbers)
            for value, group in zip(values, groups, strict=True):
                value[name] = sum(next(following) for _ in group) / len(group)
        return values, [sum(weight * value[name] for name, (_, weight) in self.also.items()) for value in values]


def _merged(name: str, scores: list[ImageScore]) -> ImageScore:
    if not scores:
        return ImageScore.failed(name, BLANKED)
    if len(scores) == 1:
        return scores[0]
    if all(score.error for score in scores):
        return ImageScore.failed(name, scores[0].error)
    return ImageScore.of(name, ScoreDistribution.stack([score.distribution for score in scores]).mixture())


def as_pil(picture: Any) -> Image.Image:
    """A picture as it would be saved: 8-bit RGB.

    Args:
        picture: a PIL picture, an array ``(H, W, 3)`` or a tensor ``(3, H, W)``, both floating in [0, 1].
    """
    if isinstance(picture, Image.Image):
        return picture
    if hasattr(picture, "detach"):
        picture = picture.detach().float().cpu().permute(1, 2, 0).numpy()
    return Image.fromarray((picture * 255).round().clip(0, 255).astype("uint8"))
