"""Interval of a mean by resampling."""

from __future__ import annotations

import torch
from torch import Tensor

#: Indices drawn at a time: bounds the memory to about 100 MB.
_CHUNK = 4_000_000


def bootstrap_mean_interval(
    values: Tensor, level: float = 0.95, num_bootstraps: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: shape ``(N,)``, finite; on any device.
        level: share of the resampled means inside, in (0, 1).
        num_bootstraps: resamples of N values each, at least 1.
        seed: the same seed and values give the same interval, on every device.

    Returns:
        ``(low, high)``, each of shape ``()``; NaN for fewer than two values, which say nothing of their spread.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Example:
        >>> bootstrap_mean_interval(torch.tensor([3.0, 3.0, 3.0]))
        (tensor(3.), tensor(3.))
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected a confidence level in (0, 1), such as 0.95, but got {level!r}.")
    if num_bootstraps < 1:
        raise ValueError(f"Expected num_bootstraps of at least 1, but got {num_bootstraps}.")
    if len(values) < 2:
        return values.new_tensor(torch.nan), values.new_tensor(torch.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn_from = values.detach().to("cpu", torch.float64)
    at_once = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, num_bootstraps, at_once):
        shape = (min(at_once, num_bootstraps - start), len(values))
        means.append(drawn_from[torch.randint(len(values), shape, generator=generator)].mean(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails).to(values.dtype).to(values.device)
    return low, high
