"""The candidates of one prompt: made and scored in chunks, whatever ends the run before its time."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.calls import Cancelled, Snapshot, Stopped
from vqr1_metric.integrations.diffusers.pipes import Made, Maker
from vqr1_metric.integrations.diffusers.records import Store
from vqr1_metric.integrations.diffusers.results import BestOfNOutput, Candidate, finish, rate
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError
from vqr1_metric.integrations.diffusers.scoring import PictureScorer


class Run:
    """Makes and scores candidates, and keeps the books.

    Args:
        maker: of the candidates.
        scorer: of their pictures.
        arguments: of the pipe, prompt included.
        prompt: that other scorers are told.
        on_candidate: called with every finished candidate.
        store: of pictures that an earlier run has made.
        budget: denoiser rows that may be computed, or None.

    Attributes:
        interrupted: why no more is made, or None; ``error`` is the exception, if it was one.
    """

    def __init__(
        self,
        maker: Maker,
        scorer: PictureScorer,
        arguments: dict[str, Any],
        prompt: str | None,
        *,
        on_candidate: Callable[[Candidate], Any] | None = None,
        store: Store | None = None,
        budget: int | None = None,
    ) -> None:
        self.maker, self.scorer, self.arguments, self.prompt = maker, scorer, arguments, prompt
        self.on_candidate, self.store, self.budget = on_candidate, store, budget
        self.batch_size = maker.batch_size
        self.rows, self.made, self.scoring_seconds, self.started = 0, 0, 0.0, time.perf_counter()
        self.interrupted: str | None = None
        self.error: BaseException | None = None
        self.trace: list[tuple[int, float]] = []
        self._earlier: str | None = None  # why some candidates have no preview
        self._known = False  # is there anything to hand back?
        self._snapshots: list[Snapshot] = []
        self._places: dict[int, tuple[int, int]] = {}  # of a candidate (its id): snapshot, row
        self._generators: dict[int, Tensor] = {}  # of a candidate that goes on with noise of its own

    def previews(self, candidates: list[Candidate], preview_at: float, save: bool) -> None:
        """Score the predicted clean picture of every candidate; with ``save``, what follows carries on from there."""
        snapshots: list[Snapshot] = []
        places: dict[int, tuple[int, int]] = {}
        for chunk in self._chunks(candidates):
            made = self._make(chunk, preview_at=preview_at, resume=self._resume(chunk))
            if made is None:
                continue
            assert made.call is not None and made.call.snapshot is not None
            if save:  # what the denoisers said is as large as all their activations: one chunk's is enough
                places |= {id(c): (len(snapshots), row) for row, c in enumerate(chunk)}
                snapshot = made.call.snapshot
                snapshots.append(replace(snapshot, answers={}) if snapshots else snapshot)
            results, extras = self._score(made)
            for candidate, picture, result, extra in zip(chunk, made.pictures, results, extras, strict=True):
                candidate.preview, candidate.preview_result, candidate.preview_extras = picture, result, extra
            self._known = True
        rate(candidates, self.scorer, preview=True)
        self._snapshots, self._places, self._generators = snapshots, places, {}
        self._known = False  # as yet no picture: should the next call fail, there is nothing to hand back
        if isinstance(self.error, Exception):  # what has a preview may still be finished
            self._earlier, self.interrupted = self.interrupted, None

    def finals(self, candidates: list[Candidate]) -> None:
        """Denoise the survivors to the end and score them."""
        survivors = [candidate for candidate in candidates if candidate.survived]
        kept = {id(c): picture for c in survivors if self.store and (picture := self.store.get(c.seed)) is not None}
        for chunk in self._chunks([c for c in survivors if id(c) in kept]):
            self._take(chunk, Made([kept[id(c)] for c in chunk], [None] * len(chunk)), new=False)
        ours = [candidate for candidate in survivors if id(candidate) not in kept]
        for chunk in self._chunks(ours):
            made = self._make(chunk, resume=self._resume(chunk), **self._noise(chunk))
            if made is None:
                continue
            self.made += len(chunk)
            self._take(chunk, made, new=True)
            if self.budget is not None and not self.fits(len(ours) - self.made):
                raise ValueError(
                    f"Expected a budget for the first {len(ours)} candidates, {self._cost(len(ours))} denoiser rows, "
                    f"but got {self.budget}."
                )

    def fork(self, child: Candidate, parent: Candidate) -> None:
        """Let a new candidate carry on from where its parent stands, with the noise of its own seed."""
        self._places[id(child)] = self._places[id(parent)]
        self._generators[id(child)] = torch.Generator().manual_seed(child.seed).get_state()

    def draws_noise(self) -> bool:
        """Has the scheduler drawn noise up to where the candidates stand?"""
        return all(snapshot.drew for snapshot in self._snapshots)

    def fits(self, candidates: int) -> bool:
        """Is the budget enough for so many more, judged by the cost of those that were made?"""
        return self.budget is None or self.rows + self._cost(max(0, candidates)) <= self.budget

    def output(self, candidates: list[Candidate], keep: int, strategy: str, about: dict[str, Any]) -> BestOfNOutput:
        """What is known by now."""
        self.interrupted = self.interrupted or self._earlier
        if self.interrupted is None and not any(c.result is not None for c in candidates):
            self.interrupted = "no candidate was finished: stop_below has ended every one"
        return finish(
            candidates,
            keep,
            self.scorer,
            strategy=strategy,
            denoiser_rows=self.rows,
            scoring_seconds=self.scoring_seconds,
            total_seconds=time.perf_counter() - self.started,
            prompt=self.prompt,
            interrupted=self.interrupted,
            error=self.error,
            trace=self.trace,
            about=about | {"arguments": {n: v for n, v in self.arguments.items() if isinstance(v, (str, int, float))}},
        )

    # ---------------------------------------------------------------- within

    def _chunks(self, items: list[Candidate]) -> list[list[Candidate]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def _cost(self, candidates: int) -> int:
        return math.ceil(self.rows / self.made * candidates) if self.made else 0

    def _resume(self, chunk: list[Candidate]) -> Snapshot | None:
        if not self._snapshots or not all(id(c) in self._places for c in chunk):
            return None
        snapshot = Snapshot.gather(self._snapshots, [self._places[id(c)] for c in chunk])
        snapshot.generators = [
            self._generators.get(id(c), state) for c, state in zip(chunk, snapshot.generators, strict=True)
        ]
        return snapshot

    def _noise(self, chunk: list[Candidate]) -> dict[str, Tensor]:
        noise = [candidate.noise for candidate in chunk if candidate.noise is not None]
        return {"added_noise" if chunk[0].noise_added else "latents": torch.cat(noise)} if noise else {}

    def _make(self, chunk: list[Candidate], **steer: Any) -> Made | None:
        """A chunk, or None where it was not made: what had been made before is not lost."""
        if self.interrupted is not None:
            made = None
        else:
            made = self._try(chunk, {name: value for name, value in steer.items() if value is not None})
        if made is None:
            for candidate in chunk:
                candidate.survived = False
        return made

    def _try(self, chunk: list[Candidate], steer: dict[str, Any]) -> Made | None:
        try:
            made = self.maker.make(self.arguments, [c.seed for c in chunk], on_rows=self._count, **steer)
            if len(made.pictures) != len(chunk):
                raise UnsupportedError(
                    f"Expected {len(chunk)} pictures from {self.maker.name}, but got {len(made.pictures)}."
                )
            _check_start(made, steer.get("latents"))
        except Stopped:
            return None
        except Cancelled:
            self.interrupted = "cancelled"
            return None
        except (Exception, KeyboardInterrupt) as error:
            self._end(error)
            return None
        if made.call is not None and made.call.cancelled:
            self.interrupted = "cancelled"
        return made

    def _end(self, error: BaseException) -> None:
        """Make no more, and hand back what there is; raise the error if there is nothing."""
        if not self._known:
            raise error
        self.error, self.interrupted = error, f"{type(error).__name__}: {error}".rstrip(": ")
        warnings.warn(f"The run ended early, what was made is kept: {self.interrupted}", stacklevel=2)

    def _count(self, rows: int) -> None:
        self.rows += rows

    def _take(self, chunk: list[Candidate], made: Made, new: bool) -> None:
        try:
            results, extras = self._score(made)
        except KeyboardInterrupt as error:
            self._end(error)
            for candidate in chunk:
                candidate.survived = False
            return
        for row, candidate in enumerate(chunk):
            candidate.picture, candidate.result, candidate.extras = made.pictures[row], results[row], extras[row]
            if self.budget is not None and candidate.noise is None and made.call is not None:
                assert made.call.noise is not None
                candidate.noise, candidate.noise_added = made.call.noise[row : row + 1].cpu(), made.call.added
        self._known = True
        try:
            for candidate in chunk:
                assert candidate.result is not None
                if self.store is not None and new and candidate.result.error is None:  # an error may pass
                    self.store.put(candidate.seed, candidate.picture)
                if self.on_candidate is not None:
                    self.on_candidate(candidate)
        except (Exception, KeyboardInterrupt) as error:  # a full disk, say
            self._end(error)

    def _score(self, made: Made) -> tuple[list[Any], list[dict[str, float]]]:
        started = time.perf_counter()
        results = self.scorer(made.pictures, made.reasons, self.prompt)
        extras = self.scorer.extras(made.pictures, self.prompt)
        self.scoring_seconds += time.perf_counter() - started
        return results, extras


def _check_start(made: Made, latents: Tensor | None) -> None:
    """Raise if the pipe did not start from the noise that it was given."""
    if latents is None or made.call is None or made.call.noise is None:
        return
    start = made.call.noise.cpu().float()
    if start.shape != latents.shape or not torch.allclose(start, latents.float(), rtol=0.02, atol=0.02):
        raise UnsupportedError("The pipe does not start from the noise that is passed as latents; use a larger n.")
