"""What the training benchmarks share: two data sets of unlike scales, a weak start model, and rows of results.

Pictures are central squares of 128x128 at their own scale, so that a step takes a second or two on one core. `opinions`
holds rated photographs (0 to 1, the labels' own train and val split), `distortions` synthetic ones (100 minus 12 for
each level of strength), whole scenes held out.

The start model is nano with the two layers of its language model drawn anew, after a short cold start on very noisy
answers (standard deviation 2 on a scale of 4): it writes replies of the right form whose scores follow the pictures a
little. Its vision tower is nano's own, trained on pictures of the same kind, and rests: to be learnt is how to read it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.images.distortions import LEVELS, distort
from vqr1_metric.train_ranker import coldstart
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.run import prepare_data

SIDE = 128
NOISE = 2.0
KINDS = ("blur", "noise", "jpeg", "rescale", "pixelate", "impulse_noise")


def arguments(description: str) -> argparse.ArgumentParser:
    """Options that both benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rated", required=True, help="labels of rated photographs: image, split, mos in 0..1")
    parser.add_argument("--images", required=True, help="folder of these photographs")
    parser.add_argument("--pristine", required=True, help="folder of undistorted pictures")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and models")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file of the results")
    parser.add_argument("--cold-start-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def crop(path: Path) -> Image.Image:
    """The central square of a picture, at its own scale."""
    picture = Image.open(path).convert("RGB")
    left, top = ((side - SIDE) // 2 for side in picture.size)
    return picture.crop((left, top, left + SIDE, top + SIDE))


def make_sets(options: argparse.Namespace, train: int = 480, val: int = 240, scenes: int = 80) -> list[str]:
    """Write both data sets below the work folder, unless they are there; returns their label files."""
    folder = options.work / "pictures"
    files = [folder / "opinions.csv", folder / "distortions.csv"]
    if all(file.is_file() for file in files):
        return [str(file) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    with open(options.rated, newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = ["image,mos,split"]
    for split, count in (("train", train), ("val", val)):
        of_split = [row for row in rows if row["split"] == split]
        for i in random.permutation(len(of_split))[:count]:
            row = of_split[i]
            name = Path(row["image"]).stem + ".png"
            crop(Path(options.images) / row["image"]).save(folder / name)
            lines.append(f"{name},{row['mos']},{split}")
    files[0].write_text("\n".join(lines) + "\n")
    lines = ["image,mos,split"]
    for scene, path in enumerate(sorted(Path(options.pristine).glob("*.jpg"))[:scenes]):
        clean = crop(path)
        for version in range(6):
            kind, level = KINDS[random.integers(len(KINDS))], int(random.integers(LEVELS + 1))
            name = f"scene{scene}_{version}.png"
            distort(clean, kind, level, seed=scene).save(folder / name)
            lines.append(f"{name},{100 - 12 * level},{'val' if scene % 4 == 0 else 'train'}")
    files[1].write_text("\n".join(lines) + "\n")
    return [str(file) for file in files]


def start_model(options: argparse.Namespace, data: list[str]) -> Path:
    """The weak start model, made once."""
    folder = options.work / f"start{options.cold_start_steps}"
    if (folder / "config.json").is_file():
        return folder
    blank = options.work / "blank"
    loaded = load_model(ModelSpec("nano", device="cpu"))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in loaded.model.model.language_model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=weight.shape[1] ** -0.5, generator=random)
    config = settings(options, data, str(blank), 0, options.work, cold_start_steps=options.cold_start_steps)
    RankerProcessor(loaded, []).save_pretrained(blank)
    loaded.model.save_pretrained(blank)
    torch.manual_seed(0)
    coldstart.NOISE = NOISE
    return coldstart.cold_start(config, prepare_data(config)[0], folder)


def settings(options, data: list[str], model: str, seed: int, output: Path, **more) -> RankerConfig:
    """The settings that all runs share, with some changed."""
    common = {
        "model": model,
        "data": data,
        "output_dir": str(output),
        "seed": seed,
        "images_per_device": 16,
        "images_per_comparison": 16,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "kl_weight": 0.0,
        "freeze_vision": True,
        "cold_start_learning_rate": 2e-3,
        "logging_steps": 1,
        "save_steps": 10_000,
        "eval_steps": 10_000,
        "collapse_patience": 0,
        "log_replies": False,
    }
    return RankerConfig.preset("nano", **{**common, **more})


def log_of(output: Path) -> list[dict]:
    """Everything a run logged, the start model's validation first."""
    start = json.loads((output / "data.json").read_text())["start"]
    return [{"step": 0, **start}, *json.loads((output / "trainer_state.json").read_text())["log_history"]]


@cache
def provenance() -> dict[str, str]:
    """The command and the commit of this run, for every row of the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    names = [Path(part).name if "/" in part else part for part in sys.argv]
    return {"commit": commit, "command": " ".join(["python", *names])}


def append(path: Path, row: dict) -> None:
    """Add a row to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
