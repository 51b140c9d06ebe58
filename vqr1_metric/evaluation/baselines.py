"""Scorers without parameters: what a model must beat to be worth its size. Higher means better."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.images import ImageError

#: Weights of red, green and blue in luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


def luma(path: Path, short_edge: int | None = None) -> NDArray[Any]:
    """Luma of a picture, shape ``(H, W)``, 0 to 255, after the data set's resizing."""
    grey: NDArray[Any] = np.asarray(load_picture(path, short_edge)).astype(np.float64) @ np.array(LUMA)
    return grey


def log_laplacian_variance(grey: NDArray[Any]) -> float:
    """Logarithm of the variance of the 4-neighbour Laplacian: sharpness, and noise with it.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000.
    """
    if min(grey.shape) < 3:
        return math.nan
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    # The floor, a thousandth of a grey level squared, gives a flat picture a score too.
    return math.log(laplacian.var() + 1e-6)


def contrast(grey: NDArray[Any]) -> float:
    """Standard deviation of luma: root mean square contrast."""
    return float(grey.std())


BASELINES: dict[str, Callable[[NDArray[Any]], float]] = {
    "log Laplacian variance": log_laplacian_variance,
    "contrast": contrast,
}


def baseline_scores(path: Path, short_edge: int | None = None) -> dict[str, float]:
    """Every baseline of one picture; NaN where it cannot be read."""
    try:
        grey = luma(path, short_edge)
    except ImageError:
        return dict.fromkeys(BASELINES, math.nan)
    return {name: function(grey) for name, function in BASELINES.items()}
