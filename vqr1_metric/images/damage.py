"""Damage that Pillow passes over: lossy files whose coded data has a hole, and libraries that speak past Python.

Decoders of lossy formats turn nearly any bytes into pixels. What can be told is told here: for JPEG all that libjpeg
itself finds corrupt, for the others a hole of zeros.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

#: Formats whose files are looked at: the longest run of zero bytes that a good one may hold, and how much longer it may
#: be for every pixel in a flat tile. Measured on photographs, pages, gradients and flat images: runs of up to 54 bytes
#: (JPEG 2000), for flat white .0001 a pixel (WebP) and .006 (JPEG), 117 in a gradient (progressive JPEG).
LOSSY = {
    "JPEG": (256, 0.02), "MPO": (256, 0.02), "WEBP": (64, 0.003), "AVIF": (64, 0.003), "HEIF": (64, 0.003),
    "JPEG2000": (64, 0.003), "JXL": (64, 0.003),
}  # fmt: skip
_HOLES = re.compile(rb"\x00{64,}")
_TILE = 8
#: What libjpeg says of corrupt data, as against of what it merely does not know.
_CORRUPT = re.compile(
    r"Corrupt JPEG|Premature end|Unsupported marker|Bogus|Inconsistent progression|Invalid (component|crop)"
)
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x(\w\w)")
#: Markers that follow coded data (restart, end, tables of the next scan, next scan); before others, of metadata, some
#: cameras leave bytes. So do encoders at the end, but few.
_AFTER_SCANS = re.compile("d[0-9a]|c4")
_HARMLESS_BYTES = 4


def find_damage(format: str, data: bytes, image: Image.Image) -> str | None:
    """What is damaged in a file that Pillow has decoded; None where nothing can be told.

    Args:
        format: Pillow's name of it, a key of :data:`LOSSY`.
        data: the whole file.
        image: as decoded.
    """
    if format in ("JPEG", "MPO"):
        try:
            return _libjpeg_complaint(data)
        except ImportError:  # simplejpeg cannot be installed everywhere
            pass
    longest = max((len(hole.group()) for hole in _HOLES.finditer(_coded(format, data))), default=0)
    allowed, per_flat_pixel = LOSSY[format]
    if longest > allowed and longest > allowed + per_flat_pixel * _flat_pixels(image):
        return f"a hole of {longest} zero bytes in its coded data"
    return None


def silence_libtiff() -> None:
    """Stop libtiff from writing to the terminal: Pillow raises its errors, and its warnings are about odd tags."""
    _silence_libtiff()


@lru_cache(maxsize=1)
def _silence_libtiff() -> None:
    try:
        # The symbols of the libtiff that Pillow's own extension was linked with.
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)
    except (OSError, AttributeError):  # a Pillow without libtiff, or a system that hides them
        pass


def _libjpeg_complaint(data: bytes) -> str | None:
    """libjpeg's warnings, which Pillow drops: the file decoded once more, at an eighth of its size, strictly."""
    from simplejpeg import decode_jpeg  # type: ignore[import-untyped]

    try:
        decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
    except Exception as error:  # its own errors have no common class
        said = str(error)
        spare = _EXTRANEOUS.match(said)
        harmless = spare and (int(spare[1]) <= _HARMLESS_BYTES or not _AFTER_SCANS.match(spare[2]))
        if _CORRUPT.match(said) and not harmless:
            return said[:1].lower() + said[1:]
    return None


def _coded(format: str, data: bytes) -> memoryview | bytes:
    """The file without what may hold zeros in a good one: metadata, padding at the end."""
    if format in ("JPEG", "MPO"):
        start, end = data.find(b"\xff\xda"), data.rfind(b"\xff\xd9")
        return memoryview(data)[start:end] if 0 <= start < end else data
    if format == "WEBP":
        return b"".join(_webp_frames(data))
    if format in ("AVIF", "HEIF"):
        return b"".join(_boxes(data, b"mdat"))
    if format == "JPEG2000" and b"\xff\x93" in data:
        return memoryview(data)[data.find(b"\xff\x93") :].tobytes().rstrip(b"\x00")
    return data.rstrip(b"\x00")


def _webp_frames(data: bytes, start: int = 12) -> list[bytes]:
    frames = []
    while start + 8 <= len(data):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            frames.append(data[start + 8 : start + 8 + size])
        elif kind == b"ANMF":
            frames += _webp_frames(data[: start + 8 + size], start + 24)
        start += 8 + size + size % 2
    return frames


def _boxes(data: bytes, wanted: bytes) -> list[bytes]:
    found, start = [], 0
    while start + 8 <= len(data):
        size, kind, head = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        if kind == wanted:
            found.append(data[start + head : start + size if size else len(data)])
        if size < head:
            break
        start += size
    return found


def _flat_pixels(image: Image.Image) -> int:
    """Pixels in tiles of one colour: what encoders may write as zeros."""
    pixels: NDArray[np.uint8] = np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
    height, width = (side - side % _TILE for side in pixels.shape[:2])
    tiles = pixels[:height, :width].reshape(height // _TILE, _TILE, width // _TILE, _TILE, 3)
    spread = tiles.max((1, 3)).astype(np.int16) - tiles.min((1, 3))
    return int((spread.max(-1) <= 2).sum()) * _TILE**2
