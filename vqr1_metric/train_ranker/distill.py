"""Distillation: a student learns what a teacher says of pictures, its whole score distribution, through the readout.

A teacher's file is what ``vqr1 score -o FILE.jsonl`` writes: JSON lines with ``path`` and ``probabilities`` (401
numbers, of the scores 1.00 to 5.00). A line without ``probabilities`` has a ``score`` and, if known, its ``std``; it
stands for a normal distribution on the grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqr1_metric.functional.distribution import GRID_SIZE, MAX_SCORE, MIN_SCORE, STEPS_PER_UNIT, score_grid
from vqr1_metric.ratings import RatedImage, RatingError, RatingSet
from vqr1_metric.ratings.lookup import find_images
from vqr1_metric.ratings.sets import raise_problems

DistillLoss = Literal["cross_entropy", "wasserstein", "mean"]
#: An unreadable reply is as far from a score as two scores can be.
_FARTHEST = MAX_SCORE - MIN_SCORE


@dataclass(frozen=True)
class TaughtImage(RatedImage):
    """An image of which a teacher spoke; its ``mos`` is the teacher's mean score.

    Args:
        distribution: the teacher's probabilities of the 401 scores.
    """

    distribution: Tensor | None = field(default=None, compare=False, repr=False)


def distill_loss(outcome_BO: Tensor, target_BS: Tensor, kind: DistillLoss) -> Tensor:
    r"""How far the student's outcomes are from the teacher's distribution, ``(B,)``.

    - ``"cross_entropy"``: :math:`-\sum_s q(s) \log p(s)`, in nats; p is the probability that a reply states s.
    - ``"wasserstein"``: :math:`\int |F_p - F_q|`, in score units, where a reply can be read; an unreadable one counts
      as 4, the farthest that two scores can be apart.
    - ``"mean"``: :math:`(\mathrm{E} p - \mathrm{E} q)^2` in the same way, unreadable replies counting as 16: what a
      student learns who is told mean scores only.

    Args:
        outcome_BO: probabilities of 401 scores and of "not readable", ``(B, 402)``.
        target_BS: the teacher's, ``(B, 401)``.
        kind: see above.
    """
    if kind == "cross_entropy":
        tiny = torch.finfo(outcome_BO.dtype).tiny
        return -(target_BS * outcome_BO[:, :-1].clamp(min=tiny).log()).sum(1)
    readable_B = 1 - outcome_BO[:, -1]
    score_BS = outcome_BO[:, :-1] / readable_B.clamp(min=1e-6)[:, None]
    if kind == "wasserstein":
        apart_B, farthest = (score_BS.cumsum(1) - target_BS.cumsum(1)).abs().sum(1) / STEPS_PER_UNIT, _FARTHEST
    else:
        grid = score_grid(outcome_BO.device, outcome_BO.dtype)
        apart_B, farthest = ((score_BS - target_BS) @ grid) ** 2, _FARTHEST**2
    return readable_B * apart_B + outcome_BO[:, -1] * farthest


def read_teacher(sources: Sequence[str | Path], images: Sequence[str | Path] = ()) -> list[RatingSet]:
    """One set for each file of scores, of images with their distributions.

    Args:
        sources: files, see above.
        images: folders in which the images are looked for, before the file's own; a path that exists is taken as it is.

    Raises:
        RatingError: what was expected, what came, in which file and line.
    """
    sets = []
    for source in map(Path, sources):
        if not source.is_file():
            raise RatingError(f"Expected a file of scores, but {str(source)!r} is none.")
        taught = []
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found = _taught(line, f"{source}, line {number}")
                taught += [found] if found is not None else []
        if not taught:
            raise RatingError(f"Expected scores in {str(source)!r}, but there are none.")
        folders = [Path(folder) for folder in images] + [source.parent]
        s = find_images(RatingSet(source.stem, tuple(taught), sources=(source,)), folders, report_unlabelled=False)
        raise_problems(f"the images of {str(source)!r}", s.problems)
        sets.append(s)
    return sets


def _taught(line: str, where: str) -> TaughtImage | None:
    """The image of a line; None for a line of a failed image or of no score, which teaches nothing."""
    try:
        row: dict[str, Any] = json.loads(line)
        name = str(row.get("path") or row["image"])
        if row.get("probabilities") is not None:
            probabilities = torch.tensor(row["probabilities"], dtype=torch.float32)
        elif row.get("score") is None:
            return None
        else:
            probabilities = normal_distribution(float(row["score"]), float(row.get("std") or 0.0))
        if probabilities.shape != (GRID_SIZE,) or not bool((probabilities >= 0).all()) or not probabilities.sum() > 0:
            raise ValueError(f"the probabilities are not {GRID_SIZE} of at least 0")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatingError(
            f'Expected {{"path", "probabilities"}} or {{"path", "score", "std"}} in {where}, but got {line[:80]!r} '
            f"({type(error).__name__}: {error})."
        ) from None
    probabilities = probabilities / probabilities.sum()
    mean = float(probabilities.double() @ score_grid(dtype=torch.float64))
    return TaughtImage(name, mean, where=where, distribution=probabilities)


def normal_distribution(mean: float, std: float) -> Tensor:
    """A normal distribution on the grid of scores, ``(401,)``; with a ``std`` of 0 the two nearest scores."""
    grid = score_grid(dtype=torch.float64)
    if not math.isfinite(mean) or not MIN_SCORE <= mean <= MAX_SCORE:
        raise ValueError(f"a score of {mean}")
    if std <= 0:
        return (1 - (grid - mean).abs() * STEPS_PER_UNIT).clamp(min=0).float()
    return (-0.5 * ((grid - mean) / std) ** 2).softmax(0).float()
