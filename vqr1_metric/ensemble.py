"""Several judges as one: the mixture of their distributions, and how far they disagree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import ImageLike
from vqr1_metric.results import Comparison, ImageScore, RankedImage, rank_results
from vqr1_metric.scorer import QualityScorer

_AT_A_TIME = 64


@dataclass(frozen=True)
class EnsembleScore(ImageScore):
    """What several judges say of one image.

    Args:
        disagreement: standard deviation of the judges' scores, in score units (divided by their number). The ``std`` of
            the mixture holds it as well as the judges' own uncertainty.
        members: each judge's result, in the order of the scorers.
    """

    disagreement: float = 0.0
    members: tuple[ImageScore, ...] = ()


class Ensemble:
    """Scores images with several scorers, each with an equal share in the mixture.

    An image that one of them cannot score has no score, with that one's reason.

    Args:
        scorers: at least two, whose questions have the same values.

    Example:
        >>> judges = Ensemble([QualityScorer("nano"), QualityScorer("nano", min_pixels=500_000)])  # doctest: +SKIP
        >>> judges.score("photo.jpg")[0].disagreement  # doctest: +SKIP
        0.07
    """

    def __init__(self, scorers: Sequence[QualityScorer]) -> None:
        self.scorers = list(scorers)
        if len(self.scorers) < 2:
            raise ValueError(f"Expected at least two scorers, but got {len(self.scorers)}.")
        if len({scorer.question.values for scorer in self.scorers}) > 1:
            names = [scorer.question.name for scorer in self.scorers]
            raise ValueError(f"Expected questions with the same values, but got {', '.join(names)}.")

    def score(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        prompts: str | Sequence[str] | None = None,
        on_error: Literal["nan", "raise"] = "nan",
    ) -> list[EnsembleScore]:
        """As :meth:`QualityScorer.score <vqr1_metric.scorer.QualityScorer.score>`."""
        every = [scorer.score(images, prompts=prompts, on_error=on_error) for scorer in self.scorers]
        return [_mixed(members) for members in zip(*every, strict=True)]

    def stream(
        self, images: Iterable[ImageLike], *, prompts: str | Iterable[str] | None = None
    ) -> Iterator[EnsembleScore]:
        """Like :meth:`score`, in memory that does not grow with the number of images."""
        left = iter(images)
        texts = prompts if prompts is None or isinstance(prompts, str) else iter(prompts)
        while window := list(islice(left, _AT_A_TIME)):
            asked = texts if texts is None or isinstance(texts, str) else list(islice(texts, len(window)))
            yield from self.score(window, prompts=asked)

    def distributions(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        prompts: str | Sequence[str] | None = None,
        differentiable: bool = False,
    ) -> ScoreDistribution:
        """The mixtures, leading shape ``(B,)``; with ``differentiable`` gradients pass through every judge."""
        every = [s.distributions(images, prompts=prompts, differentiable=differentiable) for s in self.scorers]
        device = every[0].probabilities.device
        return ScoreDistribution.stack([one.to(device, every[0].probabilities.dtype) for one in every]).mixture()

    def compare(self, a: ImageLike, b: ImageLike) -> Comparison:
        """Which of two images looks better, and how surely."""
        return Comparison.of(*self.score([a, b]))

    def rank(self, images: ImageLike | Sequence[ImageLike]) -> list[RankedImage]:
        """Images ordered best first, ties marked."""
        return rank_results(self.score(images))

    def identity(self) -> dict[str, object]:
        """Everything that decides a score: the identity of every judge, whatever their order."""
        return {
            "ensemble": sorted((s.identity() for s in self.scorers), key=lambda one: json.dumps(one, sort_keys=True))
        }

    @property
    def fingerprint(self) -> int:
        """A 48-bit number made of :meth:`identity`."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def offload(self) -> None:
        """Move all weights to the CPU; the next use brings them back."""
        for scorer in self.scorers:
            scorer.offload()

    def unload(self) -> None:
        """Drop all weights; the next use loads them again."""
        for scorer in self.scorers:
            scorer.unload()

    def __repr__(self) -> str:
        return f"Ensemble({self.scorers})"


def _mixed(members: tuple[ImageScore, ...]) -> EnsembleScore:
    name = members[0].name
    failed = next((member for member in members if member.error is not None), None)
    if failed is not None:
        result, disagreement = ImageScore.failed(name, str(failed.error)), float("nan")
    else:
        mixture = ScoreDistribution.stack([member.distribution.to(torch.float64) for member in members]).mixture()
        result = ImageScore.of(name, mixture)
        disagreement = float(torch.tensor([member.score for member in members], dtype=torch.float64).std(correction=0))
    fields = {field: getattr(result, field) for field in ImageScore.__dataclass_fields__}
    return EnsembleScore(**fields, disagreement=disagreement, members=members)
