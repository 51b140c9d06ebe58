"""Large images by their tiles, and videos by their frames: one distribution for all parts, and the worst part.

Both stand in for a scorer where images are streamed: ``TiledScorer(scorer, 1024).stream(paths)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vqr1_metric.backends.base import ScoringBackend
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import ImageError, ImageLike, describe
from vqr1_metric.images.ahead import read_images
from vqr1_metric.images.video import read_frames
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import QualityScorer


@dataclass(frozen=True)
class Part:
    """A tile or a frame.

    Args:
        place: where it is, in the words of the columns: ``x``, ``y``, ``width``, ``height`` in pixels, or ``frame`` and
            ``time`` in seconds.
        result: its score.
    """

    place: dict[str, float | int | None]
    result: ImageScore


@dataclass(frozen=True)
class PartsScore(ImageScore):
    """The result of an image or a video that was judged by its parts.

    ``score``, ``std`` and ``distribution`` are those of the mixture of the parts' distributions, with equal weights.
    """

    parts: tuple[Part, ...] = ()

    @property
    def worst(self) -> Part | None:
        """The part with the lowest score; None where no part has one."""
        scored = [part for part in self.parts if part.result.error is None]
        return min(scored, key=lambda part: part.result.score, default=None)

    @property
    def columns(self) -> dict[str, float | int | None]:
        """What a row of a score file holds beside the usual columns."""
        worst = self.worst
        lowest = math.nan if worst is None else worst.result.score
        place = {} if worst is None else worst.place
        return {"parts": len(self.parts), "worst_score": lowest, **{f"worst_{name}": at for name, at in place.items()}}

    @property
    def details(self) -> dict[str, Any]:
        """What a JSON line holds beside: every part with its place."""

        def row(part: Part) -> dict[str, Any]:
            number = None if part.result.error is not None else round(part.result.score, 6)
            return {**part.place, "score": number, "error": part.result.error or ""}

        return {"each_part": [row(part) for part in self.parts]}


def join_parts(name: str, parts: Sequence[Part]) -> PartsScore:
    """The result of the whole; without a score if no part has one."""
    scored = [part.result for part in parts if part.result.error is None]
    if not scored:
        reason = parts[0].result.error if parts else "holds no frames"
        failed = ImageScore.failed(name, f"{name}: {reason}")
        return PartsScore(**vars(failed), parts=tuple(parts))
    mixture = ScoreDistribution.stack([result.distribution for result in scored]).mixture()
    return PartsScore(**vars(ImageScore.of(name, mixture)), parts=tuple(parts))


def tile_places(height: int, width: int, size: int) -> list[tuple[int, int, int, int]]:
    """``(y, x, height, width)`` of tiles that cover an image once, of like sizes, none longer than ``size``."""

    def cuts(length: int) -> list[tuple[int, int]]:
        count = math.ceil(length / size)
        edges = [round(i * length / count) for i in range(count + 1)]
        return [(start, end - start) for start, end in itertools.pairwise(edges)]

    return [(y, x, h, w) for y, h in cuts(height) for x, w in cuts(width)]


class _PartsScorer:
    """What the two have in common: they say what they are, and the model is the scorer's."""

    kind: str
    #: Columns of a CSV behind the usual ones.
    columns: tuple[str, ...]

    def __init__(self, scorer: QualityScorer, size: int) -> None:
        if size < 1:
            raise ValueError(f"Expected {self.kind} of at least 1, but got {size}.")
        self.scorer, self.size = scorer, size

    @property
    def backend(self) -> ScoringBackend:
        """The model."""
        return self.scorer.backend

    def identity(self) -> dict[str, object]:
        """That of the scorer, and how the parts are made."""
        return {**self.scorer.identity(), self.kind: self.size}

    def card(self) -> dict[str, object]:
        """That of the scorer, with this identity."""
        return {**self.scorer.card(), "identity": self.identity()}


class TiledScorer(_PartsScorer):
    """Scores images tile by tile, at full resolution.

    An image of which each side is at most ``size`` is one tile, and then its score is the usual one.

    Args:
        scorer: judges the tiles.
        size: longest side of a tile, in pixels.
    """

    kind = "tiles"
    columns = ("parts", "worst_score", "worst_x", "worst_y", "worst_width", "worst_height")

    def stream(self, images: Iterable[ImageLike], *, in_order: bool = True) -> Iterator[PartsScore]:
        """One result for each image, in order; ``place`` is ``x, y, width, height``."""
        for name, pixels in read_images(images):
            if isinstance(pixels, ImageError):
                failed = ImageScore.failed(name, str(pixels))
                yield PartsScore(**vars(failed))
                continue
            yield self.score(name, pixels)

    def score(self, name: str, pixels: Tensor) -> PartsScore:
        """The result of one image ``(3, H, W)``."""
        places = tile_places(pixels.shape[-2], pixels.shape[-1], self.size)
        results = self.scorer.score([pixels[:, y : y + h, x : x + w] for y, x, h, w in places])
        parts = []
        for (y, x, h, w), result in zip(places, results, strict=True):
            reason = result.error and result.error.removeprefix(f"{result.name}: ")
            parts.append(Part({"x": x, "y": y, "width": w, "height": h}, replace(result, name=name, error=reason)))
        return join_parts(name, parts)


class VideoScorer(_PartsScorer):
    """Scores videos frame by frame.

    Args:
        scorer: judges the frames.
        size: every so-manieth frame is looked at, beginning with the first.
    """

    kind = "every"
    columns = ("parts", "worst_score", "worst_frame", "worst_time")

    def stream(self, images: Iterable[ImageLike], *, in_order: bool = True) -> Iterator[PartsScore]:
        """One result for each path of a video; ``place`` is ``frame`` (its number, from 0) and ``time`` in seconds."""
        for index, path in enumerate(images):
            yield self.score(describe(path, index))

    def score(self, path: str) -> PartsScore:
        """The result of one video. One that breaks off has no score: its end may be what is bad about it."""
        places: list[dict[str, float | int | None]] = []

        def frames() -> Iterator[ImageLike]:
            for frame in read_frames(path, self.size):
                places.append({"frame": frame.number, "time": None if frame.time is None else round(frame.time, 4)})
                yield frame.image

        try:
            results = list(self.scorer.stream(frames()))
        except ImageError as error:
            return PartsScore(**vars(ImageScore.failed(path, str(error))))
        parts = []
        for place, result in zip(places, results, strict=True):
            reason = result.error and result.error.removeprefix(f"{result.name}: ")
            parts.append(Part(place, replace(result, name=path, error=reason)))
        return join_parts(path, parts)
