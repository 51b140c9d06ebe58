"""The ranking reward of VisualQuality-R1: does a predicted comparison agree with what people said?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vqr1_metric.functional.thurstone import GAMMA, comparison_probability

#: Added inside each root, as in the authors' code, where the gradient of a square root would be infinite at 0. With it
#: the fidelity of a perfect prediction is about 1.001.
EPSILON = 1e-6


def preference_label(mos_a: Tensor, mos_b: Tensor) -> Tensor:
    """1, 0.5 or 0 where ``mos_a`` is above, equal to or below ``mos_b``; shapes broadcast. MOS of one data set only."""
    return (torch.sign(mos_a - mos_b) + 1) / 2


def fidelity(predicted: Tensor, label: Tensor, eps: float = EPSILON) -> Tensor:
    r"""Fidelity between a predicted and a true comparison probability, 1 where they agree.

    .. math:: \sqrt{p\,\hat p + \epsilon} + \sqrt{(1-p)(1-\hat p) + \epsilon}

    Source: Tsai et al., "FRank", SIGIR 2007; VisualQuality-R1 (arXiv 2505.14460); ``eps`` from the authors' code.

    Args:
        predicted: probabilities in [0, 1].
        label: 0, 0.5 or 1 (any probability works), a shape that broadcasts.
        eps: constant inside each root; 0 gives the published formula.

    Returns:
        Fidelity in [0, 1] (up to ``2 * sqrt(eps)`` more), of the broadcast shape.
    """
    return (predicted * label + eps).sqrt() + ((1 - predicted) * (1 - label) + eps).sqrt()


def ranking_reward(
    scores_BK: Tensor,
    mos_B: Tensor,
    gamma: float = GAMMA,
    eps: float = EPSILON,
    variance: Literal["estimated", "fixed"] = "estimated",
) -> Tensor:
    r"""Fidelity reward of each of K sampled scores of B pictures of ONE data set.

    .. math::
        p_k(x_i, x_j) = \Phi\Big(\frac{q_k(x_i) - \bar q(x_j)}
            {\sqrt{\mathrm{var}\,q(x_i) + \mathrm{var}\,q(x_j) + \gamma}}\Big), \qquad
        r_k(x_i) = \frac{1}{B-1} \sum_{j \ne i} \mathrm{fidelity}\big(p_k(x_i, x_j), p(x_i, x_j)\big)

    Source: VisualQuality-R1 (arXiv 2505.14460). The variance is the unbiased one, as in the authors' code.

    Args:
        scores_BK: sampled scores, NaN where a reply could not be read. NaN takes no part in any mean or variance and
            earns NaN; a picture without a readable score is nobody's partner; with one readable score its variance is
            0.
        mos_B: mean opinion scores, higher is better; any scale.
        gamma: constant added to the variance.
        eps: constant inside each root of the fidelity.
        variance: ``"fixed"`` sets every picture's variance to 1 (an ablation of the paper).

    Returns:
        Rewards of shape ``(B, K)``; NaN where the score is NaN or the picture has no partner.
    """
    if scores_BK.ndim != 2 or mos_B.shape != scores_BK.shape[:1]:
        raise ValueError(
            f"Expected scores of shape (B, K) and MOS of shape (B,), but got {tuple(scores_BK.shape)} and "
            f"{tuple(mos_B.shape)}."
        )
    if not bool(torch.isfinite(mos_B).all()):
        raise ValueError("Expected finite MOS, but got NaN or infinity.")
    readable_BK = torch.isfinite(scores_BK)
    count_B = readable_BK.sum(1)
    filled_BK = torch.where(readable_BK, scores_BK, 0)
    mean_B = filled_BK.sum(1) / count_B.clamp(min=1)
    if variance == "fixed":
        variance_B = torch.ones_like(mean_B)
    elif variance == "estimated":
        squares_BK = torch.where(readable_BK, (filled_BK - mean_B[:, None]) ** 2, 0)
        variance_B = squares_BK.sum(1) / (count_B - 1).clamp(min=1)
    else:
        raise ValueError(f"Expected variance 'estimated' or 'fixed', but got {variance!r}.")

    predicted_BKB = comparison_probability(filled_BK[:, :, None], variance_B[:, None, None], mean_B, variance_B, gamma)
    label_BB = preference_label(mos_B[:, None], mos_B[None, :]).to(predicted_BKB.dtype)
    fidelity_BKB = fidelity(predicted_BKB, label_BB[:, None, :], eps)

    partner_BB = (count_B > 0)[None, :] & ~torch.eye(len(mos_B), dtype=torch.bool, device=mos_B.device)
    partners_B = partner_BB.sum(1)
    reward_BK = torch.where(partner_BB[:, None, :], fidelity_BKB, 0).sum(-1) / partners_B.clamp(min=1)[:, None]
    return torch.where(readable_BK & (partners_B > 0)[:, None], reward_BK, torch.nan)
