"""What a best-of-n run gives back."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.functional.thurstone import comparison_probability
from vqr1_metric.integrations.diffusers.scoring import as_pil
from vqr1_metric.results import TIE_MARGIN, ImageScore, RankedImage, rank_results


@dataclass
class Candidate:
    """One candidate of a run, kept or not.

    Args:
        seed: ``torch.Generator().manual_seed(seed)`` passed to the pipe makes it again alone; after the first round of
            a search together with its ``noise``.
        preview: decoded prediction of its clean picture, and ``preview_result`` its score; None without a preview.
        survived: was it denoised to the end?
        picture: the final picture (for a video: list of frames), None for those that did not survive.
        result: score of the final picture; NaN with a reason where there is none.
        extras, preview_extras: what other scorers said of the picture and the preview, by name.
        bonus, preview_bonus: their weighted sums.
        noise: of a search: latents to pass to the pipe, shape ``(1, ...)``; in its first round what the seed drew.
    """

    seed: int
    survived: bool = True
    preview: Any = None
    preview_result: ImageScore | None = None
    picture: Any = None
    result: ImageScore | None = None
    extras: dict[str, float] = field(default_factory=dict)
    preview_extras: dict[str, float] = field(default_factory=dict)
    bonus: float = 0.0
    preview_bonus: float = 0.0
    noise: Tensor | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """Score of the final picture in [1, 5], NaN where there is none."""
        return math.nan if self.result is None else self.result.score

    @property
    def preview_score(self) -> float:
        """Score of the preview in [1, 5], NaN where there is none."""
        return math.nan if self.preview_result is None else self.preview_result.score

    @property
    def value(self) -> float:
        """What the picture is chosen by: its score and what other scorers add."""
        return self.score + self.bonus

    @property
    def preview_value(self) -> float:
        """What survivors are chosen by."""
        return self.preview_score + self.preview_bonus


@dataclass
class BestOfNOutput:
    """The kept pictures of one prompt, best first.

    Args:
        images: the ``keep`` best pictures; for a video pipeline, lists of frames.
        scores: their scores in [1, 5], NaN where a picture has none.
        distributions: their score distributions.
        seeds: their seeds.
        ranking: all pictures that were finished, best first, with ties; ``index`` counts in ``records``.
        records: every candidate, in the order of its seed.
        strategy: ``"plain"``, ``"restart"``, ``"inplace"`` or ``"search"``.
        denoiser_rows: rows that the denoisers computed; with classifier-free guidance a picture costs two for each
            step.
        scoring_seconds, total_seconds: wall-clock times.
    """

    images: list
    scores: list[float]
    distributions: list[ScoreDistribution]
    seeds: list[int]
    ranking: list[RankedImage]
    records: list[Candidate]
    strategy: str
    denoiser_rows: int
    scoring_seconds: float
    total_seconds: float

    @property
    def win_probability(self) -> float:
        """Probability that the first is better than the second; NaN where there is no second or no score."""
        beats = self.ranking[0].beats_next
        return math.nan if beats is None else beats

    @property
    def tied(self) -> bool:
        """Is the choice between first and second a coin toss?"""
        return abs(self.win_probability - 0.5) < TIE_MARGIN

    def grid(self, columns: int | None = None) -> Image.Image:
        """The kept pictures side by side, best first, each with its score and seed; of a video, its first frame."""
        pictures = [as_pil(image[0] if isinstance(image, list) else image) for image in self.images]
        columns = columns or math.ceil(math.sqrt(len(pictures)))
        width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True))
        label = 14
        grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * (height + label)), "white")
        draw = ImageDraw.Draw(grid)
        for place, picture in enumerate(pictures):
            left, top = place % columns * width, place // columns * (height + label)
            grid.paste(picture, (left, top + label))
            draw.text((left + 2, top + 1), f"{self.scores[place]:.2f}  seed {self.seeds[place]}", fill="black")
        return grid


def _rank_by_value(candidates: list[Candidate]) -> list[RankedImage]:
    """As ``rank_results``, with every score distribution moved by what other scorers add (normal approximation)."""
    values = [candidate.value for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda i: (math.isnan(values[i]), -values[i], i))

    def beats(a: int, b: int) -> float:
        numbers = (values[a], candidates[a].result.std ** 2, values[b], candidates[b].result.std ** 2)
        return float(comparison_probability(*map(torch.tensor, numbers)))

    ranks: list[int | None] = []
    leader = 0
    for place, index in enumerate(order):
        if not abs(beats(order[leader], index) - 0.5) < TIE_MARGIN:
            leader = place
        ranks.append(None if math.isnan(values[index]) else leader + 1)
    chances = [beats(a, b) for a, b in itertools.pairwise(order)] + [math.nan]
    return [
        RankedImage(
            rank, i, candidates[i].result, None if math.isnan(p) else p, rank is not None and ranks.count(rank) > 1
        )
        for rank, i, p in zip(ranks, order, chances, strict=True)
    ]


def finish(candidates: list[Candidate], keep: int, **figures: Any) -> BestOfNOutput:
    """Rank the finished candidates and keep the best."""
    finished = [index for index, candidate in enumerate(candidates) if candidate.result is not None]
    if any(candidates[index].extras for index in finished):
        ranked = _rank_by_value([candidates[index] for index in finished])
    else:
        ranked = rank_results([candidates[index].result for index in finished])
    ranking = [RankedImage(r.rank, finished[r.index], r.result, r.beats_next, r.tied) for r in ranked]
    kept = [candidates[place.index] for place in ranking[:keep]]
    return BestOfNOutput(
        images=[c.picture for c in kept],
        scores=[c.score for c in kept],
        distributions=[c.result.distribution for c in kept],
        seeds=[c.seed for c in kept],
        ranking=ranking,
        records=candidates,
        **figures,
    )
