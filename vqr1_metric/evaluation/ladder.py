"""Distortion ladders: pristine pictures, ever more distorted. A score that follows quality must fall step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from vqr1_metric.evaluation.agreement import rank_correlation
from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.evaluation.scoring import picture_hash
from vqr1_metric.functional.intervals import mean_interval
from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort
from vqr1_metric.ratings import RatingError
from vqr1_metric.ratings.lookup import image_files

Rung = tuple[str, Callable[[], NDArray[Any]]]


def check_distortions(names: Sequence[str] | None) -> list[str]:
    """The distortions asked for, all of them for None."""
    unknown = sorted(set(names or ()) - set(DISTORTIONS))
    if unknown:
        raise RatingError(f"Expected distortions out of {', '.join(DISTORTIONS)}; but got {', '.join(unknown)}.")
    return list(names or DISTORTIONS)


def ladder_pictures(
    folder: Path, distortions: Sequence[str], seed: int = 0, max_edge: int | None = None
) -> tuple[list[str], list[Rung]]:
    """Names of the pristine pictures of a folder, and ``(key, picture)`` for each picture, distortion and level.

    Levels count from 0, the pristine picture, which stands there once for each distortion.

    Args:
        seed: of the noise.
        max_edge: pictures are reduced to this longer edge before they are distorted.
    """
    paths = image_files(folder) if folder.is_dir() else []
    if not paths:
        raise RatingError(f"Expected a folder of undistorted pictures, but {str(folder)!r} holds none.")
    rungs: list[Rung] = []
    for path in paths:
        key = f"{picture_hash(path)}:{max_edge or 'full'}"
        for name in distortions:
            rungs.append((f"{key}:pristine", partial(_rung, path, name, 0, seed, max_edge)))
            for level in range(1, LEVELS + 1):
                strength = DISTORTIONS[name].strengths[level - 1]
                rungs.append((f"{key}:{name}:{strength:g}:{seed}", partial(_rung, path, name, level, seed, max_edge)))
    return [path.name for path in paths], rungs


def ladder_statistics(scores: ArrayLike, *, level: float = 0.95) -> dict[str, Any]:
    """How far scores fall along one distortion.

    Args:
        scores: shape ``(pictures, levels + 1)``, level 0 first, higher meaning better; NaN leaves a picture out.

    Returns:
        ``n`` pictures and ``left_out``; ``monotonicity``: mean over pictures of the rank correlation of level and score
        with its sign turned, 1 if every score falls at every step; ``interval`` of it;
        ``falling``: share of steps at which the score falls; ``reversed_worst``: largest rise in one step;
        ``means``: mean score at each level; ``drop``: mean of the pristine pictures minus that of the most distorted.
    """
    scores = np.asarray(scores, float)
    known = np.isfinite(scores).all(axis=1)
    kept = scores[known]
    if not len(kept):
        return {"n": 0, "left_out": len(scores), "reason": "no picture has all its scores"}
    each = np.array([_falling_order(row) for row in kept])
    steps = np.diff(kept, axis=1)
    low, high = mean_interval(torch.from_numpy(each), level)
    return {
        "n": len(kept),
        "left_out": int((~known).sum()),
        "monotonicity": float(each.mean()),
        "interval": (float(low), float(high)),
        "falling": float((steps < 0).mean()),
        "reversed_worst": float(max(0.0, steps.max())),
        "means": kept.mean(axis=0).tolist(),
        "drop": float(kept[:, 0].mean() - kept[:, -1].mean()),
    }


def ladder_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Cells of a table: one line for each scorer and distortion."""
    lines = [["scorer", "distortion", "n", "monotonicity", "steps that fall", "pristine", "most severe"]]
    for scorer, by_distortion in found.items():
        for name, row in by_distortion.items():
            if "reason" in row:
                lines.append([scorer, name, "0", row["reason"], "", "", ""])
                continue
            low, high = row["interval"]
            ends = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
            lines.append(
                [
                    scorer,
                    name,
                    str(row["n"]),
                    f"{row['monotonicity']:.3f}{ends}",
                    f"{row['falling']:.0%}",
                    f"{row['means'][0]:.2f}",
                    f"{row['means'][-1]:.2f}",
                ]
            )
    return lines


def _rung(path: Path, name: str, level: int, seed: int, max_edge: int | None) -> NDArray[Any]:
    picture = load_picture(path)
    if max_edge is not None:
        picture.thumbnail((max_edge, max_edge), Image.Resampling.BICUBIC)
    return np.asarray(distort(picture, name, level, seed) if level else picture)


def _falling_order(row: NDArray[Any]) -> float:
    return 0.0 if np.ptp(row) == 0 else -rank_correlation(np.arange(len(row)), row)
