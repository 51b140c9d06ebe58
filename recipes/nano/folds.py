"""Figures on the pictures held out of a training run, from what was prepared of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import spearmanr

from recipes.nano.seen import Pool
from recipes.nano.sets import RatedSet
from recipes.nano.train import Student
from vqr1_metric.functional.distribution import ScoreDistribution

BATCH_TOKENS = 2000


@torch.no_grad()
def predict(student: Student, pools: Sequence[Pool], held: set[int]) -> tuple[list[int], ScoreDistribution]:
    """Indices in the set and distributions of the held-out pictures, whole and not mirrored."""
    student.model.eval()
    indices, found = [], []
    for pool in pools:
        first = {}
        for place, item in enumerate(pool.items):
            if item.index in held:
                first.setdefault(item.index, place)
        places, count = sorted(first.values()), max(1, BATCH_TOKENS // (pool.grid[0] * pool.grid[1]))
        for start in range(0, len(places), count):
            chosen = places[start : start + count]
            visual = student.see(*pool.load(chosen, [(0, 0)] * len(chosen), pool.grid))
            found.append(
                student.readout.read(visual, pool.grid, student.readout.answers(torch.full((len(chosen),), 3.0)))[0]
            )
            indices += [pool.items[place].index for place in chosen]
    return indices, ScoreDistribution(
        torch.cat([one.probabilities for one in found]), torch.cat([one.coverage for one in found]),
        torch.cat([one.tag_probability for one in found]),
    )  # fmt: skip


def votes_met(rated: RatedSet, indices: Sequence[int], scores: np.ndarray) -> tuple[float, float]:
    """Share of the votes that agree with the scores (half of a tie's), and with each pair's majority."""
    score, met, most, total = dict(zip(indices, scores, strict=True)), 0.0, 0.0, 0.0
    for i, j, won, lost in rated.pairs(set(indices)):
        met += (won + lost) / 2 if score[i] == score[j] else won if score[i] > score[j] else lost
        most += max(won, lost)
        total += won + lost
    return met / total, most / total


def srcc_in_scenes(scenes: Sequence[str], scores: np.ndarray, mos: np.ndarray) -> float:
    """Mean rank correlation inside scenes of at least three pictures."""
    names = np.array(scenes)
    found = [
        spearmanr(scores[names == name], mos[names == name]).statistic
        for name in sorted(set(scenes))
        if (names == name).sum() > 2
    ]
    return float(np.nanmean(found)) if found else float("nan")


def figures(
    student: Student, sets: Sequence[RatedSet], pools: Mapping[str, Sequence[Pool]]
) -> dict[str, dict[str, float]]:
    """Of each set with held-out pictures: SRCC (and inside scenes) or votes met, beside the spread of the scores."""
    told = {}
    for rated in sets:
        if not rated.held_out:
            continue
        indices, distribution = predict(student, pools[rated.name], rated.held_out)
        scores = distribution.mean.numpy()
        told[rated.name] = {
            "n": len(indices),
            "mean": float(scores.mean()),
            "spread": float(scores.std()),
            "coverage": float(distribution.coverage.min()),
        }
        if rated.wins is not None:
            met, most = votes_met(rated, indices, scores)
            told[rated.name] |= {"met": met, "majority": most}
            continue
        mos = np.array([rated.pictures[i].mos for i in indices])
        told[rated.name]["srcc"] = float(spearmanr(scores, mos).statistic)
        scenes = [rated.pictures[i].scene for i in indices]
        if len(set(scenes)) < len(scenes):
            told[rated.name]["in_scene"] = srcc_in_scenes(scenes, scores, mos)
        slope, offset = np.polyfit(scores, mos, 1)
        error = slope * scores + offset - mos
        told[rated.name]["std_scale"] = float(
            np.sqrt(np.mean(error**2)) / (abs(slope) * np.sqrt(np.mean(distribution.variance.numpy())))
        )
    return told
