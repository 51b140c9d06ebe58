"""Tensors and arrays: what they must be, checked for all of a call before anything is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqr1_metric.images.errors import ImageContractError, ImageError

#: Floats may leave their range by rounding (a bicubic resize, a half-precision decoder) by this share of its width.
FLOAT_TOLERANCE = 1e-3
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHANNELS = (1, 3, 4)
#: Transparent images are laid over white in bands of so many pixels: in floats a whole one would take many times the
#: memory of the image itself.
_BAND_PIXELS = 1 << 18

#: ``data_range`` as users give it: ``(low, high)``, or one number for ``(0, high)``.
DataRange = float | tuple[float, float]


@dataclass(frozen=True)
class FloatRange:
    """What floating tensors and arrays hold. 8- and 16-bit integers and files are not affected.

    Args:
        low, high: the values of black and of white.
        clamp: take values beyond them as black or white; without, they are the caller's mistake.
    """

    low: float = 0.0
    high: float = 1.0
    clamp: bool = False

    @classmethod
    def of(cls, data_range: DataRange = (0.0, 1.0), clamp: bool = False) -> FloatRange:
        """From what a user gives, such as ``(-1, 1)`` or ``255``.

        Raises:
            ValueError: for anything but two finite numbers in rising order.
        """
        try:
            low, high = (0.0, data_range) if isinstance(data_range, (int, float)) else data_range
            low, high = float(low), float(high)
        except (TypeError, ValueError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"Expected data_range as (low, high), such as (-1, 1), or as high, but got {data_range!r}."
            )
        if not isinstance(clamp, bool):
            raise ValueError(f"Expected clamp to be True or False, but got {clamp!r}.")
        return cls(low, high, clamp)

    @property
    def data_range(self) -> tuple[float, float]:
        """``(low, high)``."""
        return self.low, self.high

    def holds(self, low: float, high: float) -> bool:
        """May an image have these extremes? False for NaN."""
        slack = FLOAT_TOLERANCE * (self.high - self.low)
        return low >= self.low - slack and high <= self.high + slack

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


UNIT_RANGE = FloatRange()


def check_images(images: Sequence[object], floats: FloatRange = UNIT_RANGE, names: Sequence[str] | None = None) -> None:
    """Check the tensors, arrays and PIL images of floats among ``images``; nothing is decoded or kept.

    NaN and infinity pass: they are data, see :class:`~vqr1_metric.images.errors.ImageContractError`.

    Raises:
        ImageContractError: that says how many of how many are wrong, and what would be right.
    """
    refused: list[tuple[int, str]] = []
    held: list[tuple[int, Tensor | NDArray[np.generic]]] = []
    total = 0
    for index, image in enumerate(images):
        if isinstance(image, Image.Image) and image.mode == "F" and image.format is None:
            image = np.asarray(image)
        if not isinstance(image, (Tensor, np.ndarray)):
            continue
        total += 1
        problem = form_problem(image)
        if problem is not None:
            refused.append((index, problem))
        elif _is_floating(image):
            held.append((index, image))
    if not refused:
        bad = [(i, image, lo, hi) for i, image, lo, hi in _extremes(held) if not floats.holds(lo, hi)]
        bad = [entry for entry in bad if math.isfinite(entry[2]) and math.isfinite(entry[3])]
        if not bad or floats.clamp:
            return
        first = bad[0][0]
        low, high = min(entry[2] for entry in bad), max(entry[3] for entry in bad)
        share = sum(_share_outside(image, floats) for _, image, _, _ in bad) / len(bad)
        refused = [(entry[0], range_problem(low, high, share, floats)) for entry in bad]
    first, problem = refused[0]
    name = f"image {first}" if names is None else names[first]
    if len(images) == 1:
        raise ImageContractError(f"{name}: {problem}")
    kinds = "images" if total == len(images) else "tensors and arrays"
    raise ImageContractError(f"{len(refused)} of {total} {kinds}, the first of them {name}: {problem}")


def form_problem(image: Tensor | NDArray[np.generic]) -> str | None:
    """What is wrong with the dtype or shape of one image, ``(C, H, W)`` as a tensor and ``(H, W[, C])`` as an array."""
    shape = tuple(image.shape)
    if isinstance(image, Tensor):
        if image.is_meta or image.layout != torch.strided:
            return f"expected a dense tensor that holds pixels, but got {image.layout} on {image.device}"
        if image.ndim != 3:
            return f"expected a tensor of shape (C, H, W), but got {shape}{_shape_hint(shape)}"
        if shape[0] not in _CHANNELS:
            hint = "; this looks like (H, W, C): permute it to (C, H, W) with x.permute(2, 0, 1)"
            known = shape[2] in _CHANNELS and shape[2]
            return f"expected 1, 3 or 4 channels in (C, H, W), but got {shape}{hint if known else ''}"
        if image.dtype != torch.uint8 and image.dtype not in _FLOATS:
            return f"expected uint8 in 0..255 or floats in [0, 1], but got {image.dtype}{_dtype_hint(str(image.dtype))}"
    else:
        if image.ndim not in (2, 3) or (image.ndim == 3 and shape[-1] not in _CHANNELS):
            hint = "; this looks like (C, H, W): transpose it to (H, W, C) with x.transpose(1, 2, 0), or pass a tensor"
            known = image.ndim == 3 and shape[0] in _CHANNELS
            hint = hint if known else _shape_hint(shape, is_array=True)
            return f"expected an array of shape (H, W) or (H, W, 1, 3 or 4), but got {shape}{hint}"
        if image.dtype not in (np.uint8, np.uint16) and image.dtype not in (np.float16, np.float32, np.float64):
            hint = _dtype_hint(str(image.dtype))
            return f"expected uint8, uint16 or floats in [0, 1], but got an array of {image.dtype}{hint}"
    return None if 0 not in shape else f"expected at least one pixel, but got shape {shape}"


def _shape_hint(shape: tuple[int, ...], is_array: bool = False) -> str:
    if len(shape) == 1:
        return "; are these labels? Pass the images alone, such as batch[0]"
    if len(shape) == 5:
        if is_array:
            line = "x.reshape(-1, *x.shape[2:])"
        else:
            channels_second = shape[1] in _CHANNELS and shape[2] != 3
            line = "x.movedim(1, 2).flatten(0, 1)" if channels_second else "x.flatten(0, 1)"
        return f"; is this a video? Pass its frames as a batch: {line}"
    return ""


def _dtype_hint(dtype: str) -> str:
    if "bool" in dtype:
        return "; a mask has no quality, but x.float() would be an image of 0 and 1"
    if "uint16" in dtype:
        return "; pass x.float() / 65535"
    return "; for values in 0..255 pass x.to(torch.uint8), of an array x.astype('uint8')" if "int" in dtype else ""


def range_problem(low: float, high: float, share: float, floats: FloatRange) -> str:
    """The sentence for floats outside their range, with the way out that these values suggest.

    Args:
        low, high: extremes of the values.
        share: of the values that lie outside.
        floats: what was expected.
    """
    said = f"expected floats in {floats}, but got values from {low:.4g} to {high:.4g}; "
    width = floats.high - floats.low
    below, above = (floats.low - low) / width, (high - floats.high) / width
    if max(below, above) <= 0.5 and share <= 0.25:
        return said + "a network's output overshoots: pass clamp=True, or x.clamp"
    if floats == UNIT_RANGE and -1.5 <= low < -0.5 and 0.5 < high <= 1.5:
        return said + "for values in [-1, 1] pass (x + 1) / 2 or data_range=(-1, 1), with clamp=True if they overshoot"
    if floats != FloatRange(0, 255) and high > 16 and low >= -0.1 * high and high <= 300:
        return said + "for values in [0, 255] pass x / 255, uint8 or data_range=255, with clamp=True if they overshoot"
    return said + (
        "undo the normalisation first (x * std + mean), say what they mean with data_range=(low, high), or, if a "
        "network overshoots so far, pass clamp=True"
    )


def tensor_pixels(image: Tensor, name: str, floats: FloatRange = UNIT_RANGE) -> Tensor:
    """One tensor ``(C, H, W)`` as RGB, ``(3, H, W)``, uint8 or floating in [0, 1], attached to the autograd graph.

    Raises:
        ImageContractError: for another form or range.
        ImageError: for NaN or infinity.
    """
    problem = form_problem(image)
    if problem is not None:
        raise ImageContractError(f"{name}: {problem}")
    if image.is_floating_point():
        ((_, _, low, high),) = _extremes([(0, image)])
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ImageError(f"{name}: expected finite values, but it holds NaN or infinity")
        if not floats.holds(low, high) and not floats.clamp:
            raise ImageContractError(f"{name}: {range_problem(low, high, _share_outside(image, floats), floats)}")
        if floats.data_range != (0, 1):
            image = (image - floats.low) / (floats.high - floats.low)
        if low < floats.low or high > floats.high or floats.data_range != (0, 1):
            image = image.clamp(0, 1)
    if image.shape[0] == 4:
        return over_white(image)
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def array_pixels(image: NDArray[np.generic], name: str, floats: FloatRange = UNIT_RANGE) -> Tensor:
    """One array ``(H, W)`` or ``(H, W, C)`` as :func:`tensor_pixels` gives it."""
    problem = form_problem(image)
    if problem is not None:
        raise ImageContractError(f"{name}: {problem}")
    if image.dtype == np.uint16:
        image = np.round(image.astype(np.float32) / 257).astype(np.uint8)  # 65535 / 257 = 255
    if image.ndim == 2:
        image = image[..., None]
    # Always a copy: the array may be read-only, or belong to a file that is about to be closed.
    return tensor_pixels(torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")), name, floats)


def over_white(image: Tensor) -> Tensor:
    """RGBA laid over white, in the arithmetic of its dtype."""
    rgb, alpha = image[:3], image[3:]
    if image.is_floating_point():
        return rgb * alpha + (1 - alpha)
    over = torch.empty_like(rgb)
    rows = max(1, _BAND_PIXELS // image.shape[-1])
    for band in zip(*(torch.split(part, rows, 1) for part in (rgb, alpha, over)), strict=True):
        colour, opacity, target = band[0].float(), band[1].float() / 255, band[2]
        target.copy_((colour * opacity + 255 * (1 - opacity)).round())
    return over


def _is_floating(image: Tensor | NDArray[np.generic]) -> bool:
    return image.is_floating_point() if isinstance(image, Tensor) else image.dtype.kind == "f"


def _extremes(
    images: Iterable[tuple[int, Tensor | NDArray[np.generic]]],
) -> list[tuple[int, Tensor | NDArray[np.generic], float, float]]:
    """Lowest and highest value of each, with one transfer from each device; NaN spreads to both."""
    images = list(images)
    lows: dict[int, tuple[float, float]] = {}
    on_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, (_, image) in enumerate(images):
        if isinstance(image, Tensor):
            on_device.setdefault(image.device, []).append((place, torch.stack(image.detach().aminmax()).double()))
        else:
            lows[place] = (float(image.min()), float(image.max()))
    for entries in on_device.values():
        for (place, _), (low, high) in zip(entries, torch.stack([e[1] for e in entries]).tolist(), strict=True):
            lows[place] = (low, high)
    return [(index, image, *lows[place]) for place, (index, image) in enumerate(images)]


def _share_outside(image: Tensor | NDArray[np.generic], floats: FloatRange) -> float:
    values = image.detach() if isinstance(image, Tensor) else torch.from_numpy(np.array(image, np.float32))
    return float(((values < floats.low) | (values > floats.high)).float().mean())
