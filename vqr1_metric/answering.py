"""One batch of images, one question, a result for each image: how the three modes get it from a backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from vqr1_metric._warnings import warn_caller
from vqr1_metric.backends.base import Asked, Sampling, ScoringBackend
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution, is_on_score_grid
from vqr1_metric.images import ImageError
from vqr1_metric.protocol import (
    MODES,
    THOUGHT_END,
    VISUALQUALITY_R1,
    Mode,
    ParsedReply,
    Question,
    has_tag,
    parse_reply,
    reply_before_answer,
)
from vqr1_metric.results import LOW_RELIABILITY, ImageScore


def read(
    backend: ScoringBackend,
    images: Sequence[Asked],
    config: PixelConfig,
    questions: Sequence[Question],
    replies: Sequence[str] | None = None,
) -> ScoreDistribution:
    """Distributions of the answers to each image's question, leading shape ``(B,)``; scores where they can be."""
    distribution = backend.distributions(images, config, replies=replies, **_of_questions(questions))
    return on_grid(distribution)


def ask(
    backend: ScoringBackend,
    images: Sequence[Tensor],
    questions: Sequence[Question | Sequence[Question]],
    config: PixelConfig,
) -> list[ScoreDistribution]:
    """The answers to several questions about each image; one after the other where the backend shares nothing."""
    shared = getattr(backend, "ask", None)
    if shared is not None:
        return list(shared(images, questions, config))
    rows = [[row] * len(images) if isinstance(row, Question) else list(row) for row in questions]
    return [backend.distributions(images, config, **_of_questions(row)) for row in rows]


def _of_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """The keyword argument that names the questions; none for the default, as a backend may know of no other."""
    if all(question is VISUALQUALITY_R1 for question in questions):
        return {}
    return {"question": questions[0] if len(set(questions)) == 1 else list(questions)}


def on_grid(distribution: ScoreDistribution) -> ScoreDistribution:
    """Over the scores 1.00 to 5.00 where all answers have such values: then it is a score like any other."""
    values = distribution.values
    return distribution if values is None or not is_on_score_grid(values) else distribution.on_score_grid()


def score_batch(
    backend: ScoringBackend,
    names: Sequence[str],
    images: Sequence[Tensor],
    config: PixelConfig,
    questions: Sequence[Question],
    mode: Mode,
    sampling: Sampling,
    *,
    thinking: bool,
    add_vision_id: bool,
) -> list[ImageScore]:
    """The result of every image of a batch."""
    with torch.no_grad():
        if mode == "score":
            distributions = read(backend, images, config, questions).to("cpu")
            return [ImageScore.of(name, distributions[i]) for i, name in enumerate(names)]
        thinking = thinking or mode == "think"
        asked = _of_questions(questions[:1])
        replies = backend.sample_replies(
            images, config, sampling, thinking=thinking, add_vision_id=add_vision_id, **asked
        )
        if mode == "sample":
            return [_read_samples(name, texts) for name, texts in zip(names, replies, strict=True)]
        return [
            _read_thoughts(backend, name, image, config, question, texts)
            for name, image, question, texts in zip(names, images, questions, replies, strict=True)
        ]


def _read_thoughts(
    backend: ScoringBackend, name: str, image: Tensor, config: PixelConfig, question: Question, texts: Sequence[str]
) -> ImageScore:
    """The mixture of the distributions read out after each reasoning that came to an end."""
    ends = [reply_before_answer(text) for text in texts]
    finished = [end for end in ends if end is not None]
    replies = [ParsedReply(math.nan, "the reasoning did not come to an end", text.strip()) for text in texts]
    if not finished:
        reason = f"none of {len(texts)} sampled reasonings came to an end ({THOUGHT_END})"
        return ImageScore.failed(name, reason, replies)
    distributions = read(backend, [image] * len(finished), config, [question] * len(finished), finished).to("cpu")
    means = iter(distributions.mean.tolist())
    for i, end in enumerate(ends):
        if end is not None:
            replies[i] = ParsedReply(next(means), None, parse_reply(texts[i]).reasoning)
    return ImageScore.of(name, distributions.mixture(), replies)


def _read_samples(name: str, texts: Sequence[str]) -> ImageScore:
    """The empirical distribution of the scores that the sampled replies state."""
    replies = [parse_reply(text) for text in texts]
    scores = torch.tensor([reply.score for reply in replies], dtype=torch.float64)
    if not bool(torch.isfinite(scores).any()):
        return ImageScore.failed(
            name, f"none of {len(texts)} sampled replies held a score ({replies[0].reason})", replies
        )
    distribution = ScoreDistribution.from_samples(scores)
    tagged = torch.tensor(sum(map(has_tag, texts)) / len(texts), dtype=scores.dtype)
    return ImageScore.of(name, ScoreDistribution(distribution.probabilities, distribution.coverage, tagged), replies)


def warn_if_unreliable(results: Sequence[ImageScore]) -> bool:
    """Warn if any of these is not reliable, and say whether."""
    low = [result for result in results if result.error is None and not result.reliable]
    if low:
        warn_caller(
            f"{low[0].name}: only {low[0].coverage:.0%} of the model's answers would be a score and "
            f"{low[0].tag_probability:.0%} of its replies would open with the answer tag (below "
            f"{LOW_RELIABILITY:.0%}): was this model trained for the question? Every result carries both "
            "as coverage and tag_probability."
        )
    return bool(low)


def joined(parts: Sequence[tuple[list[int], ScoreDistribution | ImageError]]) -> ScoreDistribution:
    """One distribution in the order of the images out of those of their batches."""
    of_batches: list[ScoreDistribution] = []
    for batch, part in parts:
        if isinstance(part, ImageError):
            raise ImageError(f"image {batch[0]}: {part}")
        of_batches.append(part)
    order = torch.tensor([i for batch, _ in parts for i in batch]).argsort()
    names = ("probabilities", "coverage", "tag_probability")
    tensors = (torch.cat([getattr(part, name) for part in of_batches]) for name in names)
    probabilities, coverage, tag = (tensor[order.to(tensor.device)] for tensor in tensors)
    return ScoreDistribution(probabilities, coverage, tag, of_batches[0].values, of_batches[0].answers)


def check_mode(mode: str, question: Question) -> None:
    if mode not in MODES:
        raise ValueError(f"Expected mode to be one of {', '.join(MODES)}, but got {mode!r}.")
    if question.images != 1:
        raise ValueError(f"{question.name!r} asks about {question.images} images: call scorer.prefer(a, b) instead.")
    if mode != "score" and not (question.reads_scores and question.thinking_text):
        raise ValueError(
            f"Expected mode='score' with the question {question.name!r}, whose answers are read in one pass, but got "
            f"{mode!r}."
        )


def prompts_of(question: Question, prompts: str | Sequence[str] | None, count: int) -> list[str] | None:
    """A prompt for each image where the question asks for one, else None."""
    if not question.needs_prompt:
        return None
    if prompts is None:
        raise ValueError(f"Expected prompts=[...], since {question.name!r} asks about what the images were made from.")
    prompts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(prompts) != count:
        raise ValueError(f"Expected a prompt for each of {count} images, but got {len(prompts)}.")
    return prompts


def questions_of(question: Question, prompts: str | Iterable[str] | None) -> Iterator[Question]:
    """The question for one image after the other."""
    if not question.needs_prompt:
        yield from repeat(question)
    if prompts is None:
        raise ValueError(f"Expected prompts=[...], since {question.name!r} asks about what the images were made from.")
    for prompt in repeat(prompts) if isinstance(prompts, str) else prompts:
        yield question.about(prompt)
    raise ValueError("Expected a prompt for each image, but got more images than prompts.")
