"""Runs on disk: PNG files that say how they were made, one line of ``results.jsonl`` a candidate, a contact sheet."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from vqr1_metric.images import load_image
from vqr1_metric.integrations.diffusers.scoring import as_pil

_LABEL = 14  # pixels of height


class Store:
    """Finished pictures of a run, so that another run with the same settings need not make them again.

    Args:
        folder: to write to, one PNG a seed (of a video: a folder of frames).
        settings: what decides the pictures. A folder with other settings is refused.
        output_type: of the pipe, in which stored pictures are given back.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], output_type: str = "pil") -> None:
        self.folder, self.output_type = folder / "candidates", output_type
        self.folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps({name: plain(value) for name, value in sorted(settings.items())}, indent=1)
        note = self.folder / "settings.json"
        if not note.exists():
            replace(note, lambda path: path.write_text(told, encoding="utf-8"))
        elif note.read_text(encoding="utf-8") != told:
            raise ValueError(f"Expected a new folder, but {folder} holds pictures that were made with other settings.")

    def get(self, seed: int) -> Any:
        """The picture of a seed, or None."""
        path = self.folder / f"seed{seed}"
        if path.is_dir():
            return [self._read(frame) for frame in sorted(path.glob("*.png"))]
        return self._read(path.with_suffix(".png")) if path.with_suffix(".png").exists() else None

    def put(self, seed: int, picture: Any) -> None:
        """Keep the picture of a seed."""
        write(picture, self.folder / f"seed{seed}", {"seed": seed})

    def _read(self, path: Path) -> Any:
        pixels = load_image(path)
        if self.output_type == "pt":
            return pixels.float() / 255
        array = pixels.permute(1, 2, 0).numpy()
        return array.astype(np.float32) / 255 if self.output_type == "np" else Image.fromarray(array)


def plain(value: Any) -> Any:
    """A value as JSON has it; pictures and tensors by their content, other objects by their class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, (Image.Image, np.ndarray)):
        return "sha256:" + hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
    return type(value).__name__


def remove(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, make: Any) -> None:
    """Make a file or folder whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    make(part)
    if path.is_dir():
        remove(path)
    os.replace(part, path)


def write(picture: Any, path: Path, facts: dict[str, Any]) -> Path:
    """Write a picture as PNG, with ``facts`` in its metadata (a video: its frames, in a folder); gives the path."""
    if isinstance(picture, (list, tuple)) or getattr(picture, "ndim", 3) == 4:

        def frames(folder: Path) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for i, frame in enumerate(picture):
                write(frame, folder / f"{i:04d}", facts)

        replace(path, frames)
        return path
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    path = path.with_name(f"{path.name}.png")
    replace(path, lambda part: as_pil(picture).save(part, format="PNG", pnginfo=info))
    return path


def sheet(images: Sequence[Any], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures side by side, each under its label; of a video, its first frame."""
    if not images:
        raise ValueError("Expected pictures, but there are none: no candidate was finished.")
    videos = [isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) == 4 for image in images]
    pictures = [as_pil(image[0] if video else image) for image, video in zip(images, videos, strict=True)]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True))
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * width, rows * (height + _LABEL)), "white")
    draw = ImageDraw.Draw(page)
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = place % columns * width, place // columns * (height + _LABEL)
        page.paste(picture, (left, top + _LABEL))
        draw.text((left + 2, top + 1), label, fill="black")
    return page
