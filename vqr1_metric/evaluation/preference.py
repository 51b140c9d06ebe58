"""Preference data: does a scorer prefer what people prefer, and how well could any scorer do?

Votes come as pairs ("a over b", so many votes each) or as votes for the best of several versions of one scene. Votes
for the best of several say of two versions that, among those who chose one of these two, so many chose each (Luce,
1959).

The ceiling: people disagree, so even the scorer that always sides with the majority meets only that share of the votes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vqr1_metric.evaluation.agreement import percentile_interval, resample
from vqr1_metric.evaluation.labels import LabelError, Problem
from vqr1_metric.evaluation.readers import find_column, parse_number, read_table

_A = ("a", "imagea", "first", "left")
_B = ("b", "imageb", "second", "right")
_VOTES_A = ("votesa", "awins", "a_votes", "firstvotes")
_VOTES_B = ("votesb", "bwins", "b_votes", "secondvotes")
_BEST = ("bestvotes", "votes", "wins")


@dataclass(frozen=True)
class Preference:
    """Votes between two versions.

    Args:
        scene: what both show; resampling draws whole scenes.
        a, b: names of the pictures.
        votes_a, votes_b: how many preferred each; both may be fractions.
    """

    scene: str
    a: str
    b: str
    votes_a: float
    votes_b: float


@dataclass(frozen=True)
class PreferenceSet:
    """Preferences of one file.

    Args:
        name: as tables call it.
        pairs: all pairs with at least one vote.
        choices: scene -> picture -> votes for best, where the votes were for the best of several.
        problems: rows that were left out.
    """

    name: str
    pairs: tuple[Preference, ...]
    choices: Mapping[str, Mapping[str, float]]
    problems: tuple[Problem, ...] = ()

    @property
    def images(self) -> list[str]:
        """Every picture's name once, in the order of the file."""
        return list(dict.fromkeys(name for pair in self.pairs for name in (pair.a, pair.b)))


def read_preferences(path: str | Path) -> PreferenceSet:
    """Preferences of a table with the columns ``a, b, votes_a, votes_b`` (the last two may be missing: then each row is
    one vote for ``a``) and optionally ``scene``, or ``image, scene, best_votes`` (votes for the best of each scene).

    Raises:
        LabelError: for a file with neither.
    """
    path = Path(path)
    rows, decimal_comma = read_table(path)
    if not rows:
        raise LabelError(f"Expected preferences in {str(path)!r}, but it is empty.")
    keys = ["".join(letter for letter in cell.lower() if letter.isalnum()) for cell in rows[0]]

    def column(names: Sequence[str]) -> int | None:
        return next((keys.index(name) for name in names if name in keys), None)

    scene = find_column(rows[0], "scene")
    if column(_A) is not None and column(_B) is not None:
        return _pairs(path, rows, [column(_A), column(_B), column(_VOTES_A), column(_VOTES_B), scene], decimal_comma)
    image, votes = find_column(rows[0], "image"), column(_BEST)
    if image is None or votes is None or scene is None:
        raise LabelError(
            f"Expected columns a, b, votes_a, votes_b or image, scene, best_votes in {str(path)!r}, but got "
            f"{', '.join(rows[0])}."
        )
    return _best_of(path, rows, image, scene, votes, decimal_comma)


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _pairs(path: Path, rows, columns: list[int | None], decimal_comma: bool) -> PreferenceSet:
    pairs, problems = [], []
    counted = columns[2] is not None and columns[3] is not None
    for number, row in enumerate(rows[1:], 2):
        a, b, first, second, scene = (_cell(row, column) for column in columns)
        votes = (parse_number(first, decimal_comma), parse_number(second, decimal_comma)) if counted else (1.0, 0.0)
        if not a or not b or a == b or not all(vote >= 0 for vote in votes) or not sum(votes):
            problems.append(Problem("bad row", f"row {number}", "needs two pictures and a vote: left out"))
            continue
        pairs.append(Preference(scene or f"row {number}", a, b, *votes))
    return _checked(path, pairs, {}, problems)


def _best_of(path: Path, rows, image: int, scene: int, votes: int, decimal_comma: bool) -> PreferenceSet:
    choices: dict[str, dict[str, float]] = defaultdict(dict)
    problems = []
    for number, row in enumerate(rows[1:], 2):
        name, place, count = _cell(row, image), _cell(row, scene), parse_number(_cell(row, votes), decimal_comma)
        if not name or not place or not count >= 0:
            detail = "needs a picture, a scene and votes: left out"
            problems.append(Problem("bad row", name or f"row {number}", detail))
        elif name in choices[place]:
            problems.append(Problem("duplicate", name, "occurs twice in its scene: the first row counts"))
        else:
            choices[place][name] = count
    pairs = [
        Preference(place, a, b, found[a], found[b])
        for place, found in choices.items()
        for a, b in combinations(found, 2)
        if found[a] + found[b] > 0
    ]
    return _checked(path, pairs, {place: dict(found) for place, found in choices.items()}, problems)


def _checked(path: Path, pairs, choices, problems) -> PreferenceSet:
    if not pairs:
        raise LabelError(f"Expected at least one pair of pictures with a vote in {str(path)!r}, but found none.")
    return PreferenceSet(path.stem, tuple(pairs), choices, tuple(problems))


def preference_agreement(
    preferences: PreferenceSet,
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
        from resampling scenes:

        - ``votes_met``: share of votes the scores side with, a tie in score meeting half;
        - ``ceiling``: the same for a scorer that always sides with the majority; ``chance`` is 0.5;
        - ``of_reach``: ``(votes_met - 0.5) / (ceiling - 0.5)``, 1 is as good as votes allow;
        - ``majority``: share of pairs with a majority that the scores order like it;
        - ``best_met``, ``best_ceiling``, ``best_chance``: share of the votes for best that went to the picture with the
          highest score, to the one with most votes, to a random one; None for pairs.
    """
    known = [p for p in preferences.pairs if _score(scores, p.a) is not None and _score(scores, p.b) is not None]
    left_out = len(preferences.pairs) - len(known)
    if not known:
        return {"pairs": 0, "scenes": 0, "votes": 0.0, "left_out": left_out, "reason": "no pair has two scores"}
    scenes = list(dict.fromkeys(pair.scene for pair in known))
    table = np.array([_scene_sums([p for p in known if p.scene == scene], scores) for scene in scenes])
    best = [_best_sums(preferences.choices[scene], scores) for scene in scenes if scene in preferences.choices]
    best = np.array([row for row in best if row is not None])
    found: dict[str, Any] = {
        "pairs": len(known),
        "scenes": len(scenes),
        "votes": float(table[:, 0].sum()),
        "left_out": left_out,
        "chance": 0.5,
        "level": level,
    }
    draws = [_ratios(table[i]) for i in resample(len(scenes), resamples, seed)] if len(scenes) > 1 else []
    for name, value in _ratios(table).items():
        low, high = percentile_interval([draw[name] for draw in draws], level)
        found[name] = (value, low, high)
    names = ("best_met", "best_ceiling", "best_chance")
    if not len(best):
        return found | dict.fromkeys(names)
    drawn = [best[i].sum(0) for i in resample(len(best), resamples, seed)] if len(best) > 1 else []
    total = best.sum(0)
    for column, name in enumerate(names, 1):
        low, high = percentile_interval([row[column] / row[0] for row in drawn], level)
        found[name] = (float(total[column] / total[0]), low, high)
    return found


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


def _ratios(table: np.ndarray) -> dict[str, float]:
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
