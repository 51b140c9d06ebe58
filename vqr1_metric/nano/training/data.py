"""Training batches: crops of rated pictures beside ladders of synthetic distortions.

Rated crops carry the mean opinion score of their picture. A ladder is one scene at several strengths of one
distortion; it carries the strengths (a stronger one must score lower) and an assumed score that falls with the
strength, as a light anchor.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqr1_metric.distortions import DISTORTIONS, LEVELS, distort_by

from .features import classical_features

LOWEST, HIGHEST = 1.0, 5.0
PRISTINE_SCORE = 4.2
"""Assumed score of a picture of the unrated, undistorted set."""
WORST_SCORE = 1.2
"""Assumed score at level 8 of a distortion that destroys detail."""
MILD = {"contrast": 0.55, "colour": 0.45, "darken": 0.6, "overexpose": 0.7, "colour_cast": 0.55, "posterise": 0.75}
"""Share of the fall for distortions that leave the detail in place."""

OFTEN = {"jpeg": 4, "webp": 2, "jpeg2000": 2, "noise": 2}
"""Distortions drawn more often than the others: the usual ones; block artefacts are the slowest to be learned."""


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


def _random_crop(array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square; on the 8-pixel JPEG grid in three of four cases, as whole pictures are."""
    step = 8 if rng.random() < 0.75 else 1
    top, left = (int(rng.integers(0, (extent - size) // step + 1)) * step for extent in array.shape[:2])
    crop = array[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of batches; each is a function of (seed, worker, position in the stream).

    A batch is a dict: `images` (N, 3, size, size) uint8, rated crops first; `scores` (N,): opinion scores, then
    anchors; `rated`: how many are rated; `scene` and `level` (N,): ladder number (-1 for rated crops) and strength, 0
    to 8; `features` (M, 119) of the last M images.
    """

    def __init__(self, rated, pristine, size, rated_crops=24, scenes=3, rungs=4, features=16, seed=0):
        self.rated, self.pristine, self.size = rated, pristine, size
        self.rated_crops, self.scenes, self.rungs, self.features, self.seed = rated_crops, scenes, rungs, features, seed
        self.good = np.flatnonzero(rated.scores >= np.quantile(rated.scores, 0.6))

    def _ladder(self, rng: np.random.Generator) -> tuple[list[np.ndarray], list[float], list[float]]:
        chance = np.array([OFTEN.get(name, 1) for name in DISTORTIONS])
        name = list(DISTORTIONS)[rng.choice(len(chance), p=chance / chance.sum())]
        if self.pristine and rng.random() < 0.5:
            picture, start = self.pristine[rng.integers(len(self.pristine))], PRISTINE_SCORE
        else:
            index = int(rng.choice(self.good))
            picture, start = Image.fromarray(self.rated.pictures[index]), float(self.rated.scores[index])
        size, short = self.size, min(picture.size)
        if short < size:
            picture = picture.resize([max(size, round(side * size / short)) for side in picture.size], Image.BICUBIC)
            short = min(picture.size)
        # Larger pictures reach the model reduced, so half of the ladders are distorted first and reduced afterwards.
        target = int(rng.integers(size, short + 1)) if rng.random() < 0.5 else short
        levels = np.sort(rng.uniform(1, LEVELS, self.rungs))
        if rng.random() < 0.6:
            levels[0] = 0.0
        seed, crop_seed = (int(value) for value in rng.integers(0, 2**31, 2))
        crops = []
        for level in levels:
            strength = np.interp(level, range(1, LEVELS + 1), DISTORTIONS[name].strengths)
            rung = picture if level == 0 else distort_by(picture, name, float(strength), seed)
            if target < short:
                rung = rung.resize([max(size, round(side * target / short)) for side in rung.size], Image.BICUBIC)
            crops.append(_random_crop(np.asarray(rung), size, np.random.default_rng(crop_seed)))
        return crops, levels.tolist(), [assumed_score(start, name, level) for level in levels]

    def batch(self, rng: np.random.Generator) -> dict[str, Tensor | int]:
        """One batch from a generator."""
        chosen = rng.choice(len(self.rated.scores), self.rated_crops, replace=len(self.rated.scores) < self.rated_crops)
        crops = [_random_crop(self.rated.pictures[index], self.size, rng) for index in chosen]
        scores = self.rated.scores[chosen].tolist()
        scene, level = [-1] * len(crops), [0.0] * len(crops)
        for number in range(self.scenes):
            rungs, levels, anchors = self._ladder(rng)
            crops, scores, level = crops + rungs, scores + anchors, level + levels
            scene += [number] * len(rungs)
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        return {
            "images": images,
            "scores": torch.tensor(scores, dtype=torch.float32),
            "rated": len(chosen),
            "scene": torch.tensor(scene),
            "level": torch.tensor(level, dtype=torch.float32),
            "features": classical_features(images[-self.features :]) if self.features else torch.zeros(0, 119),
        }

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            yield self.batch(rng)
