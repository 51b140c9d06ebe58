"""Which formats are opened, and what is said of the others."""

from __future__ import annotations

import importlib
import importlib.util

from PIL import Image

#: What files may hold. Pillow reads more, but its EPS reader starts Ghostscript, a program that has been broken out of,
#: and the decoders of rarer formats (TGA, PSD, PCX, DDS, SGI, ...) are little tested against hostile files. An image
#: that you have opened with Pillow yourself is taken, whatever its format.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF", "JXL",
)  # fmt: skip

SUFFIXES = frozenset(
    (
        ".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".jxl", ".pgm", ".png", ".ppm", ".tif",
        ".tiff", ".webp",
    )
)  # fmt: skip

#: Format -> the module that teaches it to Pillow, what to call there (None: importing it does), and its package.
_PLUGINS = {
    "HEIF": ("pillow_heif", "register_heif_opener", "pillow-heif"),
    "JXL": ("pillow_jxl", None, "pillow-jxl-plugin"),
}
_CONVERT = "convert it to PNG, or open it yourself with Pillow and pass the image"
#: First bytes -> what such a file is, and the way out: of pictures in formats that are not opened,
_PICTURES = (
    (b"8BPS", "a PSD file (Photoshop)", _CONVERT),
    (b"DDS ", "a DDS file", _CONVERT),
    (b"\x01\xda", "an SGI file", _CONVERT),
    (b"qoif", "a QOI file", _CONVERT),
    (b"icns", "an ICNS file", _CONVERT),
    (b"SIMPLE  =", "a FITS file", "scale its values to [0, 1] and pass an array"),
    (b"\x76\x2f\x31\x01", "an OpenEXR file (high dynamic range)", "map its tones to [0, 1] and pass an array"),
    (b"#?RADIANCE", "a Radiance HDR file", "map its tones to [0, 1] and pass an array"),
    (b"#?RGBE", "a Radiance HDR file", "map its tones to [0, 1] and pass an array"),
    (b"II+\x00", "a BigTIFF that Pillow cannot read", "convert it to PNG"),
)  # fmt: skip
#: of formats that are opened, where Pillow found no picture in the file,
_DAMAGED = (
    (b"\x89PNG", "damaged or truncated (PNG)", ""),
    (b"\xff\xd8\xff", "damaged or truncated, or a JPEG of a kind that Pillow cannot read", "convert it to PNG"),
    (b"GIF8", "damaged or truncated (GIF)", ""),
    (b"II*\x00", "damaged or truncated, or a TIFF of a kind that Pillow cannot read", "convert it to PNG"),
    (b"MM\x00*", "damaged or truncated, or a TIFF of a kind that Pillow cannot read", "convert it to PNG"),
    (b"BM", "damaged or truncated (BMP)", ""),
    (b"\x00\x00\x00\x0cjP  ", "damaged or truncated (JPEG 2000)", ""),
)  # fmt: skip
#: and of what is no picture.
_OTHERS = (
    (b"\x93NUMPY", "a NumPy array", "pass numpy.load(path)"),
    (b"%PDF", "a PDF document", "render its pages to PNG"),
    (b"%!PS", "a PostScript file", "render it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file", "render it to PNG"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", "pass its frames"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
)  # fmt: skip
_MARKUP = (
    (b"<svg", "an SVG drawing", "render it to PNG"),
    (b"<?xml", "an XML file", "if it is an SVG drawing, render it to PNG"),
    (b"<!doctype html", "a web page", "download the picture itself"),
    (b"<html", "a web page", "download the picture itself"),
)
_BY_SUFFIX = {".tga": "a TGA file", ".pcx": "a PCX file"}


def openable() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow has, with what plugins have added by now."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def register_plugin(head: bytes) -> None:
    """Teach Pillow HEIF or JPEG XL if a file begins like one and its plugin is installed."""
    kind = _plugin_format(head)
    if kind is None or kind in Image.OPEN:
        return
    module, function, _ = _PLUGINS[kind]
    if importlib.util.find_spec(module) is not None:
        plugin = importlib.import_module(module)
        if function is not None:
            getattr(plugin, function)()


def why_unknown(head: bytes, name: str = "") -> str:
    """Why a file that begins so is not opened: what it is, and the way out."""
    kind = _plugin_format(head)
    if kind is not None:
        module, _, package = _PLUGINS[kind]
        said = {"HEIF": "a HEIC or HEIF file", "JXL": "a JPEG XL file"}[kind]
        if importlib.util.find_spec(module) is None:
            return f"is {said}, which Pillow reads with a plug-in: pip install {package}"
        return f"is damaged or truncated ({said})"
    for signature, said, way_out in _PICTURES + _DAMAGED:
        if head.startswith(signature):
            return _sentence(said, way_out)
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "is damaged or truncated (AVIF), or this Pillow was built without AVIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "is damaged or truncated (WebP)"
    for suffix, said in _BY_SUFFIX.items():
        if name.lower().endswith(suffix):
            return _sentence(said, _CONVERT)
    other = _what_else(head)
    return "is not a picture that Pillow can read" + (f", but {other}" if other else "")


def _what_else(head: bytes) -> str:
    for signature, said, way_out in _OTHERS:
        if head.startswith(signature):
            return f"{said}; {way_out}"
    if head[4:8] == b"ftyp" or head.startswith(b"RIFF"):
        return "a video or sound; pass its frames"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:32].lower()
    for signature, said, way_out in _MARKUP:
        if start.startswith(signature):
            return f"{said}; {way_out}"
    if _is_text(head):
        return "text; a list of pictures is a list of paths in Python, and a list file on the command line"
    return ""


def _sentence(said: str, way_out: str) -> str:
    return f"is {said}" + (f"; {way_out}" if way_out else "")


def _plugin_format(head: bytes) -> str | None:
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIF"
    return "JXL" if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")) else None


def _is_text(head: bytes) -> bool:
    if not head or b"\x00" in head:
        return False
    try:
        head[:500].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8
    return True
