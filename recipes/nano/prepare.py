"""Crops and their statistics, made once: rated crops, and ladders of synthetic distortions.

A ladder is one scene at several strengths of one distortion; it carries the strengths (a stronger one must score
lower) and an assumed score that falls with the strength, as a light anchor.
"""

import concurrent.futures
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort_by

from .data import PRISTINE_SCORE, Rated
from .features import STATISTICS, statistics

RUNGS = 5
OFTEN = {"jpeg": 3, "webp": 3, "colour": 2, "overexpose": 2, "posterise": 2, "pixelate": 2}
"""Distortions drawn more often than the others: those that are the slowest to be learned."""
TASK = 16


@dataclass
class Source:
    """What the workers draw from."""

    rated: Rated
    pristine: list[Image.Image]
    size: int
    seed: int
    good: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.good = np.flatnonzero(self.rated.scores >= np.quantile(self.rated.scores, 0.6))


def _corner(extents: tuple[int, int], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left corner of a random square; on the 8-pixel JPEG grid in three of four cases, as whole pictures are."""
    step = 8 if rng.random() < 0.75 else 1
    top, left = (int(rng.integers(0, (extent - size) // step + 1)) * step for extent in extents)
    return top, left


def rated_crop(source: Source, index: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of a rated picture."""
    picture = source.rated.pictures[index]
    top, left = _corner(picture.shape[:2], source.size, rng)
    return picture[top : top + source.size, left : left + source.size]


def ladder_crops(source: Source, rng: np.random.Generator) -> tuple[list[np.ndarray], int, list[float], float]:
    """One ladder: crops, number of the distortion, strengths 0..8, score of the undistorted picture."""
    chance = np.array([OFTEN.get(name, 1) for name in DISTORTIONS])
    number = int(rng.choice(len(chance), p=chance / chance.sum()))
    name, size = list(DISTORTIONS)[number], source.size
    if source.pristine and rng.random() < 0.6:
        picture, start = source.pristine[rng.integers(len(source.pristine))], PRISTINE_SCORE
    else:
        index = int(rng.choice(source.good))
        picture, start = Image.fromarray(source.rated.pictures[index]), float(source.rated.scores[index])
    short = min(picture.size)
    if short < size:
        picture = picture.resize([max(size, round(side * size / short)) for side in picture.size], Image.BICUBIC)
        short = size
    # Larger pictures reach the model reduced, so some of the ladders are distorted first and reduced afterwards.
    target = int(rng.integers(size, short + 1)) if rng.random() < 0.3 else short
    if target == short:
        top, left = _corner(picture.size[::-1], size, rng)
        picture = picture.crop((left, top, left + size, top + size))
    levels = np.sort(rng.choice(LEVELS + 1, RUNGS, replace=False).astype(float))
    if rng.random() < 0.3:
        levels = np.sort(rng.uniform(1, LEVELS, RUNGS))
    seed = int(rng.integers(0, 2**31))
    corner, crops = None, []
    for level in levels:
        strength = np.interp(level, range(1, LEVELS + 1), DISTORTIONS[name].strengths)
        rung = picture if level == 0 else distort_by(picture, name, float(strength), seed)
        if target < short:
            rung = rung.resize([max(size, round(side * target / short)) for side in rung.size], Image.BICUBIC)
        corner = corner or _corner(rung.size[::-1], size, rng)
        crops.append(np.asarray(rung)[corner[0] : corner[0] + size, corner[1] : corner[1] + size])
    return crops, number, levels.tolist(), start


def _statistics(crops: np.ndarray) -> np.ndarray:
    return statistics(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()).numpy()


def _rated_task(source: Source, first: int, count: int):
    rng = np.random.default_rng([source.seed, 0, first])
    numbers = np.arange(first, first + count) % len(source.rated.scores)
    crops = np.stack([rated_crop(source, int(number), rng) for number in numbers])
    return first, {"crops": crops, "picture": numbers, "statistics": _statistics(crops)}


def _ladder_task(source: Source, first: int, count: int):
    rng = np.random.default_rng([source.seed, 1, first])
    drawn = [ladder_crops(source, rng) for _ in range(count)]
    crops = np.stack([np.stack(crops) for crops, *_ in drawn])
    return first, {
        "crops": crops,
        "distortion": np.array([number for _, number, _, _ in drawn]),
        "level": np.array([levels for *_, levels, _ in drawn], dtype=np.float32),
        "start": np.array([start for *_, start in drawn], dtype=np.float32),
        "statistics": _statistics(crops.reshape(-1, *crops.shape[2:])).reshape(count, RUNGS, STATISTICS),
    }


def _run(task, total: int, folder: Path, name: str, source: Source, workers: int, report) -> None:
    files: dict[str, np.memmap] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # decoders and filters work outside Python's lock
        jobs = [pool.submit(task, source, first, min(TASK, total - first)) for first in range(0, total, TASK)]
        for done, job in enumerate(jobs):
            first, columns = job.result()
            jobs[done] = None
            for column, values in columns.items():
                if column not in files:
                    path = folder / f"{name}_{column}.npy"
                    files[column] = open_memmap(path, "w+", values.dtype, (total, *values.shape[1:]))
                files[column][first : first + len(values)] = values
            if done % 50 == 0:
                report(f"{name} crops {first} of {total}")


def prepare(
    rated: Rated, pristine: list[Image.Image], size: int, counts, folder: Path, seed=0, workers=1, report=print
) -> None:
    """Write `counts` = (rated crops, ladders) to .npy files in `folder`; a folder that is complete is left alone."""
    folder = Path(folder)
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(rated, pristine, size, seed)
    _run(_rated_task, counts[0], folder, "rated", source, workers, report)
    _run(_ladder_task, counts[1], folder, "ladder", source, workers, report)
    (folder / "complete").touch()
