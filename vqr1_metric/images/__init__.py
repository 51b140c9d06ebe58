"""Images: opened, decoded ahead of their use, found in folders and lists, distorted.

The names of :mod:`~vqr1_metric.images.decode` are imported when first used: finding files needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqr1_metric.images.decode import (
        FLOAT_TOLERANCE,
        FORMATS,
        MAX_ASPECT_RATIO,
        MAX_PIXELS,
        SUFFIXES,
        ImageError,
        ImageLike,
        describe,
        load_image,
        split_images,
    )

__all__ = [
    "FLOAT_TOLERANCE",
    "FORMATS",
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageError",
    "ImageLike",
    "describe",
    "load_image",
    "split_images",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vqr1_metric.images.decode"), name)
