"""The order of pictures: comparison sets of one data set each, a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch.utils.data import Sampler

Mixing = Literal["proportional", "authors", "uniform"]


class ComparisonSampler(Sampler[int]):
    """Yields indices of pictures, comparison set after comparison set.

    A *unit* is what stays together: one picture, or the two of a preference. Each set's units are shuffled anew in
    every epoch; what does not fill a comparison set is left out of that epoch.

    Args:
        units: for each data set its units, each a tuple of indices into the training rows; all of one size in a set.
        images_per_comparison: pictures that are compared with each other.
        sets_per_batch: comparison sets of one generation batch, over all processes; an epoch ends with a full batch.
        repeats: how often each picture follows itself (K replies).
        batch_repeats: how often each generation batch follows itself (the steps that reuse it).
        mixing: ``"proportional"`` uses every picture once in an epoch, comparison sets in any order; ``"authors"`` uses
            every picture once too, and draws the data set of each comparison set uniformly among those that have enough
            left (as the code of VisualQuality-R1 does), so that small sets come early in an epoch; ``"uniform"`` draws
            it uniformly among all, so that small sets come round more often than large ones.
        seed: of the order.
    """

    def __init__(
        self,
        units: Sequence[Sequence[tuple[int, ...]]],
        images_per_comparison: int,
        sets_per_batch: int = 1,
        repeats: int = 1,
        batch_repeats: int = 1,
        mixing: Mixing = "proportional",
        seed: int = 0,
    ) -> None:
        if mixing not in get_args(Mixing):
            raise ValueError(f"Expected mixing to be one of {get_args(Mixing)}, but got {mixing!r}.")
        self.units = [list(u) for u in units]
        self.per_set = [images_per_comparison // len(u[0]) for u in self.units]
        self.sets_per_batch = sets_per_batch
        self.repeats, self.batch_repeats = repeats, batch_repeats
        self.images_per_comparison = images_per_comparison
        self.mixing, self.seed, self.epoch = mixing, seed, 0
        available = sum(len(u) // n for u, n in zip(self.units, self.per_set, strict=True))
        self.sets_per_epoch = available // sets_per_batch * sets_per_batch
        if self.sets_per_epoch == 0:
            raise ValueError(
                f"Expected enough pictures for one batch of {sets_per_batch} comparison sets of "
                f"{images_per_comparison}, but there are only {available} such sets. Lower the batch or the number of "
                "processes."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sets_per_epoch * self.images_per_comparison * self.repeats * self.batch_repeats

    def comparison_sets(self) -> list[list[int]]:
        """The comparison sets of this epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.mixing == "proportional":
            streams = [_passes(u, n, generator, 1) for u, n in zip(self.units, self.per_set, strict=True)]
            sets = [chunk for stream in streams for chunk in stream]
            order = torch.randperm(len(sets), generator=generator).tolist()
            return [sets[i] for i in order][: self.sets_per_epoch]
        if self.mixing == "authors":
            left = [_passes(u, n, generator, 1) for u, n in zip(self.units, self.per_set, strict=True)]
            drawn: list[list[int]] = []
            while len(drawn) < self.sets_per_epoch:
                usable = [chunks for chunks in left if chunks]
                drawn.append(usable[int(torch.randint(len(usable), (), generator=generator))].pop())
            return drawn
        which = torch.randint(len(self.units), (self.sets_per_epoch,), generator=generator).tolist()
        endless: list[Iterator[list[int]]] = []
        for i, (u, n) in enumerate(zip(self.units, self.per_set, strict=True)):
            passes = -(-which.count(i) // max(1, len(u) // n))
            endless.append(iter(_passes(u, n, generator, passes)))
        return [next(endless[i]) for i in which]

    def __iter__(self) -> Iterator[int]:
        sets = self.comparison_sets()
        for start in range(0, len(sets), self.sets_per_batch):
            batch = [index for chunk in sets[start : start + self.sets_per_batch] for index in chunk]
            for _ in range(self.batch_repeats):
                for index in batch:
                    for _ in range(self.repeats):
                        yield index


def _passes(units: Sequence[tuple[int, ...]], count: int, generator: torch.Generator, passes: int) -> list[list[int]]:
    """Comparison sets of ``count`` units from so many shuffled passes over the units."""
    chunks = []
    for _ in range(passes):
        order = torch.randperm(len(units), generator=generator).tolist()
        for start in range(0, len(units) - count + 1, count):
            chunks.append([index for i in order[start : start + count] for index in units[i]])
    return chunks
