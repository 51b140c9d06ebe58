"""The ranking reward of VisualQuality-R1: do the stated scores order images as people do?

Shape suffixes: B images, K scores of each, N possible partners.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vqr1_metric.functional.thurstone import GAMMA, comparison_probability

Rule = Literal["fidelity", "binary", "averaged"]
Variance = Literal["estimated", "fixed"]

#: Added inside each root, as in the authors' code, where the gradient of a square root would be infinite at 0. With it
#: the fidelity of a perfect prediction is about 1.001.
EPSILON = 1e-6


def preference_label(mos_a: Tensor, mos_b: Tensor) -> Tensor:
    """1, 0.5 or 0 where ``mos_a`` is above, equal to or below ``mos_b``; shapes broadcast. MOS of one data set only."""
    return (torch.sign(mos_a - mos_b) + 1) / 2


def comparison_labels(mos_B: Tensor, group_B: Tensor | None = None, share_B: Tensor | None = None) -> Tensor:
    """Who is better than whom, for a whole batch.

    Args:
        mos_B: mean opinion scores, higher is better; of an image with a share it is not looked at.
        group_B: images are compared only within a group, such as a comparison set of one data set, or the two images of
            a preference; by default all with all.
        share_B: share of the votes that an image won against the others of its group, in [0, 1]; NaN for an image with
            a MOS.

    Returns:
        Shape ``(B, B)``: probability that the row's image is better than the column's; NaN where they are not compared,
        such as on the diagonal.
    """
    label_BB = preference_label(mos_B[:, None], mos_B[None, :])
    if share_B is not None:
        label_BB = torch.where(share_B.isnan()[:, None], label_BB, share_B[:, None].to(label_BB.dtype))
    apart_BB = torch.eye(len(mos_B), dtype=torch.bool, device=mos_B.device)
    if group_B is not None:
        apart_BB = apart_BB | (group_B[:, None] != group_B[None, :])
    return label_BB.masked_fill(apart_BB, torch.nan)


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
    variance: Variance = "estimated",
    rule: Rule = "fidelity",
    group_B: Tensor | None = None,
    share_B: Tensor | None = None,
) -> Tensor:
    r"""Reward of each of K sampled scores of B images.

    .. math::
        p_k(x_i, x_j) = \Phi\Big(\frac{q_k(x_i) - \bar q(x_j)}
            {\sqrt{\mathrm{var}\,q(x_i) + \mathrm{var}\,q(x_j) + \gamma}}\Big), \qquad
        r_k(x_i) = \frac{1}{|J_i|} \sum_{j \in J_i} \mathrm{fidelity}\big(p_k(x_i, x_j), p(x_i, x_j)\big)

    where the partners :math:`J_i` are the other images of the group with a readable score.
    Source: VisualQuality-R1 (arXiv 2505.14460). The variance is the unbiased one, as in the authors' code.

    Args:
        scores_BK: sampled scores, NaN where a reply could not be read. NaN takes no part in any mean or variance and
            earns NaN; an image without a readable score is nobody's partner; with one readable score its variance is 0.
        mos_B: mean opinion scores, higher is better; any scale, but one scale within a group.
        gamma: constant added to the variance.
        eps: constant inside each root of the fidelity.
        variance: ``"fixed"`` sets every image's variance to 1 (an ablation of the paper).
        rule: the other rules are ablations of the paper. ``"binary"``: 1 where the more probable order is that of the
            label (equal with equal), else 0. ``"averaged"``: the score is compared with each of the partner's scores,
            and the probabilities are averaged, in place of one comparison with the partner's mean:
            :math:`p_k = \frac1K \sum_l \Phi\big((q_k(x_i) - q_l(x_j)) / \sqrt{\ldots}\big)`.
        group_B, share_B: see :func:`comparison_labels`.

    Returns:
        Rewards of shape ``(B, K)``, in [0, 1]; NaN where the score is NaN or the image has no partner.

    Raises:
        ValueError: shapes, rules or labels that are none of these.
    """
    if scores_BK.ndim != 2 or mos_B.shape != scores_BK.shape[:1]:
        raise ValueError(
            f"Expected scores of shape (B, K) and MOS of shape (B,), but got {tuple(scores_BK.shape)} and "
            f"{tuple(mos_B.shape)}."
        )
    for name, value, choices in (("variance", variance, get_args(Variance)), ("rule", rule, get_args(Rule))):
        if value not in choices:
            raise ValueError(f"Expected {name} to be one of {choices}, but got {value!r}.")
    rated_B = mos_B if share_B is None else mos_B[share_B.isnan()]
    if not bool(torch.isfinite(rated_B).all()):
        raise ValueError("Expected finite MOS, but got NaN or infinity.")
    readable_BK = torch.isfinite(scores_BK)
    count_B = readable_BK.sum(1)
    filled_BK = torch.where(readable_BK, scores_BK, 0)
    mean_B = filled_BK.sum(1) / count_B.clamp(min=1)
    squares_BK = torch.where(readable_BK, (filled_BK - mean_B[:, None]) ** 2, 0)
    variance_B = torch.ones_like(mean_B) if variance == "fixed" else squares_BK.sum(1) / (count_B - 1).clamp(min=1)
    label_BB = comparison_labels(mos_B, group_B, share_B).masked_fill((count_B == 0)[None, :], torch.nan)
    if rule == "averaged":
        each_BKBK = comparison_probability(
            filled_BK[:, :, None, None], variance_B[:, None, None, None], filled_BK, variance_B[:, None], gamma
        )
        predicted_BKB = torch.where(readable_BK, each_BKBK, 0).sum(-1) / count_B.clamp(min=1)
    else:
        predicted_BKB = comparison_probability(
            filled_BK[:, :, None], variance_B[:, None, None], mean_B, variance_B, gamma
        )
    return partner_mean(predicted_BKB, label_BB, rule, eps).masked_fill(~readable_BK, torch.nan)


def partner_mean(predicted_BKN: Tensor, label_BN: Tensor, rule: Rule = "fidelity", eps: float = EPSILON) -> Tensor:
    """What each score earns: the mean over its image's partners, ``(B, K)``; NaN for an image without a partner.

    Args:
        predicted_BKN: probability, by score k of image i, that i is better than partner n.
        label_BN: what people said, NaN where the two are not compared.
        rule, eps: see :func:`ranking_reward`.
    """
    partner_BN = torch.isfinite(label_BN)
    label_B1N = torch.where(partner_BN, label_BN, 0.5)[:, None, :].to(predicted_BKN.dtype)
    if rule == "binary":
        earned_BKN = (torch.sign(predicted_BKN - 0.5) == torch.sign(label_B1N - 0.5)).to(predicted_BKN.dtype)
    else:
        earned_BKN = fidelity(predicted_BKN, label_B1N, eps)
    partners_B = partner_BN.sum(1)
    reward_BK = torch.where(partner_BN[:, None, :], earned_BKN, 0).sum(-1) / partners_B.clamp(min=1)[:, None]
    return reward_BK.masked_fill((partners_B == 0)[:, None], torch.nan)
