"""Pictures read in order, files decoded by threads ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from vqr1_metric.images import ImageError, ImageLike, describe, load_image

#: So many files, and about so many pixels, are decoded ahead of their use.
AHEAD_PICTURES, AHEAD_PIXELS = 64, 64_000_000
_THREADS = min(8, os.cpu_count() or 1)


def read_pictures(images: Iterable[ImageLike]) -> Iterator[tuple[str, Tensor | ImageError]]:
    """Name and pixels, or what is wrong with them, of one picture after the other.

    Files and bytes are decoded by threads while the caller works on the pictures before them (Pillow lets other threads
    run meanwhile). Tensors, arrays and PIL pictures are not read ahead: there is little to decode, and a PIL picture
    that occurs twice must not be loaded by two threads.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="vqr1-decode")
    waiting: deque[tuple[str, ImageLike | Future]] = deque()
    ahead, largest = _THREADS, 1  # until the first picture shows how large they are
    try:
        for index, image in enumerate(images):
            name = describe(image, index)
            is_file = isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview))
            waiting.append((name, pool.submit(_load, image, name) if is_file else image))
            while waiting and (len(waiting) > ahead or not isinstance(waiting[0][1], Future)):
                name, pixels = _finish(*waiting.popleft())
                if isinstance(pixels, Tensor):
                    largest = max(largest, pixels[0].numel())
                    ahead = max(1, min(AHEAD_PICTURES, AHEAD_PIXELS // largest))
                yield name, pixels
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(name: str, image: ImageLike | Future) -> tuple[str, Tensor | ImageError]:
    return name, image.result() if isinstance(image, Future) else _load(image, name)


def _load(image: ImageLike, name: str) -> Tensor | ImageError:
    try:
        return load_image(image, name)
    except ImageError as error:
        return error
