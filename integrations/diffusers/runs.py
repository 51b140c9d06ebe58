"""The calls of a pipe that make the candidates of one prompt."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.results import Candidate
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError
from vqr1_metric.integrations.diffusers.steering import Snapshot, Steering
from vqr1_metric.results import ImageScore

if TYPE_CHECKING:
    from vqr1_metric.integrations.diffusers.best_of_n import BestOfN


class Run:
    """Makes and scores candidates, in chunks, and keeps the books.

    Args:
        best: whose pipe, scorers and batch size these are.
        arguments: of the pipe, prompt included.
        budget: denoiser rows that may be computed, or None.
        keep_noise: keep each candidate's first noise.
    """

    def __init__(
        self, best: BestOfN, arguments: dict[str, Any], budget: int | None = None, keep_noise: bool = False
    ) -> None:
        self.best, self.arguments, self.batch_size = best, arguments, best.batch_size
        self.budget, self.keep_noise = budget, keep_noise
        self.rows, self.made, self.scoring_seconds, self.started = 0, 0, 0.0, time.perf_counter()
        self.snapshots: list[Snapshot] | None = None

    def previews(self, candidates: list[Candidate], preview_at: float, save: bool) -> None:
        """Score the predicted clean picture of every candidate; with ``save``, finals carry on from there."""
        snapshots: list[Snapshot] = []
        for chunk in self._chunks(candidates):
            pictures, blanked, steering = self._call(chunk, preview_at=preview_at)
            if steering.snapshot is None:
                raise UnsupportedError(
                    f"{self.best.interface.name} never called its scheduler, so there is no preview."
                )
            if save:  # what the denoisers said is as large as all their activations: one chunk's is enough
                snapshots.append(replace(steering.snapshot, answers={}) if snapshots else steering.snapshot)
            scores = zip(*self._score(pictures, blanked), strict=True)
            for candidate, picture, (result, extras, bonus) in zip(chunk, pictures, scores, strict=True):
                candidate.preview, candidate.preview_result = picture, result
                candidate.preview_extras, candidate.preview_bonus = extras, bonus
        self.snapshots = snapshots or None

    def finals(self, candidates: list[Candidate]) -> None:
        """Denoise the survivors to the end and score them."""
        survivors = [index for index, candidate in enumerate(candidates) if candidate.survived]
        for places in self._chunks(survivors):
            chunk = [candidates[place] for place in places]
            rows = [divmod(place, self.batch_size) for place in places]
            resume = Snapshot.gather(self.snapshots, rows) if self.snapshots else None
            pictures, blanked, steering = self._call(chunk, resume=resume)
            self.made += len(chunk)
            scores = zip(*self._score(pictures, blanked), strict=True)
            for row, (candidate, picture, (result, extras, bonus)) in enumerate(
                zip(chunk, pictures, scores, strict=True)
            ):
                candidate.picture, candidate.result = picture, result
                candidate.extras, candidate.bonus = extras, bonus
                if self.keep_noise and candidate.noise is None:
                    candidate.noise = steering.noise[row : row + 1].cpu()
            if self.budget is not None and not self.fits(len(survivors) - self.made):
                raise ValueError(
                    f"Expected a budget for the first {len(survivors)} candidates, "
                    f"{self._cost(len(survivors))} denoiser rows, but got {self.budget}."
                )

    def fits(self, candidates: int) -> bool:
        """Is the budget enough for so many more, judged by the cost of those that were made?"""
        return self.rows + self._cost(max(0, candidates)) <= self.budget

    def _cost(self, candidates: int) -> int:
        return math.ceil(self.rows / self.made * candidates)

    def _chunks(self, items: list) -> list[list]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def _call(self, chunk: list[Candidate], **steer: Any) -> tuple[list, list[bool], Steering]:
        generators = [torch.Generator().manual_seed(candidate.seed) for candidate in chunk]
        arguments = self.arguments
        if chunk[0].noise is not None:
            arguments = dict(arguments, latents=torch.cat([candidate.noise for candidate in chunk]))
        with Steering(self.best.pipe, generators, **steer) as steering:
            pictures, blanked = self.best.interface.call(self.best.pipe, arguments, len(chunk), generators)
        self.rows += steering.rows
        if len(pictures) != len(chunk):
            raise UnsupportedError(
                f"Expected {len(chunk)} pictures from {self.best.interface.name}, but got {len(pictures)}."
            )
        return pictures, blanked, steering

    def _score(
        self, pictures: list, blanked: list[bool]
    ) -> tuple[list[ImageScore], list[dict[str, float]], list[float]]:
        started = time.perf_counter()
        results = self.best.picture_scorer(pictures, blanked)
        extras, bonuses = self.best.picture_scorer.extras(pictures, self.arguments.get("prompt"))
        self.scoring_seconds += time.perf_counter() - started
        return results, extras, bonuses


def neighbour(noise: Tensor, seed: int, step: float) -> Tensor:
    """Noise at a distance from other noise, with the same variance.

    Args:
        noise: standard normal, any shape.
        seed: of the direction.
        step: share of new noise, in (0, 1].
    """
    new = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return ((1 - step**2) ** 0.5 * noise.float() + step * new).to(noise.dtype)
