"""Render the sample pictures of `examples/pictures/`: one scene, made by code alone, in good and in spoiled versions.

    python examples/make_pictures.py

Nothing in them was photographed, so they may be passed on under the project's licence.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vqr1_metric.images.distortions import distort, distort_by

WIDTH, HEIGHT, OVERSAMPLING = 480, 320, 3
FOLDER = Path(__file__).parent / "pictures"


def _value_noise(rng: np.random.Generator, width: int, height: int, cell: int) -> np.ndarray:
    """Smooth random field (height, width) in 0..1, with details of about `cell` pixels."""
    coarse = rng.random((height // cell + 2, width // cell + 2)) * 255
    return (
        np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)) / 255.0
    )


def _fractal(rng: np.random.Generator, width: int, height: int, cells: tuple[int, ...]) -> np.ndarray:
    weights = 0.6 ** np.arange(len(cells))
    layers = (w * _value_noise(rng, width, height, cell) for w, cell in zip(weights, cells, strict=True))
    return sum(layers) / weights.sum()


def render(seed: int = 3) -> Image.Image:
    """A lake below mountains at noon, 480x320."""
    rng = np.random.default_rng(seed)
    width, height = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING
    y, _x = np.mgrid[0:height, 0:width] / height
    sky = np.stack([0.30 + 0.45 * y, 0.52 + 0.36 * y, 0.86 + 0.08 * y], axis=-1)
    clouds = np.clip(_fractal(rng, width, height, (260, 120, 60, 30, 14)) * 2.6 - 1.25, 0, 1)[..., None]
    picture = sky * (1 - 0.85 * clouds) + 0.85 * clouds * np.array([0.98, 0.97, 0.95])
    for base, rough, colour in (
        (0.44, 0.26, (0.42, 0.47, 0.58)),
        (0.54, 0.20, (0.30, 0.38, 0.36)),
        (0.6, 0.1, (0.16, 0.3, 0.15)),
    ):
        ridge = base - rough * (_fractal(rng, width, 64, (400, 170, 70, 26, 9))[32] - 0.45)
        rock = _fractal(rng, width, height, (90, 40, 18, 8, 4))
        shade = 0.55 + 0.9 * rock + 0.5 * (np.roll(rock, 5, 1) - rock)
        snow = (base < 0.5) * np.clip((ridge[None] + 0.09 - y) * 25 + 3 * (rock - 0.5), 0, 1)[..., None]
        layer = np.array(colour) * shade[..., None]
        layer = layer * (1 - snow) + snow * np.clip(0.72 + 0.5 * rock[..., None], 0, 1)
        picture = np.where((y > ridge[None])[..., None], layer, picture)
    shore = 0.66
    mirror = np.clip((2 * shore - y) * height, 0, height - 1).astype(int)
    waves = (_value_noise(rng, width, height, 9) - 0.5) * 30 * (y - shore) + 2
    columns = np.clip(np.arange(width)[None] + (waves * 4).astype(int), 0, width - 1)
    ripples = 0.12 * (_fractal(rng, width, height, (24, 12, 6)) - 0.5)
    water = picture[mirror, columns] * np.array([0.62, 0.74, 0.8]) + ripples[..., None]
    picture = np.where((y > shore)[..., None], water, picture)
    beach = 0.93 - 0.12 * _fractal(rng, width, 64, (300, 90, 30))[20]
    pebbles = _fractal(rng, width, height, (20, 10, 5, 3))[..., None]
    picture = np.where((y > beach[None])[..., None], (0.25 + 0.9 * pebbles) * np.array([0.62, 0.54, 0.44]), picture)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8), "RGB")

    draw = ImageDraw.Draw(image)
    left, top = int(0.98 * height), int(0.52 * height)  # a boathouse with a plank wall, windows and a roof
    for plank in range(16):
        shade = int(rng.integers(-14, 14))
        draw.rectangle(
            (left + plank * 14, top, left + plank * 14 + 12, top + 150), fill=(150 + shade, 48 + shade // 2, 38)
        )
    draw.polygon([(left - 16, top), (left + 112, top - 78), (left + 240, top)], fill=(64, 58, 60))
    for window in (36, 140):
        draw.rectangle((left + window, top + 36, left + window + 50, top + 96), fill=(238, 232, 214))
        for pane in (4, 28):
            draw.rectangle((left + window + pane, top + 40, left + window + pane + 18, top + 92), fill=(52, 72, 96))
    for number in range(9):  # firs
        foot, size = int((0.05 + 0.093 * number + 0.03 * rng.random()) * height), int(rng.integers(60, 150))
        ground = int((0.655 + 0.015 * rng.random()) * height)
        for step in range(14):
            half = size * (step + 1) // 44
            level = ground - size + size * step // 14
            colour = (14 + int(rng.integers(12)), 46 + int(rng.integers(34)), 22 + int(rng.integers(14)))
            draw.polygon([(foot, level - 14), (foot - half, level + 16), (foot + half, level + 16)], fill=colour)
    small = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.UnsharpMask(1, 40, 0))


def main() -> None:
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    good = render()
    versions = {
        "lake": good,
        "lake_blurred": distort(good, "blur", 5),
        "lake_dark_and_noisy": distort_by(distort_by(good, "darken", 1.6), "noise", 18.0),
        "lake_enlarged": distort(good, "rescale", 4),
        "lake_noisy": distort(good, "noise", 5),
    }
    for name, picture in versions.items():
        picture.save(FOLDER / f"{name}.jpg", quality=92, subsampling=0)
    good.save(FOLDER / "lake_crushed.jpg", quality=8)


if __name__ == "__main__":
    main()
