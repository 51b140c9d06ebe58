"""Preference data: does a scorer prefer what people prefer, and how well could any scorer do?

Votes come as pairs ("a over b", so many votes each) or as votes for the best of several versions of one scene. Votes
for the best of several say of two versions that, among those who chose one of these two, so many chose each (Luce,
1959).

The ceiling: people disagree, so even the scorer that always sides with the majority meets only that share of the votes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqr1_metric.evaluation.uncertainty import intervals
from vqr1_metric.ratings import Preference, RatingSet


def preference_agreement(
    preferences: RatingSet,
    scores: Mapping[str, float],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How far the scores side with the votes.

    Args:
        preferences: votes.
        scores: score of each picture, higher meaning better; a missing or NaN one leaves its pairs out.

    Returns:
        ``pairs``, ``scenes``, ``votes`` that took part, ``left_out`` pairs, and as ``(value, low, high)``, intervals
        about other scenes:

        - ``votes_met``: share of votes the scores side with, a tie in score meeting half;
        - ``ceiling``: the same for a scorer that always sides with the majority; ``chance`` is 0.5;
        - ``of_reach``: ``(votes_met - 0.5) / (ceiling - 0.5)``, 1 is as good as votes allow;
        - ``majority``: share of pairs with a majority that the scores order like it;
        - ``best_met``, ``best_ceiling``, ``best_chance``: share of the votes for best that went to the picture with the
          highest score, to the one with most votes, to a random one; None for pairs.
    """
    known = [p for p in preferences.preferences if _score(scores, p.a) is not None and _score(scores, p.b) is not None]
    left_out = len(preferences.preferences) - len(known)
    if not known:
        return {"pairs": 0, "scenes": 0, "votes": 0.0, "left_out": left_out, "reason": "no pair has two scores"}
    scenes = list(dict.fromkeys(pair.scene for pair in known))
    table = np.array([_scene_sums([p for p in known if p.scene == scene], scores) for scene in scenes])
    sums = (_best_sums(preferences.choices[scene], scores) for scene in scenes if scene in preferences.choices)
    best = np.array([row for row in sums if row is not None])
    found: dict[str, Any] = {
        "pairs": len(known),
        "scenes": len(scenes),
        "votes": float(table[:, 0].sum()),
        "left_out": left_out,
        "chance": 0.5,
        "level": level,
    }
    scales = dict.fromkeys(("votes_met", "ceiling", "majority", "best_met", "best_ceiling", "best_chance"), "share")
    units = [np.array([i]) for i in range(len(scenes))]
    estimate = partial(intervals, level=level, resamples=resamples, seed=seed, scales=scales)
    ends = estimate(lambda i: _ratios(table[i]), units)
    found |= {name: (value, *ends[name]) for name, value in _ratios(table).items()}
    names = ("best_met", "best_ceiling", "best_chance")
    if not len(best):
        return found | dict.fromkeys(names)

    def shares(i: NDArray[Any]) -> dict[str, float]:
        total = best[i].sum(0)
        return {name: float(total[column] / total[0]) for column, name in enumerate(names, 1)}

    ends = estimate(shares, [np.array([i]) for i in range(len(best))])
    return found | {name: (value, *ends[name]) for name, value in shares(np.arange(len(best))).items()}


def _score(scores: Mapping[str, float], name: str) -> float | None:
    value = scores.get(name)
    return None if value is None or math.isnan(value) else value


def _scene_sums(pairs: Sequence[Preference], scores: Mapping[str, float]) -> list[float]:
    """Votes, votes met, votes of majorities, pairs with a majority, those ordered like it."""
    votes = met = ceiling = decided = right = 0.0
    for pair in pairs:
        gap = scores[pair.a] - scores[pair.b]
        share = 0.5 if gap == 0 else float(gap > 0)
        votes += pair.votes_a + pair.votes_b
        met += share * pair.votes_a + (1 - share) * pair.votes_b
        ceiling += max(pair.votes_a, pair.votes_b)
        if pair.votes_a != pair.votes_b:
            decided += 1
            right += share if pair.votes_a > pair.votes_b else 1 - share
    return [votes, met, ceiling, decided, right]


def _ratios(table: NDArray[Any]) -> dict[str, float]:
    votes, met, ceiling, decided, right = table.sum(0)
    reach = ceiling / votes - 0.5
    return {
        "votes_met": float(met / votes),
        "ceiling": float(ceiling / votes),
        "of_reach": float((met / votes - 0.5) / reach) if reach > 0 else math.nan,
        "majority": float(right / decided) if decided else math.nan,
    }


def _best_sums(choices: Mapping[str, float], scores: Mapping[str, float]) -> list[float] | None:
    """Votes, votes for the highest score (shared among ties), most votes, votes of a random choice."""
    if any(_score(scores, name) is None for name in choices) or not sum(choices.values()):
        return None
    top = max(scores[name] for name in choices)
    chosen = [votes for name, votes in choices.items() if scores[name] == top]
    total = sum(choices.values())
    return [total, sum(chosen) / len(chosen), max(choices.values()), total / len(choices)]


def __getattr__(name: str) -> object:
    if name == "read_preferences":
        raise ImportError(f"{__name__}.{name} of version 0.1.0 is now vqr1_metric.ratings.read_ratings.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
