"""A scorer whose model is a formula, for tests of what is done with scores rather than of the scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid
from vqr1_metric.scorer import QualityScorer


class FormulaBackend:
    """Scores a picture by its mean red, steeply, so that pictures that differ a little differ in score."""

    model_id, revision = "formula", "1"
    pixel_config = PixelConfig(14, 2, 2, 3136, 1_000_000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self) -> None:
        self.pictures = 0

    def sequence_length(self, visual_tokens: int, thinking: bool) -> int:
        return visual_tokens + 1

    def distributions(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, *, replies: Sequence[str] | None = None
    ) -> ScoreDistribution:
        self.pictures += len(images)
        means = []
        for image in images:
            red = (image.float() / 255 if image.dtype == torch.uint8 else image.float())[0].mean()
            means.append(3 + 1.9 * torch.sin(red * 300))
        offsets = score_grid() - torch.stack(means).unsqueeze(-1)
        return ScoreDistribution((-0.5 * (offsets / 0.3) ** 2).softmax(-1))

    def sample_replies(self, images, pixel_config, sampling, *, thinking, add_vision_id):
        raise AssertionError("nothing here samples replies")


def formula_scorer() -> QualityScorer:
    """A scorer of its own, with ``scorer.backend.pictures`` counting what it has scored."""
    return QualityScorer(backend=FormulaBackend())
