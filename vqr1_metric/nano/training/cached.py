"""Third stage: the language model alone, over visual tokens computed once.

With the tower at rest a step costs a tenth, so that hundreds of steps settle what the language model has to get right
for pictures of any shape: the wording of the reply, the scale, the order.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .data import Batches, Rated
from .tower import FastTower


@torch.no_grad()
def visual_tokens(tower: FastTower, images: Tensor, chunk: int = 16) -> Tensor:
    """Tokens (B, T, D) in half precision of uint8 pictures (B, 3, S, S)."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = [tower(part) for part in images.split(chunk)]
    return torch.cat(tokens).half()


class TokenBatches:
    """Endless batches of cached tokens, as `Batches` gives them, with `tokens` in place of `images`.

    Two caches take turns: whole rated pictures, and crops. Each holds `count` rated pictures and `ladders` ladders.
    """

    def __init__(
        self, tower: FastTower, rated: Rated, pristine, sizes, count=1500, ladders=120, batch=32, scenes=5, seed=0
    ) -> None:
        self.batch, self.scenes, self.seed = batch, scenes, seed
        self.caches = [self._cache(tower, rated, pristine, size, count, ladders, seed) for size in sizes]

    def _cache(self, tower, rated, pristine, size, count, ladders, seed) -> tuple[list[dict], list[dict]]:
        rng = np.random.default_rng([seed, size])
        source = Batches(rated, pristine, size, rated_crops=min(50, len(rated.scores)), scenes=0, features=0)
        rows, groups = [], []
        while len(rows) < count:
            part = source.batch(rng)
            rows += zip(visual_tokens(tower, part["images"]), part["scores"].tolist(), strict=True)
        source = Batches(rated, pristine, size, rated_crops=0, scenes=1, rungs=5, features=0)
        for _ in range(ladders):
            part = source.batch(rng)
            groups.append((visual_tokens(tower, part["images"]), part["scores"], part["level"]))
        return rows, groups

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        rng, turn = np.random.default_rng([self.seed, 1]), 0
        while True:
            rows, groups = self.caches[turn % len(self.caches)]
            turn += 1
            chosen = [rows[i] for i in rng.choice(len(rows), min(self.batch, len(rows)), replace=False)]
            ladders = [groups[i] for i in rng.choice(len(groups), min(self.scenes, len(groups)), replace=False)]
            tokens = torch.cat([torch.stack([tokens for tokens, _ in chosen]), *[group[0] for group in ladders]])
            scene = [-1] * len(chosen) + [number for number, group in enumerate(ladders) for _ in group[1]]
            yield {
                "tokens": tokens,
                "scores": torch.cat([torch.tensor([score for _, score in chosen]), *[group[1] for group in ladders]]),
                "rated": len(chosen),
                "scene": torch.tensor(scene),
                "level": torch.cat([torch.zeros(len(chosen)), *[group[2] for group in ladders]]),
            }
