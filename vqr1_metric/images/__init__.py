"""Images: opened, checked, decoded ahead of their use, found in folders and lists, distorted.

The names below are imported when first used: finding files and writing their names needs no torch, and the command line
answers ``--help`` without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqr1_metric.images.contract import FLOAT_TOLERANCE, UNIT_RANGE, DataRange, FloatRange, check_images
    from vqr1_metric.images.decode import MAX_ASPECT_RATIO, MAX_PIXELS, load_image, open_image
    from vqr1_metric.images.errors import ImageContractError, ImageError
    from vqr1_metric.images.formats import FORMATS, SUFFIXES
    from vqr1_metric.images.split import ImageLike, Images, describe, iterate_images, split_images

__all__ = [
    "ImageError",
    "ImageContractError",
    "ImageLike",
    "Images",
    "load_image",
    "open_image",
    "iterate_images",
    "split_images",
    "check_images",
    "describe",
    "FloatRange",
    "DataRange",
    "UNIT_RANGE",
    "FORMATS",
    "SUFFIXES",
    "MAX_PIXELS",
    "MAX_ASPECT_RATIO",
    "FLOAT_TOLERANCE",
]

_ROOMS = {
    "contract": ("FLOAT_TOLERANCE", "UNIT_RANGE", "DataRange", "FloatRange", "check_images"),
    "decode": ("MAX_ASPECT_RATIO", "MAX_PIXELS", "load_image", "open_image"),
    "errors": ("ImageContractError", "ImageError"),
    "formats": ("FORMATS", "SUFFIXES"),
    "split": ("ImageLike", "Images", "describe", "iterate_images", "split_images"),
}


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
