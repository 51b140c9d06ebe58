"""Small pictures for pages, as data URIs, made once and kept beside the page."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import stat
from pathlib import Path

from PIL import Image

from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.images import open_image

#: Longer edge in pixels; 160 is about 4 kB as WebP.
SIZE = 160
_QUALITY = 70


def thumbnail(path: Path, cache: Path, size: int = SIZE) -> str | None:
    """A data URI of a picture at most ``size`` pixels wide and high, None for one that cannot be read.

    Args:
        path: the picture.
        cache: folder of the thumbnails; one is made again only if the picture's size or time of change differs.
        size: longer edge.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            return None
        key = f"{os.path.abspath(path)}:{state.st_size}:{state.st_mtime_ns}:{size}:{_QUALITY}"
        kept = cache / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.webp"
        if not kept.exists():
            cache.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_bytes(_shrink(path, size))
            os.replace(part, kept)
        data = kept.read_bytes()
    # Pillow's decoders raise almost anything on malformed files; a page without that picture is better than none.
    except Exception:
        return None
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _shrink(path: Path, size: int) -> bytes:
    """As the scorer sees it: the same formats and no others, turned, laid over white, 16 bits scaled."""
    with open_image(path, str(path)) as image:
        if "icc_profile" not in image.info:  # whose colours may be CMYK
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at a fraction of the size
        small = load_picture(image)
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()
