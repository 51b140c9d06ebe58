"""Pictures as 8-bit RGB, for everything beside the scorer that looks at them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vqr1_metric.images import load_image


def load_picture(source: Path | Image.Image, short_edge: int | None = None) -> Image.Image:
    """A picture by the rules of the scorer (turned, laid over white), as 8-bit RGB, after the data set's resizing.

    Raises:
        ImageError: as :func:`vqr1_metric.images.load_image`.
    """
    pixels = load_image(source)
    if pixels.is_floating_point():  # a file of floats
        pixels = (pixels * 255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return picture if short_edge is None else reduce_short_edge(picture, short_edge)


def reduce_short_edge(picture: Image.Image, short_edge: int) -> Image.Image:
    """The picture with this short edge (bicubic, antialiased); a smaller one stays as it is."""
    scale = short_edge / min(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
