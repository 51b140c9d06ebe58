"""How well does the model in training order held-out pictures, per data set? Measured as a scorer would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.backends.base import ScoringBackend
from vqr1_metric.functional.agreement import pairs_agreement, plcc, srcc
from vqr1_metric.protocol import QUESTION, VISUALQUALITY_R1, question
from vqr1_metric.ratings import RatingSet
from vqr1_metric.scorer import QualityScorer
from vqr1_metric.train_ranker.data import MIN_VALIDATION


def score_shard(
    backend: ScoringBackend, sets: Sequence[RatingSet], scorer_options: dict[str, Any], rank: int, world: int
) -> list[tuple[int, int, float]]:
    """``[(set, picture, score), ...]`` of this process's share, each asked its own question; NaN if unreadable."""
    mine = [(s, p) for s, of in enumerate(sets) for p in range(len(of))][rank::world]
    by_question: dict[str, list[tuple[int, int]]] = {}
    for s, p in mine:
        by_question.setdefault(sets[s].images[p].question or QUESTION, []).append((s, p))
    found = []
    for asked, places in by_question.items():
        own = replace(VISUALQUALITY_R1, text=question(False, asked), thinking_text=question(True, asked))
        scorer = QualityScorer(backend=backend, question=own, **scorer_options)
        scores = scorer.stream(sets[s].images[p].read() for s, p in places)
        found += [(s, p, result.score) for (s, p), result in zip(places, scores, strict=True)]
    return found


def validation_metrics(sets: Sequence[RatingSet], results: Sequence[tuple[int, int, float]]) -> dict[str, float]:
    """``srcc_NAME`` and ``plcc_NAME`` (``pairs_NAME`` for preferences), their means, spread and readable share.

    A correlation is NaN where it is undefined: too few scores, or one score for all. ``pairs`` is the share of decided
    pairs that the scores order rightly, a tie counting half.
    """
    metrics: dict[str, float] = {}
    scores = [torch.full((len(s),), torch.nan, dtype=torch.float64) for s in sets]
    for number, p, score in results:
        scores[number][p] = score
    for s, predicted in zip(sets, scores, strict=True):
        if s.preferences:
            metrics[f"pairs_{s.name}"] = _pairwise(s, predicted)
        elif len(s):
            quality = torch.tensor(s.quality, dtype=torch.float64)
            metrics[f"srcc_{s.name}"], metrics[f"plcc_{s.name}"] = correlations(predicted, quality)
    for kind in ("srcc", "plcc", "pairs"):
        values = [value for name, value in metrics.items() if name.startswith(f"{kind}_")]
        if values:
            metrics[kind] = sum(values) / len(values)
    every = torch.cat(scores)
    known = every[torch.isfinite(every)]
    metrics["spread"] = float(known.std()) if len(known) > 1 else math.nan
    metrics["readable"] = len(known) / max(1, len(every))
    return metrics


def correlations(predicted: Tensor, quality: Tensor) -> tuple[float, float]:
    """Spearman and Pearson correlation of scores ``(N,)``, NaN ones left out; NaN where undefined."""
    known = torch.isfinite(predicted)
    x, y = predicted[known], quality[known]
    if len(x) < MIN_VALIDATION:
        return math.nan, math.nan
    return srcc(x, y), plcc(x, y)


def _pairwise(s: RatingSet, predicted: Tensor) -> float:
    score = {image.name: float(value) for image, value in zip(s.images, predicted, strict=True)}
    gaps = torch.tensor([score[pair.a] - score[pair.b] for pair in s.preferences])
    return pairs_agreement(gaps, torch.tensor([pair.share - 0.5 for pair in s.preferences]))
