"""Training batches: windows of prepared pictures, and what is known of every two of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.nano.losses import preference
from recipes.nano.seen import Item, Pool
from recipes.nano.sets import RatedSet

TOKENS = 2200
"""Visual tokens of a batch, about."""
LEAST_SIDE, MOST_SIDE = 7, 14
"""Rows and columns of a window."""


@dataclass
class Part:
    """Pictures of one window size: maps, statistics and the grid of tokens."""

    maps: Tensor
    statistics: Tensor
    grid: tuple[int, int]


@dataclass
class Batch:
    """Pictures, and what is known of them.

    Args:
        parts: the pictures, by size.
        items: of all parts, in their order.
        preferred, weight: ``(B, B)``: how probably the first (row) is preferred, and how much that counts.
    """

    parts: list[Part]
    items: list[Item]
    preferred: Tensor
    weight: Tensor

    @property
    def mos(self) -> Tensor:
        """Opinions or assumed scores, NaN where there are none."""
        return torch.tensor([item.mos for item in self.items])


class Source:
    """One set's prepared pictures that may be trained on."""

    def __init__(self, pools: Sequence[Pool], rated: RatedSet | None = None) -> None:
        held = rated.held_out if rated else set()
        self.entries = [(pool, i) for pool in pools for i, item in enumerate(pool.items) if item.index not in held]
        self.groups: dict[str, list[tuple[Pool, int]]] = defaultdict(list)
        for pool, i in self.entries:
            self.groups[pool.items[i].group].append((pool, i))
        self.wins = rated.wins if rated else None

    def draw_opinions(self, rng: np.random.Generator, full: bool) -> Batch:
        """Pictures of a set with opinions, any two of which are compared; those of one scene count three times."""
        chosen = [self.entries[i] for i in rng.permutation(len(self.entries))[:48]]
        chosen, parts = _load(chosen, rng, full)
        items = [pool.items[i] for pool, i in chosen]
        mos = torch.tensor([item.mos for item in items])
        weight = 1 + 2.0 * _same([item.group for item in items])
        return Batch(parts, items, preference(mos), weight * (1 - torch.eye(len(items))))

    def draw_votes(self, rng: np.random.Generator, full: bool) -> Batch:
        """Scenes with votes; pictures of one scene are compared, through the same window."""
        chosen, mirrored = [], int(rng.integers(2))
        for name in rng.permutation(sorted(self.groups))[:2]:
            members = [one for n, one in enumerate(self.groups[name]) if n % 2 == mirrored]
            chosen += [members[i] for i in rng.permutation(len(members))[: 4 if full else 6]]
            if full:
                break
        chosen, parts = _load(chosen, rng, full, together=True)
        items = [pool.items[i] for pool, i in chosen]
        preferred, weight = torch.full((len(items),) * 2, 0.5), torch.zeros(len(items), len(items))
        for a, first in enumerate(items):
            for b, second in enumerate(items):
                won, lost = (
                    self.wins.get(pair, 0.0) for pair in ((first.index, second.index), (second.index, first.index))
                )
                preferred[a, b], weight[a, b] = (won + 0.5) / (won + lost + 1), won + lost
        return Batch(parts, items, preferred, weight / weight.mean().clamp(min=1e-6))

    def draw_ladders(self, rng: np.random.Generator, count: int) -> Batch:
        """Whole ladders."""
        names = sorted(self.groups)
        chosen = [entry for i in rng.permutation(len(names))[:count] for entry in self.groups[names[i]]]
        chosen, parts = _load(chosen, rng, True)
        items = [pool.items[i] for pool, i in chosen]
        return Batch(parts, items, torch.empty(0), torch.empty(0))


def _same(groups: list[str]) -> Tensor:
    numbers = torch.tensor([sorted(set(groups)).index(group) for group in groups])
    return (numbers[:, None] == numbers).float()


def _load(chosen, rng: np.random.Generator, full: bool, together: bool = False):
    """Windows of the chosen pictures, as many as the tokens allow: whole ones by size, or all of one drawn size."""
    if full:
        kept, tokens = [], 0
        for pool, i in chosen:
            tokens += pool.grid[0] * pool.grid[1]
            if len(kept) > 2 and pool.items[i].index >= 0 and tokens > TOKENS and not together:
                break
            kept.append((pool, i))
        by_pool: dict[int, list[tuple[Pool, int]]] = defaultdict(list)
        for entry in kept:
            by_pool[id(entry[0])].append(entry)
        parts = []
        for entries in by_pool.values():
            pool = entries[0][0]
            parts.append(Part(*pool.load([i for _, i in entries], [(0, 0)] * len(entries), pool.grid), pool.grid))
        return [entry for entries in by_pool.values() for entry in entries], parts
    limits = [min(MOST_SIDE, min(pool.grid[axis] for pool, _ in chosen)) for axis in (0, 1)]
    size = tuple(int(rng.integers(min(LEAST_SIDE, limit), limit + 1)) for limit in limits)
    if together:
        size = tuple(min(side, math.isqrt(TOKENS // len(chosen))) for side in size)
    else:
        chosen = chosen[: max(6, TOKENS // (size[0] * size[1]))]
    places = rng.random((len(chosen), 2))
    if together:
        places[:] = places[0]
    maps, statistics = [], []
    for (pool, i), place in zip(chosen, places, strict=True):
        window = tuple(
            int(share * (side - length + 1)) for share, side, length in zip(place, pool.grid, size, strict=True)
        )
        one = pool.load([i], [window], size)
        maps.append(one[0])
        statistics.append(one[1])
    last = torch.channels_last
    return chosen, [
        Part(torch.cat(maps).contiguous(memory_format=last), torch.cat(statistics).contiguous(memory_format=last), size)
    ]
