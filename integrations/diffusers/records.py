"""Runs on disk: PNG files that say how they were made, one line of ``results.jsonl`` a candidate, a contact sheet."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from vqr1_metric import __version__
from vqr1_metric.images import load_image
from vqr1_metric.integrations.diffusers.scoring import as_pil

if TYPE_CHECKING:
    from vqr1_metric.integrations.diffusers.results import BestOfNOutput, Candidate

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
        told = json.dumps({name: _plain(value) for name, value in sorted(settings.items())}, indent=1)
        note = self.folder / "settings.json"
        if not note.exists():
            _replace(note, lambda path: path.write_text(told, encoding="utf-8"))
        elif note.read_text(encoding="utf-8") != told:
            raise ValueError(f"Expected a new folder, but {folder} holds pictures that were made with other settings.")

    def get(self, seed: int) -> Any:
        """The picture of a seed, or None."""
        path = self.folder / f"seed{seed}"
        if path.is_dir():
            return [self._read(frame) for frame in sorted(path.glob("*.png"))]
        return self._read(path.with_suffix(".png")) if path.with_suffix(".png").exists() else None

    def put(self, candidate: Candidate) -> None:
        """Keep the picture of a candidate, unless it has no score for a reason that may pass."""
        if candidate.result is None or candidate.result.error is None:
            write(candidate.picture, self.folder / f"seed{candidate.seed}", {"seed": candidate.seed})

    def _read(self, path: Path) -> Any:
        pixels = load_image(path)
        if self.output_type == "pt":
            return pixels.float() / 255
        array = pixels.permute(1, 2, 0).numpy()
        return array.astype(np.float32) / 255 if self.output_type == "np" else Image.fromarray(array)


def _plain(value: Any) -> Any:
    """A value as JSON has it; pictures and tensors by their content, other objects by their class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, (Image.Image, np.ndarray)):
        return "sha256:" + hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
    return type(value).__name__


def _replace(path: Path, make: Any) -> None:
    """Make a file or folder whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    make(part)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(part, path)


def write(picture: Any, path: Path, facts: dict[str, Any]) -> Path:
    """Write a picture as PNG, with ``facts`` in its metadata (a video: its frames, in a folder); gives the path."""
    if isinstance(picture, (list, tuple)) or getattr(picture, "ndim", 3) == 4:

        def frames(folder: Path) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for i, frame in enumerate(picture):
                write(frame, folder / f"{i:04d}", facts)

        _replace(path, frames)
        return path
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    path = path.with_name(f"{path.name}.png")
    _replace(path, lambda part: as_pil(picture).save(part, format="PNG", pnginfo=info))
    return path


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def facts_of(output: BestOfNOutput, place: int) -> dict[str, Any]:
    """What is known of one candidate, as a line of ``results.jsonl`` holds it; numbers that are NaN are null."""
    candidate = output.records[place]
    result = candidate.result
    return {
        "prompt": output.prompt,
        "seed": candidate.seed,
        "score": _number(candidate.score),
        "std": None if result is None else _number(result.std),
        "value": _number(candidate.value),
        "preview_score": _number(candidate.preview_score),
        "survived": candidate.survived,
        "error": None if result is None else result.error,
        "also": {name: _number(value) for name, value in candidate.extras.items()},
        "missed": candidate.missed,
        "parent": candidate.parent,
        "round": candidate.round,
    }


def save(output: BestOfNOutput, folder: Path) -> Path:
    """Write a run.

    ``NN_seedS.png`` are the kept pictures, best first, with prompt, seed, score and the rest in their metadata;
    ``results.jsonl`` has one line for every candidate, ``run.json`` what is true of all, ``contact.png`` the kept
    pictures with their scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"vqr1_metric": __version__, "torch": torch.__version__}
    run = {
        "prompt": output.prompt,
        "strategy": output.strategy,
        "denoiser_rows": output.denoiser_rows,
        "scoring_seconds": output.scoring_seconds,
        "total_seconds": output.total_seconds,
        "interrupted": output.interrupted,
        "trace": [(rows, _number(value)) for rows, value in output.trace],
        **_plain(output.about),
        "versions": versions,
    }
    lines = [facts_of(output, place) for place in range(len(output.records))]
    for rank, (image, ranked) in enumerate(zip(output.images, output.ranking, strict=False)):
        line = lines[ranked.index]
        told = {"vqr1": {**line, **_plain(output.about), "versions": versions}} | {
            name: line[name] for name in ("prompt", "seed", "score")
        }
        line["file"] = write(image, folder / f"{rank:02d}_seed{line['seed']}", told).name
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output.images:
        sheet = output.grid()
        _replace(folder / "contact.png", lambda part: sheet.save(part, format="PNG"))
    _replace(folder / "run.json", lambda part: part.write_text(json.dumps(run, indent=1), encoding="utf-8"))
    _replace(folder / "results.jsonl", lambda part: part.write_text(text, encoding="utf-8"))
    return folder


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
