"""What reward clients of generator training send, where it can be read without pickle.

UniRL (Tencent-Hunyuan/UniRL, ``unirl/reward/remote.py``, protocol version "1") posts JSON to ``/score``: a sample has
a history whose last entry is the image to judge, the names of the rewards it wants, and fields that identify the sample
and are sent back as they came. ``/health`` has to list the rewards.

verl-omni's ``http_scorer_client.py`` and Flow-GRPO's reward servers exchange pickles, which run code when read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel, Field

from vqr1_metric.results import ImageScore
from vqr1_metric.serve.intake import Picture, check_count, picture_of
from vqr1_metric.serve.limits import Limits

#: What clients call this reward (``required_rewards``); its one value is the score from 1 to 5.
REWARD = "visual_quality_r1"
_VERSION = "1"
_IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")


class RewardTurn(BaseModel):
    """One step of a sample's history."""

    text: str | None = None
    image_b64: str | None = None
    video_b64: str | None = None


class RewardRequest(BaseModel):
    """One sample; the last entry of its history is judged, an image it was made from is not looked at."""

    history: list[RewardTurn] = Field(min_length=1)
    required_rewards: list[str]
    metadata: Any = None
    request_id: str | None = None
    sample_id: Any = None
    group_id: Any = None
    source_rank: Any = None
    policy_version: Any = None
    scorer_version: str | None = None
    idempotency_key: str | None = None


class RewardBatch(BaseModel):
    """What ``POST /score`` takes."""

    protocol_version: str = _VERSION
    requests: list[RewardRequest]

    def pictures(self, limits: Limits) -> tuple[dict[int, Picture], dict[int, str]]:
        """The images to score, and what is wrong with the other samples, by their places.

        Raises:
            HTTPException: 400 for another protocol version, 413 for too many samples.
        """
        if self.protocol_version != _VERSION:
            raise HTTPException(400, f"Expected protocol_version {_VERSION!r}, but got {self.protocol_version!r}.")
        check_count(len(self.requests), limits)
        found, problems = {}, {}
        for place, sample in enumerate(self.requests):
            judged = sample.history[-1]
            if REWARD not in sample.required_rewards:
                continue
            if judged.image_b64 is None:
                problems[place] = (
                    "expected image_b64 in the last entry of history; videos are not scored, their frames are"
                )
                continue
            try:
                found[place] = picture_of(f"sample {place}", judged.image_b64)
            except HTTPException as error:
                problems[place] = str(error.detail)
        return found, problems


class RewardAnswer(BaseModel):
    """What ``POST /score`` gives: for each sample its rewards, or why there is none."""

    protocol_version: str = _VERSION
    results: list[dict[str, dict[str, float]]]
    errors: list[dict[str, str]]
    identities: list[dict[str, Any]]


def answer_for(
    batch: RewardBatch, scores: Mapping[int, ImageScore], problems: Mapping[int, str], version: str
) -> RewardAnswer:
    """The answer; a sample without a score has no reward, and never one that was made up."""
    results: list[dict[str, dict[str, float]]] = []
    errors: list[dict[str, str]] = []
    for place, sample in enumerate(batch.requests):
        wrong = {name: "this service does not have this reward" for name in sample.required_rewards if name != REWARD}
        score = scores.get(place)
        if place in problems:
            wrong[REWARD] = problems[place]
        elif score is not None and score.error is not None:
            wrong[REWARD] = score.error.removeprefix(f"{score.name}: ")
        good = score is not None and not math.isnan(score.score)
        results.append({REWARD: {"score": score.score}} if good and score is not None else {})
        errors.append(wrong)
    identities = [
        {**{name: getattr(sample, name) for name in _IDENTITY}, "scorer_version": version} for sample in batch.requests
    ]
    return RewardAnswer(results=results, errors=errors, identities=identities)
