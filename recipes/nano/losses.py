"""What training minimises: fidelity of comparisons inside a set, order in ladders, and the scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqr1_metric.functional.distribution import ScoreDistribution, score_grid

LEAST_VARIANCE = 0.01
"""Added to the variances of two pictures that are compared."""
OPINION_STD = 0.35
"""Spread that a difference of two mean opinions is compared at."""


def preference(mos: Tensor) -> Tensor:
    """How probably opinions prefer the first picture (row) to the second (column)."""
    return torch.special.ndtr((mos[:, None] - mos) / OPINION_STD)


def fidelity(distribution: ScoreDistribution, preferred: Tensor, weight: Tensor) -> Tensor:
    """1 - fidelity of the predicted comparisons ``(B, B)`` to the known ones, weighted (Tsai et al., 2007)."""
    mean, variance = distribution.mean, distribution.variance
    spread = (variance[:, None] + variance + LEAST_VARIANCE).sqrt()
    predicted = torch.special.ndtr((mean[:, None] - mean) / spread).clamp(1e-4, 1 - 1e-4)
    alike = (predicted * preferred + 1e-8).sqrt() + ((1 - predicted) * (1 - preferred) + 1e-8).sqrt()
    return ((1 - alike) * weight).sum() / weight.sum().clamp(min=1e-6)


def ladder(mean: Tensor, group: Tensor, level: Tensor, margin: float = 0.1) -> Tensor:
    """A stronger fault must score lower, by ``margin`` for each level: a soft hinge over all pairs of a ladder."""
    weaker, stronger = torch.nonzero((group[:, None] == group) & (level[:, None] < level), as_tuple=True)
    wanted = margin * (level[stronger] - level[weaker]).clamp(max=6)
    return 0.1 * F.softplus((wanted - (mean[weaker] - mean[stronger])) / 0.1).mean()


def on_scale(distribution: ScoreDistribution, scores: Tensor, std: float) -> Tensor:
    """Cross entropy of the distributions against normal ones round the known scores; NaN ones are left out."""
    known = scores.isfinite()
    target = torch.softmax(-0.5 * ((score_grid() - scores[known].clamp(1, 5)[:, None]) / std) ** 2, dim=1)
    return -(target * distribution.probabilities[known].clamp(min=1e-9).log()).sum(1).mean()


def outside(distribution: ScoreDistribution) -> Tensor:
    """How improbable the answers' grammar is."""
    return -(distribution.coverage * distribution.tag_probability).clamp(min=1e-9).log().mean()
