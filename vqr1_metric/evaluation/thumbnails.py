"""Small pictures for pages, as data URIs, made once and kept beside the page."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path

from PIL import Image, ImageOps

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
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at a fraction of the size
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.thumbnail((size, size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()
