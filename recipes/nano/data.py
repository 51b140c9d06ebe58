"""Rated pictures, and training batches of prepared crops: rated ones beside ladders of synthetic distortions."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqr1_metric.images.distortions import DISTORTIONS, LEVELS

LOWEST, HIGHEST = 1.0, 5.0
PRISTINE_SCORE = 4.2
"""Assumed score of a picture of the unrated, undistorted set."""
WORST_SCORE = 1.2
"""Assumed score at level 8 of a distortion that destroys detail."""
MILD = {"contrast": 0.55, "colour": 0.45, "darken": 0.6, "overexpose": 0.7, "colour_cast": 0.55, "posterise": 0.75}
"""Share of the fall for distortions that leave the detail in place."""


@dataclass
class Rated:
    """Rated pictures: `pictures` (N, S, S, 3) uint8, `scores` (N,) on the scale 1 to 5, `names`."""

    pictures: np.ndarray
    scores: np.ndarray
    names: list[str]


def load_rated(labels: str | Path, images: str | Path, split: str) -> Rated:
    """Read `image, split, mos` rows (mos in 0..1, higher is better) of one split; scores become 1 + 4 mos.

    Pictures are cropped to the largest common square of a multiple of 128 pixels, centred.

    Raises:
        ValueError: a column is missing, a score lies outside 0..1, or the split is empty.
    """
    with open(labels, newline="") as stream:
        rows = list(csv.DictReader(stream))
    missing = {"image", "split", "mos"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(
            f"Expected the columns image, split, mos in {labels} but {', '.join(sorted(missing))} is missing."
        )
    rows = [row for row in rows if row["split"] == split]
    if not rows:
        raise ValueError(f"Expected rows of split {split!r} in {labels} but there is none.")
    mos = np.array([float(row["mos"]) for row in rows], dtype=np.float32)
    if not ((mos >= 0) & (mos <= 1)).all():
        raise ValueError(f"Expected mos between 0 and 1 in {labels} but got {mos.min()} to {mos.max()}.")
    opened = [np.asarray(Image.open(Path(images) / row["image"]).convert("RGB")) for row in rows]
    side = min(min(picture.shape[:2]) for picture in opened) // 128 * 128
    if side == 0:
        raise ValueError(f"Expected pictures of at least 128x128 pixels in {images}.")
    squares = []
    for picture in opened:
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        squares.append(picture[top : top + side, left : left + side])
    return Rated(np.stack(squares), LOWEST + (HIGHEST - LOWEST) * mos, [row["image"] for row in rows])


def load_folder(folder: str | Path) -> list[Image.Image]:
    """All pictures of a folder as RGB, sorted by name."""
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp"))
    return [Image.open(path).convert("RGB") for path in paths]


def assumed_score(start: float, name: str, level: float) -> float:
    """The anchor of a ladder: from the start score, straight down to the worst one at level 8."""
    return start - MILD.get(name, 1.0) * (start - WORST_SCORE) * level / LEVELS


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of batches from prepared crops (`prepare.py`), each a function of (seed, place in the stream).

    A batch is a dict: `images` (N, 3, size, size) uint8, rated crops first; `scores` (N,): expected opinions, then
    anchors; `rated`: how many are rated; `scene` and `level` (N,): ladder number (-1 for rated crops) and strength, 0
    to 8; `targets` (N, C): what the statistics head must tell (`lessons` in `__main__.py`).

    Args:
        folder: of `prepare`.
        opinions: the scores that the rated crops are trained on, (crops,).
        targets: targets of all rated crops (crops, C) and of all ladders (ladders, rungs, C).
        rated_crops, ladders: how many of each in a batch; a ladder has five crops.
    """

    def __init__(self, folder, opinions: Tensor, targets: tuple[Tensor, Tensor], rated_crops=20, ladders=4, seed=0):
        self.folder, self.opinions, self.targets = Path(folder), opinions, targets
        self.rated_crops, self.ladders, self.seed = rated_crops, ladders, seed

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def __iter__(self):
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        crops, ladders = self._load("rated_crops"), self._load("ladder_crops")
        level, start, kind = (self._load(f"ladder_{name}") for name in ("level", "start", "distortion"))
        names = list(DISTORTIONS)
        rungs = ladders.shape[1]
        own = _shuffled(len(crops), rng)
        other = _shuffled(len(ladders), rng)
        while True:
            chosen = np.array([next(own) for _ in range(self.rated_crops)])
            scenes = np.array([next(other) for _ in range(self.ladders)])
            images = np.concatenate([crops[chosen], ladders[scenes].reshape(-1, *ladders.shape[2:])])
            flips = np.concatenate([rng.random(len(chosen)) < 0.5, np.repeat(rng.random(len(scenes)) < 0.5, rungs)])
            images[flips] = images[flips][:, :, ::-1]
            anchors = [
                assumed_score(float(start[scene]), names[kind[scene]], float(value))
                for scene in scenes
                for value in level[scene]
            ]
            scene = np.concatenate([np.full(len(chosen), -1), np.repeat(np.arange(len(scenes)), rungs)])
            yield {
                "images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                "scores": torch.cat([self.opinions[chosen], torch.tensor(anchors, dtype=torch.float32)]),
                "rated": len(chosen),
                "scene": torch.from_numpy(scene),
                "level": torch.from_numpy(np.concatenate([np.zeros(len(chosen), np.float32), level[scenes].ravel()])),
                "targets": torch.cat([self.targets[0][chosen], self.targets[1][scenes].flatten(0, 1)]),
            }


def _shuffled(count: int, rng: np.random.Generator):
    """Numbers below `count` without end, each once before any comes again."""
    while True:
        yield from rng.permutation(count)
