"""What scoring, comparing and ranking give back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vqr1_metric.functional.distribution import GRID_SIZE, ScoreDistribution
from vqr1_metric.functional.thurstone import win_probability
from vqr1_metric.protocol import ParsedReply

#: Below this a result is not reliable: more than half of what the model would say is not a score.
LOW_RELIABILITY = 0.5
#: Two pictures tie, their comparison is a coin toss, when the win probability is nearer to a half than this.
TIE_MARGIN = 0.05


@dataclass(frozen=True)
class ImageScore:
    """What is known of one picture.

    Args:
        name: its path, or its position.
        score: expected score in [1, 5]; NaN where there is none, and then ``error`` says why.
        std: standard deviation of the score distribution, in score units.
        coverage: probability mass inside the answer grammar, given the answer tag (``sample`` mode: share of readable
            replies).
        tag_probability: probability that the model opens its reply, or its answer, with the tag (``sample`` mode: share
            of replies that hold one).
        distribution: the whole distribution, on the CPU.
        replies: sampled replies (``think`` and ``sample`` modes), each with the score it contributed.
        error: why there is no score, or None.
    """

    name: str
    score: float
    std: float
    coverage: float
    tag_probability: float
    distribution: ScoreDistribution
    replies: tuple[ParsedReply, ...] = ()
    error: str | None = None

    @property
    def reliable(self) -> bool:
        """Is there a score, and was at least half of the model's mass on scores?"""
        return self.error is None and min(self.coverage, self.tag_probability) >= LOW_RELIABILITY

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Central interval of the score distribution; NaN where there is no score."""
        low, high = self.distribution.interval(level)
        return float(low), float(high)

    @classmethod
    def of(cls, name: str, distribution: ScoreDistribution, replies: Sequence[ParsedReply] = ()) -> ImageScore:
        """The result for one distribution; without a score if the model gives no mass to any (a row of NaN)."""
        d = distribution
        if math.isnan(float(d.mean)):
            return cls.failed(name, f"{name}: the model gives no probability to any score", replies)
        return cls(name, float(d.mean), float(d.std), float(d.coverage), float(d.tag_probability), d, tuple(replies))

    @classmethod
    def failed(cls, name: str, error: str, replies: Sequence[ParsedReply] = ()) -> ImageScore:
        """The result for a picture that has no score."""
        nothing = ScoreDistribution(torch.full((GRID_SIZE,), math.nan), torch.tensor(math.nan), torch.tensor(math.nan))
        return cls(name, math.nan, math.nan, math.nan, math.nan, nothing, tuple(replies), error)


@dataclass(frozen=True)
class Comparison:
    """Two pictures side by side; ``win_probability`` is that ``a`` looks better, a tie counting half."""

    a: ImageScore
    b: ImageScore
    win_probability: float

    @classmethod
    def of(cls, a: ImageScore, b: ImageScore) -> Comparison:
        """Compare two results by their distributions."""
        return cls(a, b, float(win_probability(a.distribution, b.distribution)))

    @property
    def winner(self) -> Literal["a", "b", "tie"] | None:
        """The better one, ``"tie"`` where the comparison is a coin toss, None where a picture has no score."""
        if math.isnan(self.win_probability):
            return None
        if abs(self.win_probability - 0.5) < TIE_MARGIN:
            return "tie"
        return "a" if self.win_probability > 0.5 else "b"


@dataclass(frozen=True)
class RankedImage:
    """A place in a ranking, best first.

    Args:
        rank: from 1; pictures that tie with the first of their group share its rank; None for a picture without a
            score.
        index: position in the input.
        result: its score.
        beats_next: win probability against the next picture of the ranking; None for the last and where there is no
            score.
        tied: does another picture share the rank?
    """

    rank: int | None
    index: int
    result: ImageScore
    beats_next: float | None
    tied: bool


def rank_results(results: Sequence[ImageScore]) -> list[RankedImage]:
    """Order results by score, best first; pictures without a score come last.

    A picture shares the rank of the first of the group above it if the comparison with that one is a coin toss.
    """
    order = sorted(range(len(results)), key=lambda i: (math.isnan(results[i].score), -results[i].score, i))
    ranks: list[int | None] = []
    leader = 0
    for place, index in enumerate(order):
        if math.isnan(results[index].score):
            ranks.append(None)
            continue
        if Comparison.of(results[order[leader]], results[index]).winner != "tie":
            leader = place
        ranks.append(leader + 1)
    ranked = []
    for place, index in enumerate(order):
        following = results[order[place + 1]] if place + 1 < len(order) else None
        chance = math.nan if following is None else Comparison.of(results[index], following).win_probability
        shared = ranks[place] is not None and ranks.count(ranks[place]) > 1
        ranked.append(RankedImage(ranks[place], index, results[index], None if math.isnan(chance) else chance, shared))
    return ranked
