"""Images: opened, checked, decoded ahead of their use, found in folders and lists, distorted."""

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
