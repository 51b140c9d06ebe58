"""One image, whatever it comes as, to checked RGB pixels, by one set of rules. The only place that opens image files.

EXIF rotation is applied; colours become sRGB (:mod:`~vqr1_metric.images.colour`); transparency is laid over white; of
an animation the first frame counts; CMYK, palette and grey images become RGB; 16-bit images are scaled, not clipped;
floats must be finite and lie in their range. Damaged files are refused (:mod:`~vqr1_metric.images.damage`).
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from vqr1_metric.images.colour import sixteen_bit_levels, to_srgb
from vqr1_metric.images.contract import UNIT_RANGE, FloatRange, array_pixels, tensor_pixels
from vqr1_metric.images.damage import LOSSY, find_damage, silence_libtiff
from vqr1_metric.images.errors import ImageContractError, ImageError
from vqr1_metric.images.formats import openable, register_plugin, why_unknown
from vqr1_metric.images.split import ImageLike, describe, file_bytes, is_file

#: Larger files are refused before they are decoded; Pillow's own bound against decompression bombs.
MAX_PIXELS = 178_956_970
#: Qwen-VL's own limit; thinner images cannot be resized to a grid of patches without becoming something else.
MAX_ASPECT_RATIO = 200

_BITS_TAG, _SAMPLE_FORMAT_TAG, _PHOTOMETRIC_TAG = 258, 339, 262
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def load_image(image: ImageLike, name: str | None = None, floats: FloatRange = UNIT_RANGE) -> Tensor:
    """One image as RGB pixels.

    Args:
        image: a path, an open file, the bytes of an image file, a PIL image, an array or a tensor. Tensors are
            ``(C, H, W)`` (or ``(1, C, H, W)``), arrays ``(H, W)`` or ``(H, W, C)``, with C = 1, 3 or 4 (alpha); both
            uint8, or floating in ``floats``.
        name: what error messages call it; by default its path.
        floats: what floating tensors and arrays hold.

    Returns:
        Tensor of shape ``(3, H, W)``: uint8, or floating in [0, 1] and attached to the autograd graph if a floating
        tensor was given; on the tensor's own device, otherwise on the CPU.

    Raises:
        ImageContractError: for a tensor or array of another form or range, or what is no image at all.
        ImageError: for a bad file or NaN; with the image's name, what was expected and what came.
    """
    name = name or describe(image)
    if isinstance(image, Tensor):
        pixels = tensor_pixels(image[0] if image.ndim == 4 and image.shape[0] == 1 else image, name, floats)
    elif isinstance(image, np.ndarray):
        pixels = array_pixels(image, name, floats)
    elif isinstance(image, Image.Image):
        pixels = _pil_pixels(image, name, floats)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        pixels = _file_pixels(io.BytesIO(image), name)
    elif isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise ImageError(f"{name}: {_why_no_file(image)}")
        pixels = _file_pixels(Path(image), name)
    elif is_file(image):
        pixels = _file_pixels(io.BytesIO(file_bytes(image, name)), name)
    else:
        raise ImageContractError(
            f"{name}: expected a path, bytes, a PIL picture, an open file, an array or a tensor, but got "
            f"{type(image).__name__}"
        )
    height, width = pixels.shape[-2:]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"{name}: {width}x{height} pixels is too thin to judge (more than {MAX_ASPECT_RATIO}:1); crop it to pieces"
        )
    return pixels


def open_image(file: Path | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file and check what its header states; nothing is decoded. Give the result to :func:`load_image`.

    Raises:
        ImageError: if it is no image, of a format that is not opened here, or too large.
    """
    silence_libtiff()
    too_large = f"{name}: more than {max_pixels / 1e6:.4g} megapixels; make it smaller first"
    with decoder_errors(name):
        head, size = _head(file)
        if size == 0:
            raise ImageError(f"{name}: is empty")
        register_plugin(head)
        try:
            image = Image.open(file, formats=openable())
        except UnidentifiedImageError:
            raise ImageError(f"{name}: {why_unknown(head, name)}") from None
        except Image.DecompressionBombError:
            raise ImageError(too_large) from None
        width, height = image.size
        if width * height > max_pixels:
            image.close()
            raise ImageError(f"{too_large} (it has {width}x{height} pixels)")
    return image


def _file_pixels(file: Path | io.BytesIO, name: str) -> Tensor:
    with decoder_errors(name), open_image(file, name) as image:
        return _pil_pixels(image, name, UNIT_RANGE)


def _head(file: Path | BinaryIO) -> tuple[bytes, int]:
    """The first bytes, and the size."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(512), os.fstat(opened.fileno()).st_size
    file.seek(0)
    head = file.read(512)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return head, size


def _why_no_file(path: str | os.PathLike[str]) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        if "://" in os.fspath(path)[:12]:
            return "no such file; addresses are not fetched: download it first"
        return "no such file" + (
            "; patterns are not expanded here: pass glob.glob(...)" if "*" in os.fspath(path) else ""
        )
    except PermissionError:
        return "cannot be read (permission denied for a folder on the way)"
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        return f"no such file ({getattr(error, 'strerror', None) or error})"
    if os.path.isdir(path):
        return "is a folder, not a picture; pass a folder alone, not in a list, or the paths in it"
    return "is not a regular file"


@contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Whatever Pillow and its decoders raise, as an :class:`ImageError` that says what is wrong with the file."""
    try:
        with _quiet_pillow():
            yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{name}: is too large to decode in the memory there is") from None
    except OSError as error:
        if error.errno is not None:  # from the operating system, not from a decoder
            raise ImageError(f"{name}: cannot be read ({error.strerror})") from None
        raise ImageError(f"{name}: is damaged or truncated ({error})") from None
    # Pillow's decoders raise almost anything on malformed files, struct.error and IndexError among them.
    except Exception as error:
        raise ImageError(f"{name}: is damaged or truncated ({type(error).__name__}: {error})") from None


_quiet_lock = threading.Lock()
_quiet_threads = 0
_loud_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings: it warns at half of MAX_PIXELS, up to where an image is fine, and where only the
    metadata is damaged.

    Filters belong to the whole process, so of several threads that decode, the first sets them and the last puts back
    what there was.
    """
    global _quiet_threads, _loud_filters
    with _quiet_lock:
        _quiet_threads += 1
        if _quiet_threads == 1:
            _loud_filters = warnings.catch_warnings()
            _loud_filters.__enter__()
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"(PIL|pillow_heif|pillow_jxl)\b")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads -= 1
            if _quiet_threads == 0 and _loud_filters is not None:
                _loud_filters.__exit__(None, None, None)


def _pil_pixels(image: Image.Image, name: str, floats: FloatRange) -> Tensor:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width}x{height} is more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first"
        )
    if width == 0 or height == 0:
        raise ImageContractError(f"{name}: expected at least one pixel, but got {width}x{height}")
    with decoder_errors(name):
        if getattr(image, "is_animated", False):
            image.seek(0)
        if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            _decode(image, name)
        from_file, info, depth = image.format is not None, image.info, _grey_depth(image, name)
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            try:
                return array_pixels(np.asarray(image), name, UNIT_RANGE if from_file else floats)
            except ImageContractError as error:  # in a file it is data
                raise (ImageError(str(error)) if from_file else error) from None
        if depth is not None:
            values = np.asarray(image)
            if values.min() < 0 or values.max() > depth:
                raise ImageError(f"{name}: expected at most 16 bits a channel, but got values up to {values.max()}")
            levels = sixteen_bit_levels(info, depth)
            grey = np.round(values.astype(np.float32) * (255 / depth)).astype(np.uint8)
            image = Image.fromarray(grey if levels is None else levels[values])
            image.info = {key: info[key] for key in ("icc_profile",) if key in info}
        image = to_srgb(image)
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255:
            image = image.convert("RGB")
        return array_pixels(np.asarray(image), name)


def _decode(image: Image.Image, name: str) -> None:
    """Load an image; if it comes from a lossy file that is still open, look for damage that the decoder bore."""
    file = image.fp if isinstance(image, ImageFile.ImageFile) else None
    data = None
    if file is not None and image.format in LOSSY and not getattr(file, "closed", False):
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
    image.load()
    problem = find_damage(str(image.format), data, image) if data is not None else None
    if problem is not None:
        raise ImageError(f"{name}: is damaged or truncated ({problem})")


def _grey_depth(image: Image.Image, name: str) -> int | None:
    """The value of white in a grey image of more than 8 bits a pixel; None for one of 8 bits or floats."""
    if image.mode not in _SIXTEEN_BIT_MODES:
        return None
    tags = getattr(image, "tag_v2", None) if image.format in ("TIFF", "MPO") else None
    if tags is None:
        return 65535
    bits = (tags.get(_BITS_TAG) or (16,))[0]
    signed = (tags.get(_SAMPLE_FORMAT_TAG) or (1,))[0] == 2
    if signed or bits not in (12, 16):
        kind = f"{bits}-bit {'signed' if signed else 'unsigned'} integers"
        raise ImageError(f"{name}: expected at most 16 bits a channel, unsigned, but it is a TIFF of {kind}")
    if tags.get(_PHOTOMETRIC_TAG) == 0:
        raise ImageError(f"{name}: is a TIFF of {bits} bits in which 0 is white, which Pillow does not read right")
    return (1 << bits) - 1
