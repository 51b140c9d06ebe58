"""Colours to sRGB, which is what the models were trained on: ICC profiles, and PNG's gAMA and cHRM.

An image without any of them is taken as sRGB. A profile that is broken, or for another kind of image, is ignored, as
browsers do. Not handled: colours that are stated in other ways (cICP of PNG, nclx of AVIF and HEIF, the colour
specification of JPEG 2000, EXIF's ColorSpace).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

#: ICC's name of a profile's colours -> Pillow's mode of the images it is for.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
#: A profile that moves no colour by more than this (of 255) is sRGB by another name; its pixels stay as stored.
_SAME = 2
#: gAMA this near to 1 / 2.2 means sRGB (libpng's own threshold).
_GAMMA_TOLERANCE = 0.05
_SRGB_GAMMA = 1 / 2.2
_SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue: x, y
_CHROMATICITY_TOLERANCE = 0.005
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_BAND_PIXELS = 1 << 18


def to_srgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit sRGB: mode RGB, or RGBA where it has transparency.

    Args:
        image: loaded, of at most 8 bits a channel.
    """
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        colours = to_srgb(_without_transparency(rgba.convert("RGB"), image.info))
        colours.putalpha(rgba.getchannel("A"))
        return colours
    profile = image.info.get("icc_profile")
    if profile:
        source = image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
        transform = _transform(bytes(profile), source.mode)
        if transform is None and source.mode == "L":  # the profile of the colours that it was before
            source = source.convert("RGB")
            transform = _transform(bytes(profile), "RGB")
        if transform is not None:
            return transform.apply(source)
        return _rgb(source)
    rgb = _rgb(image)
    gamma, matrix = _png_colours(image.info)
    if matrix is not None:
        return _through_matrix(rgb, gamma, matrix)
    if gamma is not None:
        return rgb.point([*encoded_levels(gamma, 256).tolist()] * 3)
    return rgb


def sixteen_bit_levels(info: dict[str | tuple[int, int], object], maximum: int = 65535) -> NDArray[np.uint8] | None:
    """The 8-bit sRGB level of every 16-bit level of a grey PNG with gAMA; None without."""
    gamma, _ = _png_colours(info) if "icc_profile" not in info else (None, None)
    return None if gamma is None else encoded_levels(gamma, maximum + 1)


def encoded_levels(gamma: float, count: int) -> NDArray[np.uint8]:
    """sRGB levels of samples 0 .. count - 1 that were encoded with the exponent ``gamma``."""
    return np.round(_encode(np.linspace(0, 1, count) ** (1 / gamma)) * 255).astype(np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy what is RGB already


def _without_transparency(image: Image.Image, info: dict[str | tuple[int, int], object]) -> Image.Image:
    image.info = {key: value for key, value in info.items() if key != "transparency"}
    return image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it is for other images, is broken, or is sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode != "CMYK":
            levels = np.linspace(0, 255, 17).round().astype(np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
            probe = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
            moved = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
            if np.abs(moved).max() <= _SAME:
                return None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return transform


def _png_colours(info: dict[str | tuple[int, int], object]) -> tuple[float | None, NDArray[np.float64] | None]:
    """Exponent and matrix to sRGB's primaries, of gAMA and cHRM; each None where it is sRGB's own or not there."""
    if "srgb" in info:  # PNG's sRGB chunk goes before both
        return None, None
    gamma, chromaticities = info.get("gamma"), info.get("chromaticity")
    if not isinstance(gamma, float) or not 0.01 <= gamma <= 100:
        gamma = None
    matrix = None
    if isinstance(chromaticities, tuple) and len(chromaticities) == 8:
        moved = max(abs(a - b) for a, b in zip(chromaticities, _SRGB_CHROMATICITIES, strict=True))
        if moved > _CHROMATICITY_TOLERANCE:
            matrix = _to_srgb_primaries(tuple(float(c) for c in chromaticities))
    if matrix is None and gamma is not None and abs(gamma / _SRGB_GAMMA - 1) < _GAMMA_TOLERANCE:
        gamma = None
    return gamma, matrix


def _to_srgb_primaries(chromaticities: tuple[float, ...]) -> NDArray[np.float64] | None:
    """Linear RGB of these primaries to linear sRGB, white to white (Bradford); None for impossible primaries."""
    try:
        ours, white = _to_xyz(_SRGB_CHROMATICITIES)
        theirs, their_white = _to_xyz(chromaticities)
        adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ white) / (_BRADFORD @ their_white)) @ _BRADFORD
        matrix = np.linalg.inv(ours) @ adapted @ theirs
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return None
    return matrix if np.isfinite(matrix).all() and np.abs(matrix).max() < 100 else None


def _to_xyz(chromaticities: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix from linear RGB to XYZ, and the XYZ of white (SMPTE RP 177)."""
    points = np.array(
        [(x / y, 1.0, (1 - x - y) / y) for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)]
    )
    white, primaries = points[0], points[1:].T
    return primaries * np.linalg.solve(primaries, white), white


def _through_matrix(image: Image.Image, gamma: float | None, matrix: NDArray[np.float64]) -> Image.Image:
    levels = np.linspace(0, 1, 256)
    linear = _decode(levels) if gamma is None else levels ** (1 / gamma)
    pixels = np.array(image)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = linear[pixels[top : top + rows]] @ matrix.T
        pixels[top : top + rows] = np.round(_encode(band.clip(0, 1)) * 255)
    return Image.fromarray(pixels)


def _decode(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB to linear light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encode(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
