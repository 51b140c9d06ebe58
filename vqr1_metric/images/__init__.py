"""Images: opened, decoded ahead of their use, found in folders and lists, distorted."""

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
    "ImageError",
    "ImageLike",
    "load_image",
    "split_images",
    "describe",
    "FORMATS",
    "SUFFIXES",
    "MAX_PIXELS",
    "MAX_ASPECT_RATIO",
    "FLOAT_TOLERANCE",
]
