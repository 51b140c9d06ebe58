"""What a best-of-n run gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.integrations.diffusers.scoring import as_pil
from vqr1_metric.results import Comparison, ImageScore, RankedImage, rank_results


@dataclass
class Candidate:
    """One candidate of a run, kept or not.

    Args:
        seed: ``torch.Generator().manual_seed(seed)`` passed to the pipe makes it again alone; None if it was made from
            searched noise, and then ``noise`` holds that.
        preview: decoded prediction of its clean picture, and ``preview_result`` its score; None without a preview.
        survived: was it denoised to the end?
        picture: the final picture (for a video: list of frames), None for those that did not survive.
        result: score of the final picture; NaN with a reason where there is none.
        noise: latents to pass to the pipe, shape ``(1, ...)``, or None.
    """

    seed: int | None
    survived: bool = True
    preview: Any = None
    preview_result: ImageScore | None = None
    picture: Any = None
    result: ImageScore | None = None
    noise: Any = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """Score of the final picture in [1, 5], NaN where there is none."""
        return math.nan if self.result is None else self.result.score

    @property
    def preview_score(self) -> float:
        """Score of the preview in [1, 5], NaN where there is none."""
        return math.nan if self.preview_result is None else self.preview_result.score


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
        strategy: ``"plain"``, ``"restart"`` or ``"inplace"``.
        denoiser_rows: rows that the denoisers computed; with classifier-free guidance a picture costs two for each
            step.
        scoring_seconds, total_seconds: wall-clock times.
    """

    images: list
    scores: list[float]
    distributions: list[ScoreDistribution]
    seeds: list[int | None]
    ranking: list[RankedImage]
    records: list[Candidate]
    strategy: str
    denoiser_rows: int
    scoring_seconds: float
    total_seconds: float

    @property
    def comparison(self) -> Comparison | None:
        """First against second of the finished pictures, with the win probability; None where only one was finished."""
        if len(self.ranking) < 2:
            return None
        return Comparison.of(self.ranking[0].result, self.ranking[1].result)

    @property
    def win_probability(self) -> float:
        """Probability that the first looks better than the second; NaN where there is no second or no score."""
        return math.nan if self.comparison is None else self.comparison.win_probability

    @property
    def tied(self) -> bool:
        """Is the choice between first and second a coin toss?"""
        return self.comparison is not None and self.comparison.winner == "tie"

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
            seed = "" if self.seeds[place] is None else f"  seed {self.seeds[place]}"
            draw.text((left + 2, top + 1), f"{self.scores[place]:.2f}{seed}", fill="black")
        return grid


def finish(candidates: list[Candidate], keep: int, **figures: Any) -> BestOfNOutput:
    """Rank the finished candidates and keep the best."""
    finished = [index for index, candidate in enumerate(candidates) if candidate.result is not None]
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
