"""Rewards for training loops of picture generators: `vqr1_reward`, in the shape that Flow-GRPO asks for.

A reward that carries gradients to the pixels (ReFL, DRaFT) needs no adapter:
``scorer.distributions(images, differentiable=True).mean``; see ``examples/reward_backprop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqr1_metric.images import ImageError
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

Reward = Callable[[Any, Sequence[str] | None, Sequence[dict] | None], tuple[np.ndarray, dict]]


def vqr1_reward(
    device: str | torch.device | None = None,
    model: str = DEFAULT_MODEL,
    *,
    scorer: QualityScorer | None = None,
    **options: Any,
) -> Reward:
    """A deterministic quality reward, ``fn(images, prompts, metadata) -> (scores, {})``, as Flow-GRPO has them.

    ``images`` are a tensor ``(N, C, H, W)`` floating in [0, 1] or an array ``(N, H, W, C)`` of uint8; floats are
    rounded to 8 bits first, so that both forms of a picture get the same reward. ``prompts`` and ``metadata`` are not
    looked at. ``scores`` is a float32 array ``(N,)`` of expected scores in [1, 5]. The weights load at the first call.

    Args:
        device: where the scoring model runs; the pictures may be elsewhere.
        model: Hugging Face Hub name, local folder, or ``"nano"``.
        scorer: a ready scorer instead.
        options: of :class:`~vqr1_metric.scorer.QualityScorer`, such as ``dtype`` and ``batch_tokens``.

    Raises:
        ImageError: by ``fn``, a ValueError, for pictures of another form, or of which one has no score: a reward is
            never invented, and NaN would spoil the advantages of its whole group.
    """
    if scorer is None:
        scorer = QualityScorer(model, device=device, **options)
    elif options or device is not None or model != DEFAULT_MODEL:
        raise ValueError("Expected a scorer, or device, model and options to make one, but got both.")
    if scorer.mode != "score":
        raise ValueError(f'Expected a scorer with mode="score", which is deterministic, but got {scorer.mode!r}.')

    def reward(
        images: Tensor | np.ndarray, prompts: Sequence[str] | None = None, metadata: Sequence[dict] | None = None
    ) -> tuple[np.ndarray, dict]:
        results = scorer.score(_as_bytes(images), on_error="raise")
        for result in results:
            if result.error is not None:
                raise ImageError(f"{result.name}: {result.error}")
        return np.array([result.score for result in results], dtype=np.float32), {}

    return reward


def _as_bytes(images: Tensor | np.ndarray) -> Tensor:
    """Pictures as uint8, ``(N, C, H, W)``."""
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] == 3:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point():
        images = images.detach().float()
        low, high = images.aminmax()
        if not (low >= -1e-2 and high <= 1 + 1e-2):  # also NaN; half-precision decoders leave the range by a little
            raise ImageError(f"Expected pictures in [0, 1], but got values from {low:.4g} to {high:.4g}.")
        return (images * 255).round().clamp(0, 255).to(torch.uint8)
    kind = f"{type(images).__name__} of {getattr(images, 'dtype', '?')} and shape {tuple(getattr(images, 'shape', ()))}"
    raise ImageError(f"Expected a float tensor (N, 3, H, W) or a uint8 array (N, H, W, 3), but got a {kind}.")
