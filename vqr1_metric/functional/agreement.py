"""Agreement of scores with opinions: rank correlation (SRCC), correlation (PLCC), pairs in the right order."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Rank of each value from 1, ties sharing the mean of theirs; shape ``(N,)``, float64."""
    ordered, order = values.sort()
    _, group, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    shared = counts.cumsum(0).double() - (counts - 1) / 2
    found = torch.empty(len(values), dtype=torch.float64, device=values.device)
    found[order] = shared[group]
    return found


def plcc(scores: Tensor, opinions: Tensor) -> float:
    """Pearson's correlation, in [-1, 1]; NaN where either is constant or fewer than two are there.

    Args:
        scores, opinions: shape ``(N,)``, finite.

    Example:
        >>> round(plcc(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 4.0])), 3)
        0.929
    """
    x, y = scores.double(), opinions.double()
    if len(x) < 2 or bool(x.max() == x.min()) or bool(y.max() == y.min()):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(((x / x.norm()) @ (y / y.norm())).clamp(-1, 1))


def srcc(scores: Tensor, opinions: Tensor) -> float:
    """Spearman's rank correlation, in [-1, 1], ties sharing a rank; NaN as for :func:`plcc`.

    Args:
        scores, opinions: shape ``(N,)``, finite.

    Example:
        >>> srcc(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 5.0, 6.0]))
        1.0
    """
    return plcc(ranks(scores), ranks(opinions))


def pairs_agreement(gaps: Tensor, preferred: Tensor) -> float:
    """Share of pairs that scores order as people do, a tie in score counting half.

    Args:
        gaps: score of the first minus that of the second image of each pair, shape ``(P,)``; NaN leaves a pair out.
        preferred: the same of opinions or votes (their share minus a half, say); 0 leaves a pair out.
    """
    decided = torch.isfinite(gaps) & (preferred != 0)
    right = 0.5 + 0.5 * (gaps[decided].sign() * preferred[decided].sign()).double()
    return float(right.mean()) if len(right) else float("nan")
