"""Every picture that training shows, through the resting half of the tower: rated sets, mirrored too, and ladders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from recipes.nano.ladders import distortion_ladder, enlargement_ladder, restoration_ladder
from recipes.nano.seen import Item, Pictures, Pool, open_picture, open_pools, see
from recipes.nano.sets import RatedSet
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.nano.modeling import NanoTower

RESTING = 11
"""Blocks that keep their ImageNet weights: half of them, a seventh of the weights, and nearly all of the work."""
SIDE, RUNGS = 256, 5
"""Side of the crops that ladders are made of, and pictures in each."""
Shown = list[tuple[Image.Image, Item]]


def rated_pictures(rated: RatedSet) -> Callable[[int], Shown]:
    """Picture ``n`` and its mirror image."""

    def make(n: int) -> Shown:
        one = rated.pictures[n]
        picture, item = open_picture(one.path), Item(one.scene, n, one.mos)
        return [(picture, item), (ImageOps.mirror(picture), item)]

    return make


def smaller_pictures(rated: RatedSet) -> Callable[[int], Shown]:
    """Picture ``n`` with its shorter side at 512 pixels, if it is larger than that."""

    def make(n: int) -> Shown:
        one = rated.pictures[n]
        picture = open_picture(one.path)
        scale = 512 / min(picture.size)
        if scale > 0.8:
            return []
        small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        return [(small, Item(one.scene, n, one.mos))]

    return make


def ladders(paths: Sequence[tuple[Path, bool]], enlarged: bool, seed: int) -> Callable[[int], Shown]:
    """Ladder ``n`` of pictures; the flag says whether one counts as undistorted."""

    def make(n: int) -> Shown:
        path, clean = paths[n % len(paths)]
        rng = np.random.default_rng([seed, enlarged, n])
        picture = open_picture(path)
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        made = (
            enlargement_ladder(picture, SIDE, RUNGS, rng)
            if enlarged
            else distortion_ladder(picture, SIDE, RUNGS, clean, rng)
        )
        return [(rung.picture, Item(f"{n}", -1, rung.score, rung.level, rung.name)) for rung in made]

    return make


def restorations(pairs: Sequence[tuple[Path, Path]], seed: int) -> Callable[[int], Shown]:
    """Ladder ``n`` of (original, restored) files."""

    def make(n: int) -> Shown:
        original, restored = (open_picture(path) for path in pairs[n % len(pairs)])
        made = restoration_ladder(original, restored, RUNGS, np.random.default_rng([seed, 2, n]))
        return [(rung.picture, Item(f"{n}", -1, rung.score, rung.level, rung.name)) for rung in made]

    return make


def prepare(
    tower: NanoTower, sets: Sequence[RatedSet], paths: Sequence[tuple[Path, bool]], counts: tuple[int, int],
    config: PixelConfig, folder: Path, *, restored: Sequence[tuple[Path, Path]] = (), seed: int = 0, workers: int = 1,
    report=print,
) -> dict[str, list[Pool]]:  # fmt: skip
    """Make what is not in ``folder`` yet; returns the pools of each set, of `distortions` and of `enlargements`.

    Args:
        tower: with its starting weights.
        sets: rated pictures.
        paths: pictures for ladders, and whether each counts as undistorted.
        counts: ladders of distortions, and of faults on enlargements.
        config: how scoring resizes pictures.
        folder: where the maps are kept.
        restored: files of originals and of what networks restored of them, two ladders each.
        seed: of the ladders.
        workers: processes that open and distort pictures; 0 for none.
    """
    jobs = {one.name: (rated_pictures(one), len(one.pictures)) for one in sets}
    for one in sets:
        if one.name == "generated":
            jobs["generated_small"] = smaller_pictures(one), len(one.pictures)
    jobs |= {
        "distortions": (ladders(paths, False, seed), counts[0]),
        "enlargements": (ladders(paths, True, seed), counts[1]),
    }
    if restored:
        jobs["restorations"] = (restorations(restored, seed), 2 * len(restored))
    pools = {}
    for name, (make, count) in jobs.items():
        done = folder / name / "done"
        if not done.is_file():
            shown = Pictures(make, count, config)
            loader = torch.utils.data.DataLoader(
                shown, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None, collate_fn=_same
            )
            see(tower, RESTING, loader, folder / name, config)
            done.touch()
        pools[name] = open_pools(folder / name)
        report(f"{name}: {sum(len(pool.items) for pool in pools[name])} pictures of {len(pools[name])} sizes")
    return pools


def _same(value):
    return value
