"""First stage: the vision tower with a pooled linear head.

Straight through the language model a random start collapses to a constant; a pooled head does not. Beside the scores
the pooled tokens predict the statistics of the very crop, which teach the tower what blur, noise and blocks are.
"""

import copy
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .objectives import anchor_loss, fidelity_loss, ladder_loss
from .tower import FastTower

TOWER_SHARE = 0.15
"""Rate of the tower, which starts from a construction, as a share of that of parts which start from noise."""
CENTRE = 3.5
"""Start of the score head, about the mean of the training scores."""


class PooledHead(nn.Module):
    """Mean over the visual tokens, standardised, then small networks for the score and for the picture's statistics.

    Batch normalisation, because most of a pooled token is common to all pictures: what differs between them is a small
    part, and without it the statistics are learned far more slowly.
    """

    def __init__(self, width: int, targets: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, momentum=0.05)
        self.score = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 1))
        self.targets = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, targets))

    @torch.no_grad()
    def start(self, pooled: Tensor) -> None:
        """Statistics from pooled tokens of some pictures (N, D); places keep their spreads relative to each other."""
        self.norm.running_mean.copy_(pooled.mean(0))
        self.norm.running_var.copy_(pooled.var(0))
        self.norm.weight.copy_(pooled.std(0) / pooled.var(0).mean().sqrt())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, D) to scores (B,) and statistics (B, targets)."""
        pooled = self.norm(tokens.float().mean(1))
        return CENTRE + self.score(pooled).squeeze(-1), self.targets(pooled)


class Average:
    """Exponential moving average of parameters; `model` holds it."""

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.model, self.decay, self.count = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, 1 - 8 / (self.count + 9))  # at first over the last eighth
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def make_optimizer(parts: Sequence[tuple[nn.Module, float]]) -> torch.optim.Optimizer:
    """AdamW over modules, each with its share of the rate; decay on matrices only. Groups carry `share`."""
    groups, seen = [], set()
    for module, share in parts:
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": 0.02, "share": share})
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, "share": share})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


class Clock:
    """Progress of a stage from 0 to 1, by steps or by minutes, whichever ends first; a cosine schedule on it."""

    def __init__(self, steps: int, minutes: float = math.inf, floor: float = 0.02) -> None:
        self.steps, self.seconds, self.floor = steps, minutes * 60, floor
        self.start, self.step = time.monotonic(), 0

    @property
    def progress(self) -> float:
        return max(self.step / self.steps, (time.monotonic() - self.start) / self.seconds)

    def factor(self, warmup: int = 100) -> float:
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1, self.progress)))
        return cosine * min(1, (self.step + 1) / warmup)

    def tick(self) -> bool:
        self.step += 1
        return self.progress < 1


def pretrain(model, batches, head: PooledHead, clock: Clock, rate=1e-3, report=print, every=100, checkpoint=None):
    """Train tower and head in place over an iterable of batches; returns the moving average of both.

    `report` gets a line every `every` steps; `checkpoint(average)` is called with it.
    """
    stage = nn.ModuleDict({"tower": FastTower(model.model.visual), "head": head})
    forward = torch.compile(stage["tower"]) if clock.steps > 500 else stage["tower"]
    optimizer, average = make_optimizer([(stage["tower"], TOWER_SHARE), (head, 1.0)]), Average(stage)
    sums, began = torch.zeros(5), time.monotonic()
    for batch in batches:
        set_rate(optimizer, rate * clock.factor())
        rated = batch["rated"]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = forward(batch["images"])
        mean, told = head(tokens)
        losses = [
            fidelity_loss(mean[:rated], torch.full_like(mean[:rated], 0.1), batch["scores"][:rated]),
            anchor_loss(mean, batch["scores"], batch["scene"]),
            ladder_loss(mean, batch["scene"], batch["level"]),
            F.smooth_l1_loss(told, batch["targets"]),
        ]
        loss = losses[0] + 1.0 * losses[1] + 1.0 * losses[2] + 3.0 * losses[3]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.parameters(), 2.0)
        optimizer.step()
        average.update(stage)
        sums += torch.stack([*[x.detach() for x in losses], norm])
        go_on = clock.tick()
        if clock.step % every == 0 or not go_on:
            count = (clock.step - 1) % every + 1
            values = " ".join(f"{value:.3f}" for value in (sums / count).tolist())
            speed = (time.monotonic() - began) / count
            names = "fidelity/anchor/ladder/statistics/norm"
            report(f"step {clock.step} {speed:.2f}s spread {mean.std():.2f} {names} {values}")
            sums, began = torch.zeros(5), time.monotonic()
            if checkpoint is not None:
                checkpoint(average.model)
        if not go_on:
            return average.model
    return average.model
