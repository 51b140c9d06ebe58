"""The shape of the answers, for clients and for the OpenAPI description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from vqr1_metric.functional.thurstone import win_probability
from vqr1_metric.results import ImageScore, rank_results


class Explanation(BaseModel):
    """What went wrong, and what was expected."""

    code: int
    message: str


class Problem(BaseModel):
    """The one shape of errors."""

    error: Explanation


class Reply(BaseModel):
    """One sampled reply of the model."""

    score: float | None
    reason: str | None = Field(description="Why it has no score.")
    reasoning: str


class PictureScore(BaseModel):
    """What is known of one picture; every number is null where ``error`` says why."""

    name: str
    score: float | None = Field(description="Mean of the score distribution, 1 (very poor) to 5 (excellent).")
    std: float | None = Field(description="Its standard deviation, in score units.")
    interval: tuple[float, float] | None = Field(description="Central interval of the distribution, at `level`.")
    coverage: float | None = Field(description="Probability that the answer is a score of the grammar.")
    tag_probability: float | None = Field(description="Probability that the reply opens with the answer tag.")
    reliable: bool = Field(description="Both of these are at least one half.")
    error: str | None
    probabilities: list[float] | None = Field(
        None, description="Of the 401 scores 1.00, 1.01, ... 5.00; with `distribution=true`."
    )
    replies: list[Reply] | None = Field(None, description="Sampled replies, where the model writes them.")


class Model(BaseModel):
    """What the scores were made with."""

    name: str
    revision: str
    mode: str
    prompt: str
    fingerprint: str = Field(description="Changes with anything that decides a score: weights, precision, limits, ...")


class Scores(BaseModel):
    """The answer of /v1/score and /v1/explain."""

    model: Model
    results: list[PictureScore]


class Place(BaseModel):
    """A place in a ranking, best first."""

    rank: int | None = Field(description="From 1, shared by pictures that tie; null without a score.")
    index: int = Field(description="Position in the request and in `results`.")
    name: str
    tied: bool
    beats_next: float | None = Field(description="Probability to look better than the next one.")


class Ranking(Scores):
    """The answer of /v1/rank."""

    ranking: list[Place]
    win_probability: list[list[float | None]] = Field(
        description="Row i, column j: probability that picture i looks better than picture j."
    )


class Info(BaseModel):
    """The answer of /v1/info."""

    model: Model
    version: str
    key_required: bool
    limits: dict[str, float]


def picture_score(result: ImageScore, level: float, distribution: bool) -> PictureScore:
    """A result as JSON."""
    known = result.error is None
    low, high = result.interval(level)
    return PictureScore(
        name=result.name,
        score=_number(result.score),
        std=_number(result.std),
        interval=(round(low, 2), round(high, 2)) if known else None,
        coverage=_number(result.coverage),
        tag_probability=_number(result.tag_probability),
        reliable=result.reliable,
        error=None if result.error is None else result.error.removeprefix(f"{result.name}: "),
        probabilities=[float(f"{p:.6g}") for p in result.distribution.probabilities.tolist()]
        if known and distribution
        else None,
        replies=[
            Reply(score=_number(reply.score), reason=reply.reason, reasoning=reply.reasoning)
            for reply in result.replies
        ]
        or None,
    )


def ranking(results: Sequence[ImageScore]) -> dict[str, list[Any]]:
    """The fields that :class:`Ranking` adds."""
    places = [
        Place(rank=place.rank, index=place.index, name=place.result.name, tied=place.tied, beats_next=place.beats_next)
        for place in rank_results(results)
    ]
    wins = [[_number(float(win_probability(a.distribution, b.distribution))) for b in results] for a in results]
    return {"ranking": places, "win_probability": wins}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
