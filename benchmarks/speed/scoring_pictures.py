"""Pictures to measure speed on: smooth waves with noise, the same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

#: "mixed" takes these in turn.
MIXED = ("224", "512", "1024x768", "640x480", "480x640", "800x600", "333x500", "2048x1536")


def parse_size(text: str) -> tuple[int, int]:
    """``(height, width)`` of "512" or "1024x768" (width first)."""
    width, _, height = text.partition("x")
    return int(height or width), int(width)


def make_pictures(size: str, count: int, kind: str, device: str, folder: Path) -> list:
    """Pictures as uint8 tensors on the device, as PIL pictures, or as JPEG files in the folder."""
    sizes = [parse_size(MIXED[i % len(MIXED)] if size == "mixed" else size) for i in range(count)]
    random = np.random.default_rng(0)
    pictures = []
    for number, (height, width) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width] / 512
        waves = [np.sin(x * random.uniform(5, 60) + y * random.uniform(5, 60)) for _ in range(3)]
        noise = random.normal(0, random.uniform(0, 20), (height, width, 3))
        pixels = (128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
        if kind == "tensor":
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(device))
            continue
        pictures.append(Image.fromarray(pixels))
        if kind == "file":
            path = folder / f"{size}-{number:03}.jpg"
            pictures.pop().save(path, quality=90)
            pictures.append(path)
    return pictures
