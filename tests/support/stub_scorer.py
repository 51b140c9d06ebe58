"""Scorers whose model is a formula, for tests of what is done with scores rather than of the scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid
from vqr1_metric.scorer import QualityScorer


class FormulaBackend:
    """Scores a picture by its mean red, steeply, so that pictures that differ a little differ in score; spread 0.3.

    ``pictures`` counts what it has scored, ``sizes`` holds the height and width of each.
    """

    model_id, revision = "formula", "1"
    pixel_config = PixelConfig(14, 2, 2, 3136, 1_000_000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self) -> None:
        self.pictures = 0
        self.sizes: list[tuple[int, int]] = []

    def mean(self, red: Tensor) -> Tensor:
        """The score of a picture of this mean red, 0 to 1."""
        return 3 + 1.9 * torch.sin(red * 300)

    def sequence_length(self, visual_tokens: int, thinking: bool) -> int:
        return visual_tokens + 1

    def distributions(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, *, replies: Sequence[str] | None = None
    ) -> ScoreDistribution:
        self.pictures += len(images)
        self.sizes += [tuple(image.shape[-2:]) for image in images]
        reds = [(image.float() / 255 if image.dtype == torch.uint8 else image.float())[0].mean() for image in images]
        offsets = score_grid() - self.mean(torch.stack(reds)).unsqueeze(-1)
        return ScoreDistribution((-0.5 * (offsets / 0.3) ** 2).softmax(-1))

    def sample_replies(self, images, pixel_config, sampling, *, thinking, add_vision_id):
        raise AssertionError("nothing here samples replies")


class LinearBackend(FormulaBackend):
    """Scores a picture 1 + 4 times its mean red."""

    model_id = "folder/linear"

    def mean(self, red: Tensor) -> Tensor:
        return 1 + 4 * red

    def sample_replies(self, images, pixel_config, sampling, *, thinking, add_vision_id):
        return [[f"<think>Red {i}.</think><answer>{3 + i / 10}</answer>" for i in range(2)] for _ in images]


def formula_scorer() -> QualityScorer:
    """A scorer of its own, with ``scorer.backend.pictures`` counting what it has scored."""
    return QualityScorer(backend=FormulaBackend())
