"""How probable is it that one picture looks better than another, given what is known of their scores?"""

from __future__ import annotations

import torch
from torch import Tensor

from vqr1_metric.functional.distribution import ScoreDistribution

#: Keeps the Thurstone denominator away from zero when every sampled score is the same. The paper says "a small
#: constant"; the authors' code uses 1e-6.
GAMMA = 1e-6


def comparison_probability(
    mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor, gamma: float = GAMMA
) -> Tensor:
    r"""Thurstone probability that ``a`` looks better than ``b``, both scores normal and independent (case III).

    .. math:: p(a, b) = \Phi\Big(\frac{\mu_a - \mu_b}{\sqrt{\sigma_a^2 + \sigma_b^2 + \gamma}}\Big)

    Source: VisualQuality-R1 (arXiv 2505.14460), equation of the comparison probability; Thurstone, "A law
    of comparative judgment", 1927.

    Args:
        mean_a, mean_b: mean scores, any shapes that broadcast.
        variance_a, variance_b: variances in squared score units, at least 0.
        gamma: constant added to the variance.

    Returns:
        Probabilities in [0, 1] of the broadcast shape; ``p(a, b) + p(b, a) = 1``.
    """
    probability: Tensor = torch.special.ndtr((mean_a - mean_b) / (variance_a + variance_b + gamma).sqrt())
    return probability


def win_probability(a: ScoreDistribution, b: ScoreDistribution) -> Tensor:
    r"""Probability that a score drawn from ``a`` exceeds one drawn from ``b``, a tie counting half.

    .. math:: P(a \succ b) = \sum_s p_a(s) \Big[ \sum_{t < s} p_b(t) + \tfrac12 p_b(s) \Big]

    Exact for the two distributions as they are, taken as independent (the probabilistic index, or "common language
    effect size", of McGraw and Wong 1992). :func:`comparison_probability` is its normal approximation.

    Args:
        a, b: distributions whose leading shapes broadcast.

    Returns:
        Probabilities in [0, 1] of the broadcast leading shape; NaN where either has no score.
    """
    if a.values != b.values:
        raise ValueError("Expected distributions over the same scores, but got those of different questions.")
    below = b.probabilities.cumsum(-1) - 0.5 * b.probabilities
    return (a.probabilities * below).sum(-1).clamp(0, 1)
