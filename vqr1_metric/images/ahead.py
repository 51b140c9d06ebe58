"""Pictures read in order, files decoded by threads ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from vqr1_metric.images.contract import UNIT_RANGE, FloatRange
from vqr1_metric.images.decode import load_image
from vqr1_metric.images.errors import ImageContractError, ImageError
from vqr1_metric.images.split import ImageLike, Images, describe, file_bytes, is_file, iterate_images

#: So many files, and about so many pixels, are decoded ahead of their use.
AHEAD_PICTURES, AHEAD_PIXELS = 64, 64_000_000
_THREADS = min(8, os.cpu_count() or 1)


def read_images(images: Images, floats: FloatRange = UNIT_RANGE) -> Iterator[tuple[str, Tensor | ImageError]]:
    """Name and pixels, or what is wrong with them, of one picture after the other.

    Files and bytes are decoded by threads while the caller works on the pictures before them (Pillow lets other threads
    run meanwhile). Tensors, arrays and PIL pictures are not read ahead: there is little to decode, and a PIL picture
    that occurs twice must not be loaded by two threads.

    Raises:
        ImageContractError: at the first that is no picture or is a tensor or array of another form or range.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="vqr1-decode")
    waiting: deque[tuple[str, ImageLike | Future[Tensor | ImageError]]] = deque()
    ahead, largest = _THREADS, 1  # until the first picture shows how large they are
    try:
        for index, image in enumerate(iterate_images(images)):
            name = describe(image, index)
            image = file_bytes(image, name) if is_file(image) else image
            encoded = isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview))
            waiting.append((name, pool.submit(_load, image, name, floats) if encoded else image))
            while waiting and (len(waiting) > ahead or not isinstance(waiting[0][1], Future)):
                name, pixels = _finish(*waiting.popleft(), floats)
                if isinstance(pixels, Tensor):
                    largest = max(largest, pixels[0].numel())
                    ahead = max(1, min(AHEAD_PICTURES, AHEAD_PIXELS // largest))
                yield name, pixels
        while waiting:
            yield _finish(*waiting.popleft(), floats)
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(
    name: str, image: ImageLike | Future[Tensor | ImageError], floats: FloatRange
) -> tuple[str, Tensor | ImageError]:
    return name, image.result() if isinstance(image, Future) else _load(image, name, floats)


def _load(image: ImageLike, name: str, floats: FloatRange) -> Tensor | ImageError:
    try:
        return load_image(image, name, floats)
    except ImageContractError:
        raise
    except ImageError as error:
        return error
