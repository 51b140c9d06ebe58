"""Which images go through the model together, and what happens where they do not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar, cast

import torch

from vqr1_metric._warnings import warn_caller
from vqr1_metric.backends.base import ImageFailed, ScoringBackend
from vqr1_metric.images import ImageError

#: Tokens of one forward pass, padding included, where the backend has no opinion of its own.
DEFAULT_BATCH_TOKENS = 16_384
#: More tokens at once fill no GPU better.
MOST_TOKENS = 16_384
#: A batch ends where padding would pass this share of it, once it holds this share of its tokens.
_PADDING, _ENOUGH = 0.05, 0.125

Outcome = TypeVar("Outcome")


class TooLarge(Exception):
    """One image does not fit into the memory even alone."""


class Batches:
    """Plans and runs batches, and remembers what fitted into the memory."""

    def __init__(self) -> None:
        self._fitting: int | None = None  # what a batch that did not fit into memory was cut to

    def plan(
        self,
        backend: ScoringBackend,
        lengths: Sequence[int],
        visual: Sequence[int],
        copies: int = 1,
        tokens: int | None = None,
        alone: bool = False,
    ) -> Iterator[list[int]]:
        """Indices of images that go through the model together: of like size, within the budget.

        Args:
            backend: may say in ``batch_tokens`` and ``batch_visual_tokens`` what suits it.
            lengths, visual: tokens that each image costs in all, and in the vision tower.
            copies: rows that each image becomes.
            tokens: of one forward pass, padding included; None leaves it to the backend.
            alone: put every image through the model alone.
        """
        if not lengths:
            return
        most_visual = math.inf if tokens else getattr(backend, "batch_visual_tokens", math.inf)
        wanted = tokens or cast(int, getattr(backend, "batch_tokens", DEFAULT_BATCH_TOKENS))
        batch: list[int] = []
        held = 0  # tokens, without padding
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            # Sorted by length, so the newcomer is the longest and every row is padded to it. The budget is read anew
            # each time, because a batch that did not fit into memory lowers it.
            budget = 0 if alone else min(wanted, self._fitting or wanted)
            total = lengths[index] * (len(batch) + 1)
            wasteful = held * copies >= _ENOUGH * budget and total - held - lengths[index] > _PADDING * total
            crowded = visual[index] * (len(batch) + 1) > most_visual
            if batch and (total * copies > budget or crowded or wasteful):
                yield batch
                batch, held = [], 0
            batch.append(index)
            held += lengths[index]
        yield batch

    def run(
        self,
        backend: ScoringBackend,
        lengths: Sequence[int],
        visual: Sequence[int],
        work: Callable[[list[int]], Outcome],
        copies: int = 1,
        tokens: int | None = None,
        alone: bool = False,
    ) -> Iterator[tuple[list[int], Outcome | TooLarge]]:
        """Each batch of indices with what ``work`` made of it; :class:`TooLarge` for an image that does not fit."""
        todo = self.plan(backend, lengths, visual, copies, tokens, alone)
        halves: list[list[int]] = []
        while batch := halves.pop() if halves else next(todo, None):
            try:
                yield batch, work(batch)
                continue
            except torch.OutOfMemoryError:
                pass  # go on outside, where the error no longer holds what the failed pass had allocated
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) == 1:
                yield batch, TooLarge()
                continue
            if self._fitting is None:
                warn_caller(
                    f"{len(batch)} pictures at once do not fit into the free memory: going on with smaller batches. "
                    "batch_tokens sets their size. This is said once."
                )
            middle = len(batch) // 2
            self._fitting = lengths[batch[-1]] * middle * copies
            halves += [batch[middle:], batch[:middle]]


def run_apart(
    backend: Any, images: int, work: Callable[[list[int]], Outcome], at_a_time: int
) -> Iterator[tuple[list[int], Outcome | ImageError]]:
    """Each image alone, several at a time, as they are done: for a model that waits for answers from elsewhere."""
    graph = torch.is_grad_enabled()

    def run_one(index: int) -> Outcome:
        with torch.set_grad_enabled(graph):  # which each thread has for itself
            return work([index])

    pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="vqr1-scoring")
    futures = {pool.submit(run_one, index): index for index in range(images)}
    try:
        for future in as_completed(futures):
            try:
                yield [futures[future]], future.result()
            except ImageFailed as error:
                yield [futures[future]], ImageError(str(error))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not all(future.done() for future in futures):  # an error of the whole, or Ctrl-C
            backend.cancel()
        pool.shutdown()


def fitting_tokens(free_bytes: int, config: Any, item_bytes: int) -> int:
    """Tokens of one forward pass whose activations fit into half of the free memory, at least 1.

    The largest moment is a layer's: in the tower each visual token is ``merge**2`` patches; beside the hidden states
    (about 8 tensors of the layer's width with its queries, keys and values) there are 3 of the inner width.
    """
    text, vision = config.get_text_config(), config.vision_config
    width, inner = tower_widths(vision)
    of_tower = vision.spatial_merge_size**2 * (8 * width + 3 * inner)
    of_language_model = 8 * text.hidden_size + 3 * text.intermediate_size
    return max(1, min(MOST_TOKENS, int(free_bytes / 2 / (item_bytes * max(of_tower, of_language_model)))))


def tower_widths(vision: Any) -> tuple[int, int]:
    """Width of a vision tower and of its MLPs; Qwen2-VL names them in its own way."""
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return width, getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)
