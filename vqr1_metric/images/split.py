"""Single images out of whatever users hold: batches, lists, loaders, folders, a pipeline's output."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import is_dataclass
from typing import IO, TypeGuard, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqr1_metric.images.contract import form_problem
from vqr1_metric.images.errors import ImageContractError

#: One image. An open file is read from its beginning.
ImageLike = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], Image.Image, NDArray[np.generic], Tensor
]
#: What ``score``, ``update`` and the like take.
Images = Union[ImageLike, Sequence["Images"], Iterable["Images"]]  # noqa: UP007 (recursive)

_FILE_BYTES = (bytes, bytearray, memoryview)
_EXPECTED = "Expected images as a tensor (B, C, H, W), a path, bytes, an open file, a PIL image, an array, or a list"


def describe(image: object, index: int | None = None) -> str:
    """A short name for error messages: the path where there is one, else the position in the batch."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    filename = getattr(image, "filename", None) or (getattr(image, "name", None) if is_file(image) else None)
    if filename and isinstance(filename, (str, os.PathLike)):
        return os.fspath(filename)
    return "image" if index is None else f"image {index}"


def is_file(image: object) -> TypeGuard[IO[bytes]]:
    """Is it an open file, or something that is read as one?"""
    return callable(getattr(image, "read", None)) and not isinstance(image, (Image.Image, os.PathLike))


def file_bytes(file: IO[bytes] | IO[str], name: str) -> bytes:
    """The whole content of an open file, wherever its position is.

    Raises:
        ImageContractError: for one that was opened as text.
    """
    if isinstance(file, io.TextIOBase):
        raise ImageContractError(f"{name}: expected a file opened in binary mode, as open(path, 'rb') does")
    with suppress(AttributeError, OSError):  # a stream, from a network or a pipe, has no beginning to go to
        file.seek(0)
    data: object = file.read()
    if not isinstance(data, _FILE_BYTES):
        raise ImageContractError(f"{name}: expected a file opened in binary mode, as open(path, 'rb') does")
    return bytes(data)


def split_images(images: Images) -> list[ImageLike]:
    """All of :func:`iterate_images`."""
    return list(iterate_images(images))


def iterate_images(images: Images) -> Iterator[ImageLike]:
    """The single images of whatever users hold, one after the other, without decoding any.

    - one image: a path, bytes, an open file, a PIL image, a tensor ``(C, H, W)``, an array ``(H, W)`` or ``(H, W, C)``;
    - a batch: a tensor ``(B, C, H, W)`` or an array ``(B, H, W, C)``;
    - a folder: its images, sorted by name, without those of its subfolders;
    - a list, tuple or iterator of any of these (but folders), mixed and nested: a ``DataLoader`` of images alone;
    - the output object of a diffusers pipeline of images.

    Raises:
        ImageContractError: for anything else, with the line that works where it can be known.
    """
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
        yield from _folder(os.fspath(images))
        return
    yield from _flat(images, None)


def _flat(given: object, place: int | None) -> Iterator[ImageLike]:
    """``place`` is the position in the container that ``given`` came out of, None for what the user handed over."""
    where = _EXPECTED if place is None else f"item {place}: expected an image"
    if isinstance(given, (str, os.PathLike, Image.Image, *_FILE_BYTES)) or is_file(given):
        yield given
    elif isinstance(given, (Tensor, np.ndarray)):
        yield from _from_batch(given, where)
    elif isinstance(given, Mapping) or (is_dataclass(given) and not isinstance(given, type)):
        yield from _from_output(given, where)
    elif isinstance(given, Set):
        raise ImageContractError(f"{where}, but got a set, which has no order: pass sorted(x)")
    elif hasattr(given, "__dataframe__") or hasattr(given, "columns"):
        raise ImageContractError(f"{where}, but got a table: pass the column that holds paths, such as table['image']")
    elif hasattr(given, "__array__") and hasattr(given, "shape"):  # of JAX, a column of pandas, ...
        yield from _from_batch(np.asarray(given), where)
    elif isinstance(given, Iterable):
        yield from _from_container(given)
    else:
        raise ImageContractError(f"{where}, but got {type(given).__name__}{_place_hint(given)}")


def _from_batch(batch: Tensor | NDArray[np.generic], where: str) -> Iterator[ImageLike]:
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "OU" and batch.ndim == 1:
        yield from _from_container(batch.tolist())
    elif batch.ndim == 4:
        yield from batch
    elif batch.ndim == 3 or (batch.ndim == 2 and isinstance(batch, np.ndarray)):
        yield batch
    else:
        kind = "tensor of shape (B, C, H, W) or (C, H, W)" if isinstance(batch, Tensor) else "array (B, H, W, C)"
        said = (form_problem(batch) or "").partition(", but got ")[2] or f"{tuple(batch.shape)}"
        raise ImageContractError(
            f"{where if where is not _EXPECTED else 'Expected images'} as a {kind}, but got {said}"
        )


def _from_container(container: Iterable[object]) -> Iterator[ImageLike]:
    held = container if isinstance(container, (list, tuple)) else None
    if held and len(held) == 2 and (isinstance(held[0], (list, tuple)) or getattr(held[0], "ndim", 0) == 4):
        second = held[1]
        flags = isinstance(second, (list, tuple)) and second and all(isinstance(flag, bool) for flag in second)
        if second is None or flags:
            raise ImageContractError(
                "Expected images, but got a pair like the (images, flags) of a pipeline with return_dict=False: pass "
                "the first of it, x[0]"
            )
        if isinstance(second, Tensor) and second.ndim < 3:
            raise ImageContractError(
                f"Expected images, but got a pair of which the second has shape {tuple(second.shape)}, like a "
                "loader's batch of images and labels: pass the images alone, for images, labels in loader: ..."
            )
    for place, item in enumerate(container):
        yield from _flat(item, place)


def _from_output(output: object, where: str) -> Iterator[ImageLike]:
    images = getattr(output, "images", None)
    if images is not None and not callable(images):
        yield from iterate_images(images)
        return
    if getattr(output, "frames", None) is not None:
        raise ImageContractError(f"{where}, but got a pipeline's video: pass the frames of one clip, output.frames[0]")
    if isinstance(output, Mapping):
        keys = [str(key) for key in output]
        likely = next((key for key in ("image", "images", "pixel_values", "img", "path") if key in keys), None)
        hint = f": pass x[{likely!r}]" if likely else ""
        raise ImageContractError(f"{where}, but got a dict with the keys {', '.join(keys[:8])}{hint}")
    raise ImageContractError(f"{where}, but got {type(output).__name__}")


def _place_hint(given: object) -> str:
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return ": pass its images, such as (item[0] for item in data)"
    return ""


def _folder(folder: str) -> Iterator[str]:
    from vqr1_metric.images.find import ImageFinder

    found = [image.name for image in ImageFinder([folder]) if image.problem is None]
    if not found:
        raise ImageContractError(
            f"{folder}: expected images in this folder, but there is none (subfolders do not count)"
        )
    yield from found
