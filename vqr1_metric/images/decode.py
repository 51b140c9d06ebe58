"""From whatever users hold (paths, bytes, PIL pictures, arrays, tensors) to checked RGB pixels, by one set of rules.

EXIF rotation is applied; transparency is laid over white; of an animation the first frame counts; CMYK, palette and
grey pictures become RGB; 16-bit pictures are scaled, not clipped; floats must be finite and lie in [0, 1].
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

#: Larger files are refused before they are decoded; Pillow's own bound against decompression bombs.
MAX_PIXELS = 178_956_970
#: Qwen-VL's own limit; thinner pictures cannot be resized to a grid of patches without becoming something else.
MAX_ASPECT_RATIO = 200
#: Transparent pictures are laid over white in bands of so many pixels: in floats a whole one would take many times the
#: memory of the picture itself.
_BAND_PIXELS = 1 << 18
#: Floats may leave [0, 1] by rounding (a bicubic resize, a half-precision decoder) by this much and are clamped.
FLOAT_TOLERANCE = 1e-3

#: What files may hold. Pillow reads more, but its EPS reader starts Ghostscript, a program that has been broken out of,
#: and the rarer decoders are little tested. HEIF and JXL come with plugins that a user registers.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF", "JXL")

SUFFIXES = frozenset(
    [".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif"]
)

ImageLike = Union[str, "os.PathLike[str]", bytes, Image.Image, np.ndarray, Tensor]


class ImageError(ValueError):
    """A picture that cannot be scored; the message names it and says what to do."""


def describe(image: Any, index: int | None = None) -> str:
    """A short name for error messages: the path where there is one, else the position in the batch."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    filename = getattr(image, "filename", None)
    if filename:
        return str(filename)
    return "image" if index is None else f"image {index}"


def load_image(image: ImageLike, name: str | None = None) -> Tensor:
    """One picture as RGB pixels.

    Args:
        image: a path, the bytes of an image file, a PIL picture, an array or a tensor. Tensors are ``(C, H, W)`` (or
            ``(1, C, H, W)``), arrays ``(H, W)``, ``(H, W, C)``, with C = 1, 3 or 4 (alpha); both uint8, or floating in
            [0, 1].
        name: what error messages call it; by default its path.

    Returns:
        Tensor of shape ``(3, H, W)``: uint8, or floating in [0, 1] and attached to the autograd graph if a floating
        tensor was given; on the tensor's own device, otherwise on the CPU.

    Raises:
        ImageError: with the picture's name, what was expected and what came.
    """
    name = name or describe(image)
    if isinstance(image, Tensor):
        pixels = _from_tensor(image, name)
    elif isinstance(image, np.ndarray):
        pixels = _from_array(image, name)
    elif isinstance(image, Image.Image):
        pixels = _from_pil(image, name)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        pixels = _from_file(io.BytesIO(image), name)
    elif isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise ImageError(f"{name}: {_why_no_file(image)}")
        pixels = _from_file(Path(image), name)
    else:
        raise ImageError(
            f"{name}: expected a path, bytes, a PIL picture, an array or a tensor, but got {type(image).__name__}"
        )
    height, width = pixels.shape[-2:]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"{name}: {width}x{height} pixels is too thin to judge (more than {MAX_ASPECT_RATIO}:1); crop it to pieces"
        )
    return pixels


def split_images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """The single pictures of whatever ``update`` and ``score`` accept, without decoding any.

    A 4-d tensor or array is a batch; a 3-d tensor, a 2- or 3-d array, a path, bytes or a PIL picture is one picture; a
    list or tuple may mix them all, sizes and devices too.
    """
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise ImageError(f"Expected a tensor of shape (B, C, H, W) or (C, H, W), but got {tuple(images.shape)}")
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if hasattr(images, "__iter__") and not isinstance(images, Mapping):
        return list(images)
    raise ImageError(
        "Expected pictures as a tensor (B, C, H, W), a path, a PIL picture, an array, or a list of these, "
        f"but got {type(images).__name__}"
    )


def _why_no_file(path: str | os.PathLike[str]) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # no permission for a folder on the way, a name too long, a NUL in it
        return f"no such file ({getattr(error, 'strerror', None) or error})"
    return "is a folder, not a picture" if os.path.isdir(path) else "is not a regular file"


def _from_tensor(image: Tensor, name: str) -> Tensor:
    if image.is_meta or image.layout != torch.strided:
        raise ImageError(f"{name}: expected a dense tensor that holds pixels, but got {image.layout} on {image.device}")
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3:
        raise ImageError(f"{name}: expected a tensor of shape (C, H, W), but got {tuple(image.shape)}")
    channels, height, width = image.shape
    if channels not in (1, 3, 4):
        hint = "; this looks like (H, W, C): permute it to (C, H, W)" if width in (1, 3, 4) else ""
        raise ImageError(f"{name}: expected 1, 3 or 4 channels in (C, H, W), but got {tuple(image.shape)}{hint}")
    if height == 0 or width == 0:
        raise ImageError(f"{name}: expected at least one pixel, but got shape {tuple(image.shape)}")
    if image.is_floating_point():
        image = _checked_floats(image, name)
    elif image.dtype != torch.uint8:
        raise ImageError(f"{name}: expected uint8 in 0..255 or floats in [0, 1], but got {image.dtype}")
    if channels == 4:
        return _over_white(image)
    return image.expand(3, -1, -1) if channels == 1 else image


def _checked_floats(image: Tensor, name: str) -> Tensor:
    low, high = torch.stack(image.detach().aminmax()).tolist()  # one transfer from the device; NaN spreads to both
    if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
        if low != low or abs(low) == float("inf") or abs(high) == float("inf"):
            raise ImageError(f"{name}: expected finite values, but it holds NaN or infinity")
        if -1 - FLOAT_TOLERANCE <= low < 0 and high <= 1 + FLOAT_TOLERANCE:
            hint = "for values in [-1, 1] pass (x + 1) / 2"
        elif high <= 255 and low >= 0:
            hint = "for values in [0, 255] pass x / 255, or uint8"
        else:
            hint = "undo the normalisation first"
        raise ImageError(f"{name}: expected floats in [0, 1], but got values from {low:.4g} to {high:.4g}; {hint}")
    return image.clamp(0, 1) if low < 0 or high > 1 else image


def _over_white(image: Tensor) -> Tensor:
    rgb, alpha = image[:3], image[3:]
    if image.is_floating_point():
        return rgb * alpha + (1 - alpha)
    over = torch.empty_like(rgb)
    rows = max(1, _BAND_PIXELS // image.shape[-1])
    for band in zip(rgb.split(rows, 1), alpha.split(rows, 1), over.split(rows, 1), strict=True):
        colour, opacity, target = band[0].float(), band[1].float() / 255, band[2]
        target.copy_((colour * opacity + 255 * (1 - opacity)).round())
    return over


def _from_array(image: np.ndarray, name: str) -> Tensor:
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ImageError(f"{name}: expected an array of shape (H, W) or (H, W, 1, 3 or 4), but got {image.shape}")
    if image.dtype == np.uint16:
        image = _sixteen_bit(image)
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ImageError(f"{name}: expected uint8, uint16 or floats in [0, 1], but got an array of {image.dtype}")
    # Always a copy: the array may be read-only, or belong to a file that is about to be closed.
    return _from_tensor(torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")), name)


def _sixteen_bit(values: np.ndarray) -> np.ndarray:
    return np.round(values.astype(np.float32) / 257).clip(0, 255).astype(np.uint8)  # 65535 / 257 = 255


def _from_file(file: Path | io.BytesIO, name: str) -> Tensor:
    try:
        with _quiet_pillow(), Image.open(file, formats=_formats()) as image:
            return _from_pil(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        size = file.stat().st_size if isinstance(file, Path) else len(file.getvalue())
        raise ImageError(f"{name}: " + ("is empty" if size == 0 else "is not a picture that Pillow can read")) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: claims more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
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
_loud_filters: warnings.catch_warnings | None = None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings: it warns at half of MAX_PIXELS, up to where a picture is fine, and where only the
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
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads -= 1
            if _quiet_threads == 0:
                _loud_filters.__exit__(None, None, None)


def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow has, with what plugins have added by now."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _from_pil(image: Image.Image, name: str) -> Tensor:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width}x{height} is more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first"
        )
    if width == 0 or height == 0:
        raise ImageError(f"{name}: expected at least one pixel, but got {width}x{height}")
    try:
        if getattr(image, "is_animated", False):
            image.seek(0)
        if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{name}: is damaged or truncated ({error})") from None
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: expected at most 16 bits a channel, but got values up to {values.max()}")
        return _from_array(_sixteen_bit(values), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return (
            _from_array(np.asarray(rgba), name)
            if rgba.getextrema()[3][0] < 255
            else _from_array(np.asarray(rgba)[..., :3], name)
        )
    # convert() would copy what is RGB already.
    return _from_array(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), name)
