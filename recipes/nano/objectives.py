"""The losses: fidelity of ranked pairs, ladders, and the anchor to the scale."""

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA = 0.05
"""Added to the variances in the comparison probability: the least spread that two pictures are compared at."""


def fidelity_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """1 - fidelity over all pairs of one data set (Thurstone's case; Tsai et al. 2007).

    Args:
        mean, variance: predicted score distribution of each picture, (B,).
        target: opinion scores, (B,); only their order counts.

    Returns:
        Scalar in 0..1; 0 when every pair is in the right order beyond doubt.
    """
    first, second = torch.triu_indices(len(mean), len(mean), 1)
    gap = mean[first] - mean[second]
    probability = torch.special.ndtr(gap / (variance[first] + variance[second] + GAMMA).sqrt())
    truth = 0.5 + 0.5 * torch.sign(target[first] - target[second])
    probability = probability.clamp(1e-4, 1 - 1e-4)
    fidelity = truth.sqrt() * probability.sqrt() + (1 - truth).sqrt() * (1 - probability).sqrt()
    return (1 - fidelity).mean()


def ladder_loss(mean: Tensor, scene: Tensor, level: Tensor, margin: float = 0.12) -> Tensor:
    """Within a scene the stronger distortion must score lower, by `margin` per level: a soft hinge over all pairs."""
    same = (scene[:, None] == scene[None]) & (scene[:, None] >= 0)
    weaker, stronger = torch.nonzero(same & (level[:, None] < level[None]), as_tuple=True)
    if len(weaker) == 0:
        return mean.sum() * 0
    wanted = margin * (level[stronger] - level[weaker])
    return F.softplus((wanted - (mean[weaker] - mean[stronger])) / 0.1).mean() * 0.1


def anchor_loss(mean: Tensor, score: Tensor, scene: Tensor) -> Tensor:
    """Squared distance to the scores, those of ladders (assumed, not measured) at half the weight."""
    weight = torch.where(scene >= 0, 0.5, 1.0)
    return (weight * (mean - score) ** 2).sum() / weight.sum()
