"""What scoring, comparing and ranking give back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vqr1_metric.functional.calibration import Calibration
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
        calibration: what widens the intervals; None where they are those of the model's own distribution.
    """

    name: str
    score: float
    std: float
    coverage: float
    tag_probability: float
    distribution: ScoreDistribution
    replies: tuple[ParsedReply, ...] = ()
    error: str | None = None
    calibration: Calibration | None = None

    @property
    def reliable(self) -> bool:
        """Is there a score, and was at least half of the model's mass on scores?"""
        return self.error is None and min(self.coverage, self.tag_probability) >= LOW_RELIABILITY

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Central interval that holds at least ``level`` of the probability; NaN where there is no score.

        With a calibration it holds the mean opinion of as many rated images as it says; without, it says what the model
        says, which is as a rule too sure.
        """
        known, calibration = self.distribution, self.calibration
        low, high = known.interval(level) if calibration is None else calibration.interval(known, level)
        return float(low), float(high)

    def to_dict(self, *, probabilities: bool = False) -> dict[str, object]:
        """Plain values for a table or for JSON; None where there is no number.

        Args:
            probabilities: with the whole distribution, and the values it belongs to where they are not 1.00 .. 5.00.
        """
        numbers = {
            "score": self.score, "std": self.std, "coverage": self.coverage, "tag_probability": self.tag_probability,
        }  # fmt: skip
        row: dict[str, object] = {"name": self.name}
        row |= {name: None if math.isnan(value) else value for name, value in numbers.items()}
        row["reliable"], row["error"] = self.reliable, self.error
        row["replies"] = [
            {"score": None if math.isnan(r.score) else r.score, "reason": r.reason, "reasoning": r.reasoning}
            for r in self.replies
        ]
        if probabilities:
            row["probabilities"] = None if self.error is not None else self.distribution.probabilities.tolist()
            if self.distribution.values is not None:
                row["values"] = list(self.distribution.values)
        return row

    @classmethod
    def of(cls, name: str, distribution: ScoreDistribution, replies: Sequence[ParsedReply] = ()) -> ImageScore:
        """The result for one distribution; without a score if the model gives no mass to any (a row of NaN)."""
        d = distribution.clone()  # its own numbers, not a view of a batch, all of which a pickle would hold
        if math.isnan(float(d.mean)):
            return cls.failed(name, f"{name}: the model gives no probability to any score", replies)
        return cls(name, float(d.mean), float(d.std), float(d.coverage), float(d.tag_probability), d, tuple(replies))

    @classmethod
    def failed(cls, name: str, error: str, replies: Sequence[ParsedReply] = ()) -> ImageScore:
        """The result for a picture that has no score."""
        nothing = ScoreDistribution(torch.full((GRID_SIZE,), math.nan), torch.tensor(math.nan), torch.tensor(math.nan))
        return cls(name, math.nan, math.nan, math.nan, math.nan, nothing, tuple(replies), error)


def pack_results(results: Sequence[ImageScore]) -> bytes:
    """Results as bytes that hold no code, one record after the other: a line of JSON, then the probabilities."""
    packed = []
    for result in results:
        d = result.distribution
        probabilities = d.probabilities.detach().cpu().numpy()
        head = {
            "name": result.name,
            "numbers": [result.score, result.std, result.coverage, result.tag_probability],
            "error": result.error,
            "replies": [[reply.score, reply.reason, reply.reasoning] for reply in result.replies],
            "dtype": probabilities.dtype.str,
            "count": probabilities.size,
            "values": d.values,
            "answers": d.answers,
        }
        packed.append(json.dumps(head).encode() + b"\n" + probabilities.tobytes())
    return b"".join(packed)


def unpack_results(packed: bytes) -> list[ImageScore]:
    """What :func:`pack_results` was given."""
    results, start = [], 0
    while start < len(packed):
        end = packed.index(b"\n", start)
        head = json.loads(packed[start:end])
        dtype, count = np.dtype(head["dtype"]), head["count"]
        numbers = np.frombuffer(packed, dtype, count, end + 1)
        start = end + 1 + numbers.nbytes
        score, std, coverage, tag_probability = head["numbers"]
        probabilities = torch.from_numpy(numbers.copy())
        distribution = ScoreDistribution(
            probabilities,
            probabilities.new_tensor(coverage),
            probabilities.new_tensor(tag_probability),
            None if head["values"] is None else tuple(head["values"]),
            None if head["answers"] is None else tuple(head["answers"]),
        )
        replies = tuple(ParsedReply(*reply) for reply in head["replies"])
        results.append(
            ImageScore(head["name"], score, std, coverage, tag_probability, distribution, replies, head["error"])
        )
    return results


@dataclass(frozen=True)
class Comparison:
    """Two pictures side by side, in the order of their expected scores, as everywhere (rank, BestOfN, the metric).

    ``win_probability`` is the probability that a score drawn for ``a`` is above one drawn for ``b``, an equal one
    counting half. It says how sure the order is. Where it is near a half, or above a half for the picture with the
    lower expected score (a skewed distribution can do that), the two tie.
    """

    a: ImageScore
    b: ImageScore
    win_probability: float

    @classmethod
    def of(cls, a: ImageScore, b: ImageScore) -> Comparison:
        """Compare two results by their distributions."""
        return cls(a, b, float(win_probability(a.distribution, b.distribution)))

    @property
    def winner(self) -> Literal["a", "b", "tie"] | None:
        """The one with the higher expected score, ``"tie"`` as above, None where a picture has no score."""
        if math.isnan(self.win_probability):
            return None
        if _ties(self.win_probability, self.a.score - self.b.score):
            return "tie"
        return "a" if self.a.score > self.b.score else "b"


@dataclass(frozen=True)
class RankedImage:
    """A place in a ranking, best first.

    Args:
        rank: from 1; pictures that all tie with each other share one; None for a picture without a score.
        index: position in the input.
        result: its score.
        beats_next: win probability against the next picture of the ranking (below a half only where they tie); None
            for the last and where there is no score.
        tied: does another picture share the rank?
    """

    rank: int | None
    index: int
    result: ImageScore
    beats_next: float | None
    tied: bool


def rank_results(results: Sequence[ImageScore]) -> list[RankedImage]:
    """Order results by expected score, best first; pictures without a score come last.

    Agrees with :class:`Comparison`: pictures that share a rank tie, each with each, and one of a better rank never
    loses a comparison with one of a worse rank.
    """
    order = sorted(range(len(results)), key=lambda i: (math.isnan(results[i].score), -results[i].score, i))
    ranks: list[int | None] = []
    group: list[int] = []
    for place, index in enumerate(order):
        if math.isnan(results[index].score):
            ranks.append(None)
            continue
        if not group or not _ties_with_all([results[i] for i in group], results[index]):
            group, rank = [], place + 1
        group.append(index)
        ranks.append(rank)
    ranked = []
    shared = Counter(rank for rank in ranks if rank is not None)
    for place, index in enumerate(order):
        following = results[order[place + 1]] if place + 1 < len(order) else None
        chance = math.nan if following is None else Comparison.of(results[index], following).win_probability
        own = ranks[place]
        tied = own is not None and shared[own] > 1
        ranked.append(RankedImage(own, index, results[index], None if math.isnan(chance) else chance, tied))
    return ranked


def _ties(win_probability: float, lead: float) -> bool:
    """Is a comparison undecided, given the lead of one over the other in expected score?"""
    return abs(win_probability - 0.5) < TIE_MARGIN or (win_probability - 0.5) * lead <= 0


def _ties_with_all(group: Sequence[ImageScore], newcomer: ImageScore) -> bool:
    chances = win_probability(ScoreDistribution.stack([r.distribution for r in group]), newcomer.distribution).tolist()
    return all(_ties(chance, member.score - newcomer.score) for chance, member in zip(chances, group, strict=True))
