"""Seeded synthetic distortions with eight stated strengths each.

One table, `DISTORTIONS`, serves the training of the embedded model, its monotonicity check and the evaluation. Every
distortion is a pure function of (picture, strength, seed): PIL RGB in, PIL RGB of the same size out. Strengths are
stated in natural units (pixels of blur, JPEG quality, ...) and ordered from mild to severe, level 1 to level 8.
Contrast, brightness and colour change in the degrading direction only.

    from vqr1_metric.images.distortions import distort, DISTORTIONS
    distort(picture, "blur", level=3)
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

LEVELS = 8
"""Number of stated strengths of every distortion; levels are counted from 1."""


@dataclass(frozen=True)
class Distortion:
    """One distortion: its function, its eight strengths and what they mean.

    Attributes:
        name: key in `DISTORTIONS`.
        unit: what a strength is, for tables and axes.
        strengths: eight values, mild to severe.
        apply: `(picture, strength, rng) -> picture`.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image]


def _to_array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32) / 255


def _to_picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(array * 255), 0, 255).astype(np.uint8), "RGB")


def _reencode(picture: Image.Image, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _blur(picture: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def _motion_blur(picture: Image.Image, length: float, rng: np.random.Generator) -> Image.Image:
    """Mean over `length` pixels along a line; the ends count in part, so that the strength is continuous."""
    angle = rng.uniform(0, np.pi)
    array = _to_array(picture)
    margin = int(np.ceil(length / 2)) + 1
    padded = np.pad(array, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    taps = max(5, int(np.ceil(length)) + 1)
    height, width = array.shape[:2]
    total = np.zeros_like(array)
    for offset in np.linspace(-length / 2, length / 2, taps):
        y, x = margin + offset * np.sin(angle), margin + offset * np.cos(angle)
        top, left = int(np.floor(y)), int(np.floor(x))
        fy, fx = np.float32(y - top), np.float32(x - left)
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                if wy * wx > 0:
                    total += wy * wx * padded[top + dy : top + dy + height, left + dx : left + dx + width]
    return _to_picture(total / taps)


def _noise(picture: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    array = _to_array(picture)
    return _to_picture(array + rng.standard_normal(array.shape, dtype=np.float32) * np.float32(sigma / 255))


def _grey_noise(picture: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    array = _to_array(picture)
    return _to_picture(
        array + rng.standard_normal(array.shape[:2], dtype=np.float32)[..., None] * np.float32(sigma / 255)
    )


def _impulse_noise(picture: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    array = np.array(picture)
    draw = rng.random(array.shape[:2], dtype=np.float32)
    array[draw < share / 200] = 0
    array[draw > 1 - share / 200] = 255
    return Image.fromarray(array, "RGB")


def _jpeg(picture: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    return _reencode(picture, format="JPEG", quality=int(quality))


def _webp(picture: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    return _reencode(picture, format="WEBP", quality=int(quality), method=2)


def _jpeg2000(picture: Image.Image, ratio: float, rng: np.random.Generator) -> Image.Image:
    return _reencode(picture, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)


def _rescale(picture: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Reduced by `factor` and enlarged again, bicubic both ways."""
    width, height = picture.size
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    return picture.resize(small, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)


def _pixelate(picture: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Reduced by `factor` with a box filter and enlarged again by repeating pixels."""
    width, height = picture.size
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    return picture.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)


def _contrast(picture: Image.Image, kept: float, rng: np.random.Generator) -> Image.Image:
    array = _to_array(picture)
    mean = array.mean(dtype=np.float64).astype(np.float32)
    return _to_picture(mean + np.float32(kept) * (array - mean))


def _colour(picture: Image.Image, kept: float, rng: np.random.Generator) -> Image.Image:
    array = _to_array(picture)
    luma = (array @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    return _to_picture(luma + np.float32(kept) * (array - luma))


def _darken(picture: Image.Image, stops: float, rng: np.random.Generator) -> Image.Image:
    return _to_picture(_to_array(picture) * np.float32(2.0**-stops))


def _overexpose(picture: Image.Image, stops: float, rng: np.random.Generator) -> Image.Image:
    return _to_picture(_to_array(picture) * np.float32(2.0**stops))


def _posterise(picture: Image.Image, levels: float, rng: np.random.Generator) -> Image.Image:
    steps = np.float32(levels - 1)
    return _to_picture(np.rint(_to_array(picture) * steps) / steps)


def _colour_cast(picture: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Channels multiplied by 1 + strength * direction, a direction of zero mean drawn from the seed.

    The stated strengths start where a cast is plainly wrong: smaller ones lie within what photographs differ by anyway.
    """
    direction = np.array([1.0, 0.0, -1.0]) * rng.choice([-1.0, 1.0]) + np.array([0.0, 1.0, 0.0]) * rng.uniform(
        -0.5, 0.5
    )
    gain = (1 + strength * (direction - direction.mean())).clip(0)
    return _to_picture(_to_array(picture) * gain.astype(np.float32))


_TABLE = (
    Distortion("blur", "sigma, pixels", (0.7, 1.0, 1.4, 2.0, 2.8, 3.8, 5.0, 7.0), _blur),
    Distortion("motion_blur", "length, pixels", (3, 5, 7, 10, 14, 19, 25, 33), _motion_blur),
    Distortion("noise", "sigma of 255", (6, 10, 15, 22, 30, 42, 58, 80), _noise),
    Distortion("grey_noise", "sigma of 255", (6, 10, 15, 22, 30, 42, 58, 80), _grey_noise),
    Distortion("impulse_noise", "percent of pixels", (0.5, 1, 2, 4, 7, 11, 17, 25), _impulse_noise),
    Distortion("jpeg", "quality", (60, 40, 28, 20, 14, 10, 7, 4), _jpeg),
    Distortion("webp", "quality", (60, 40, 28, 20, 14, 8, 4, 0), _webp),
    Distortion("jpeg2000", "compression ratio", (20, 32, 48, 70, 100, 150, 220, 320), _jpeg2000),
    Distortion("rescale", "factor", (1.5, 2.0, 2.6, 3.4, 4.5, 6.0, 8.0, 11.0), _rescale),
    Distortion("pixelate", "factor", (1.5, 2.0, 2.6, 3.4, 4.5, 6.0, 8.0, 11.0), _pixelate),
    Distortion("contrast", "share kept", (0.8, 0.68, 0.57, 0.47, 0.37, 0.28, 0.2, 0.12), _contrast),
    Distortion("colour", "saturation kept", (0.8, 0.66, 0.53, 0.41, 0.3, 0.2, 0.1, 0.0), _colour),
    Distortion("darken", "stops", (0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0, 3.6), _darken),
    Distortion("overexpose", "stops", (0.3, 0.55, 0.8, 1.1, 1.4, 1.7, 2.1, 2.6), _overexpose),
    Distortion("posterise", "levels per channel", (20, 15, 11, 8, 6, 5, 4, 3), _posterise),
    Distortion("colour_cast", "relative gain", (0.42, 0.48, 0.54, 0.61, 0.68, 0.76, 0.85, 0.95), _colour_cast),
)

DISTORTIONS: dict[str, Distortion] = {entry.name: entry for entry in _TABLE}
"""All distortions by name, in a fixed order."""


def distort(picture: Image.Image, name: str, level: int, seed: int = 0) -> Image.Image:
    """Distort `picture` at a stated strength.

    Args:
        picture: PIL picture; converted to RGB.
        name: key of `DISTORTIONS`.
        level: 1 (mild) to 8 (severe); 0 returns the picture itself in RGB.
        seed: the same (picture, name, level, seed) gives the same pixels. The random pattern (noise, direction of
            motion or cast) depends on name and seed only, so the levels of one ladder differ in strength alone.

    Returns:
        A PIL RGB picture of the same size.

    Raises:
        ValueError: unknown name or level outside 0..8.
    """
    if name not in DISTORTIONS:
        raise ValueError(f"Expected a distortion out of {', '.join(DISTORTIONS)} but got {name!r}.")
    if not isinstance(level, (int, np.integer)) or not 0 <= level <= LEVELS:
        raise ValueError(f"Expected a level from 0 to {LEVELS} but got {level!r}.")
    picture = picture.convert("RGB")
    if level == 0:
        return picture
    return distort_by(picture, name, DISTORTIONS[name].strengths[level - 1], seed)


def distort_by(picture: Image.Image, name: str, strength: float, seed: int = 0) -> Image.Image:
    """As `distort`, with a strength in the distortion's own unit in place of a level (an RGB picture is expected)."""
    entry = DISTORTIONS[name]
    rng = np.random.default_rng([seed, *name.encode()])
    return entry.apply(picture, strength, rng)


def ladder(picture: Image.Image, name: str, seed: int = 0) -> list[Image.Image]:
    """The picture followed by its eight distorted versions, mild to severe (nine pictures)."""
    return [distort(picture, name, level, seed) for level in range(LEVELS + 1)]
