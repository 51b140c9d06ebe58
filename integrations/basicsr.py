"""BasicSR: the score among the ``val: metrics:`` of a yaml file, beside PSNR and SSIM.

Importing this module registers ``calculate_vqr1``; do so at the top of the training script:

    import vqr1_metric.integrations.basicsr

    val:
      metrics:
        vqr1:
          type: calculate_vqr1
          model: nano        # a Hub name, a folder, or "nano"
          crop_border: 4
          better: higher

BasicSR is no dependency of this package.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

try:
    from basicsr.utils.registry import METRIC_REGISTRY
except ModuleNotFoundError as error:
    if error.name != "basicsr":
        raise
    raise ModuleNotFoundError("vqr1_metric.integrations.basicsr needs BasicSR: pip install basicsr") from None

#: What BasicSR passes to every metric, and this one does not need.
_NOT_OURS = ("img2", "better", "test_y_channel")


def calculate_vqr1(
    img: np.ndarray, crop_border: int = 0, input_order: str = "HWC", model: str = DEFAULT_MODEL, **kwargs: Any
) -> float:
    """Quality of one picture on a scale of 1 to 5, without its reference.

    Args:
        img: uint8, BGR as in BasicSR, shape ``(H, W, C)``, ``(C, H, W)`` for ``input_order="CHW"``, or ``(H, W)``.
        crop_border: pixels left out at every edge.
        input_order: ``"HWC"`` or ``"CHW"``.
        model: Hugging Face Hub name, local folder, or ``"nano"``; loaded at the first call and kept.
        kwargs: options of :class:`~vqr1_metric.scorer.QualityScorer`; ``img2`` and ``better`` are ignored.

    Returns:
        The score; NaN, which spreads to BasicSR's mean, for a picture that has none.

    Raises:
        ValueError: for another type or shape of ``img``, or a border that leaves nothing.
    """
    if not isinstance(img, np.ndarray) or img.dtype != np.uint8 or img.ndim not in (2, 3):
        got = f"{img.dtype} of shape {img.shape}" if isinstance(img, np.ndarray) else type(img).__name__
        raise ValueError(f"Expected a picture as uint8 array of 2 or 3 dimensions, but got {got}.")
    if input_order not in ("HWC", "CHW"):
        raise ValueError(f"Expected input_order 'HWC' or 'CHW', but got {input_order!r}.")
    if input_order == "CHW" and img.ndim == 3:
        img = img.transpose(1, 2, 0)
    height, width = img.shape[:2]
    if crop_border < 0 or 2 * crop_border >= min(height, width):
        raise ValueError(f"Expected a crop_border that leaves pixels of {width}x{height}, but got {crop_border}.")
    img = img[crop_border : height - crop_border, crop_border : width - crop_border]
    if img.ndim == 3 and img.shape[2] == 3:
        img = img[..., ::-1]  # BGR to RGB
    options = tuple(sorted((name, value) for name, value in kwargs.items() if name not in _NOT_OURS))
    return _scorer(model, options).score(np.ascontiguousarray(img))[0].score


@lru_cache
def _scorer(model: str, options: tuple[tuple[str, Any], ...]) -> QualityScorer:
    return QualityScorer(model, **dict(options))


if "calculate_vqr1" not in METRIC_REGISTRY:
    METRIC_REGISTRY.register(calculate_vqr1)
