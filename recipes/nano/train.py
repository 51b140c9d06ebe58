"""Training through the readout: the second half of the tower, what merges it into tokens, and the language model.

Every step shows photographs, a batch of one other set, and ladders. Opinions are compared inside a set, votes inside a
scene, a ladder with itself; the scale comes from the photographs and from undistorted pictures.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from recipes.nano import losses
from recipes.nano.batches import Batch, Source
from recipes.nano.naming import CLEAN, remark, thought
from recipes.nano.prepare import RESTING
from recipes.nano.readout import Readout
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.nano.modeling import Convolution

DROPOUT = 0.3
"""Share of a token's statistics that training hides."""
AVERAGE = 0.993
"""Of the running average of the weights, which is what is kept."""
WEIGHTS = {"generated": 1.5, "super_resolution_votes": 5.0, "gan_votes": 2.0}
"""Weights of sets whose fidelity term is small: votes are seldom unanimous. Others have 1."""
START = "<think> The picture shows"
LADDERS = ("distortions", "enlargements", "restorations")
"""Sources that hold ladders."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of what starts from random weights, and of the tower's blocks."""

    new: float = 1.5e-3
    blocks: float = 2.5e-4

    def times(self, share: float) -> Rates:
        """All of them, multiplied."""
        return Rates(self.new * share, self.blocks * share)


class Student:
    """A nano in training."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.readout = model, Readout(model, tokenizer)

    @property
    def tower(self):
        return self.model.model.visual

    def see(self, maps: Tensor, statistics: Tensor) -> Tensor:
        """Visual tokens from what the resting blocks said."""
        tower, told = self.tower, [statistics]
        tower.run_blocks(maps, range(RESTING, len(tower.blocks)), told)
        numbers = tower.standardised(torch.cat([part.float() for part in told], dim=1))
        if tower.training:
            numbers = nn.functional.dropout(numbers, DROPOUT)
        return tower.merge(numbers)

    def judge(self, batch: Batch) -> tuple[ScoreDistribution, Tensor, list[tuple[Tensor, tuple[int, int]]]]:
        """Distributions of a batch, the cross entropy of its written answers, and the visual tokens by part."""
        found, replies, tokens, first = [], [], [], 0
        for part in batch.parts:
            visual = self.see(part.maps, part.statistics)
            items = batch.items[first : first + len(visual)]
            first += len(visual)
            scores = torch.tensor([3.0 if math.isnan(item.mos) else item.mos for item in items])
            known = not any(math.isnan(item.mos) for item in items)
            answers = self.readout.answers(scores + 0.3 * torch.randn(len(scores)))
            distribution, reply = self.readout.read(visual, part.grid, answers)
            found.append(distribution)
            tokens.append((visual, part.grid))
            if known:
                replies.append(reply)
        joined = ScoreDistribution(
            torch.cat([one.probabilities for one in found]), torch.cat([one.coverage for one in found]),
            torch.cat([one.tag_probability for one in found]),
        )  # fmt: skip
        return joined, torch.stack(replies).mean() if replies else torch.zeros(()), tokens

    def think(self, batch: Batch, tokens, distribution: ScoreDistribution, most: int) -> Tensor:
        """Cross entropy of the first few pictures' reasonings, and of answers that agree with the ones without thought.

        A single distortion is named. What is wrong with a rated picture nobody has said: what the model names is given
        and not taught.
        """
        visual, grid = tokens[0]
        items = batch.items[: len(visual)]
        chosen = [i for i, item in enumerate(items) if item.index >= 0 or item.name is not None][:most]
        if not chosen:
            return torch.zeros(())
        rated = items[chosen[0]].index >= 0
        drawn = torch.multinomial(distribution.probabilities[chosen].detach(), 1)[:, 0] / 100 + 1
        if rated:
            shown = self.readout.go_on(visual[chosen].detach(), grid, START, 5)
        else:
            shown = [
                CLEAN if items[i].name == "clean" else remark(items[i].name, round(items[i].level)) for i in chosen
            ]
        thoughts = [thought(text, score) for text, score in zip(shown, drawn.tolist(), strict=True)]
        written = [self.readout.encode(text) for text in thoughts]
        answers = self.readout.answers(drawn)
        begun = len(self.readout.encode(START))
        given = [
            (begun, len(self.readout.encode(text.split(" The overall")[0]))) if rated else (0, 0) for text in thoughts
        ]
        replies = [a + b for a, b in zip(written, answers, strict=True)]
        return self.readout.reply_loss(visual[chosen], grid, replies, given)


def rest(student: Student) -> list[dict]:
    """Groups of the weights that are trained. The filters of single channels rest too: their gradients are slow."""
    tower = student.tower
    student.model.requires_grad_(True)
    for module in (tower.stem, *tower.blocks[:RESTING]):
        module.requires_grad_(False)
    tower.filters.requires_grad = tower.centre.requires_grad = tower.scale.requires_grad = False
    for block in tower.blocks:
        block.spread.requires_grad_(False)
        if block.spread.stride != (1, 1):
            block.spread.forward = partial(_in_float32, block.spread)
    blocks = [p for block in tower.blocks for p in block.parameters() if p.requires_grad]
    known = {id(p) for p in blocks}
    new = [p for p in student.model.parameters() if p.requires_grad and id(p) not in known]
    return [
        {"params": new, "which": "new", "weight_decay": 0.05},
        {"params": blocks, "which": "blocks", "weight_decay": 0.01},
    ]


def _in_float32(conv: Convolution, x: Tensor) -> Tensor:
    """Strided gradients of single channels are ten times slower in bfloat16."""
    with torch.autocast("cpu", enabled=False):
        return Convolution.forward(conv, x.float())


@torch.no_grad()
def standardise(student: Student, sources: list[Source], rng: np.random.Generator, count: int = 12) -> None:
    """Set the centre and scale of the statistics from some pictures of each source."""
    tower, seen = student.tower.eval(), []
    for source in sources:
        for _ in range(count):
            for part in source.draw_opinions(rng, False).parts:
                told = [part.statistics]
                tower.run_blocks(part.maps, range(RESTING, len(tower.blocks)), told)
                seen.append(torch.cat([one.float() for one in told], 1).flatten(2).mT.flatten(0, 1))
    values = torch.cat(seen)
    tower.centre.copy_(values.mean(0)[:, None, None])
    tower.scale.copy_(1 / (values.std(0)[:, None, None] + 0.02))


def train(
    student: Student, sources: dict[str, Source], minutes: float, *, steps: int = 10**9, rates: Rates = Rates(),
    seed: int = 0, report: Callable[[str], None] = print, every: int = 50,
    check: Callable[[Student, int], None] | None = None, ladders: tuple[int, int] = (2, 1),
) -> None:  # fmt: skip
    """Train in place; at the end the model holds the average of its weights.

    Args:
        student: with starting weights and standardised statistics.
        sources: `photographs`, which every step shows, other rated sets, which take turns, and ladders (those named
            `distortions`, `enlargements`, `restorations`).
        minutes: the learning rates fall over this time, at the end of which it stops.
        steps: at most so many.
        rates: at their highest.
        seed: of everything drawn.
        report: gets a line every ``every`` steps.
        check: called with a student that holds the average weights, at those times.
        ladders: how many of distortions and of other kinds a step shows.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    groups = rest(student)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    average, began = copy.deepcopy(student.model), time.monotonic()
    trained = [weight for weight in student.model.parameters() if weight.requires_grad]
    pairs = zip(average.parameters(), student.model.parameters(), strict=True)
    kept = [mean for mean, weight in pairs if weight.requires_grad]
    lesson = Lesson(student, sources, ladders, rng)
    step, done, sums = 0, 0.0, defaultdict(list)
    while done < 1:
        step += 1
        done = min(1.0, max(step / steps, (time.monotonic() - began) / (60 * minutes)))
        pace = min(1, step / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = pace * (rates.new if group["which"] == "new" else rates.blocks * min(1, step / 300))
        student.model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            terms = lesson.backward(step, done)
        terms["norm"] = float(nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(kept, trained, 1 - min(AVERAGE, step / (step + 10)))
        for name, value in terms.items():
            sums[name].append(value)
        if step % every == 0 or done >= 1:
            told = " ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in sums.items())
            report(f"step {step} {time.monotonic() - began:.0f}s {told}")
            sums.clear()
            if check is not None:
                check(Student(average.eval(), student.readout.tokenizer), step)
    student.model.load_state_dict(average.state_dict())
    student.model.eval()


def teach_thinking(
    student: Student, sources: dict[str, Source], steps: int, *, rate: float = 5e-4, seed: int = 0,
    report: Callable[[str], None] = print, every: int = 25,
) -> None:  # fmt: skip
    """Let the language model name distortions for pictures of any size, while its answers stay what they are.

    Ladders are crops of one size; a grid drawn from their tokens stands for others. A frozen copy teaches all scores.
    """
    rng = np.random.default_rng([seed, 3])
    torch.manual_seed(seed)
    teacher = Student(copy.deepcopy(student.model).requires_grad_(False).eval(), student.readout.tokenizer)
    student.model.requires_grad_(False).eval()
    language = student.model.model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW(language.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    sums: dict[str, list[float]] = defaultdict(list)
    for step in range(1, steps + 1):
        for name in ("distortions", "photographs"):
            source = sources[name]
            batch = source.draw_ladders(rng, 3) if name == "distortions" else source.draw_opinions(rng, False)
            part, items = batch.parts[0], batch.items[:12]
            with torch.no_grad():
                visual = student.see(part.maps[:12], part.statistics[:12])
            grid = part.grid
            if rng.random() < 0.7:
                grid = tuple(int(side) for side in rng.integers(3, 21, 2))
                visual = visual[:, np.sort(rng.integers(0, visual.shape[1], grid[0] * grid[1]))]
            answers = student.readout.answers(torch.full((len(items),), 3.0))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                wanted, _ = teacher.readout.read(visual, grid, answers)
            with torch.autocast("cpu", torch.bfloat16):
                found, _ = student.readout.read(visual, grid, answers)
                ratio = wanted.probabilities.clamp(min=1e-9).log() - found.probabilities.clamp(min=1e-9).log()
                kept = (wanted.probabilities * ratio).sum(1).mean()
                shown = Batch([], items, batch.preferred, batch.weight)
                told = student.think(shown, [(visual, grid)], wanted, 12)
            (4 * kept + told + 0.02 * losses.outside(found)).backward()
            sums[f"kept {name}"].append(float(kept.detach()))
            sums[f"told {name}"].append(float(told.detach()))
        nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % every == 0 or step == steps:
            report(f"thinking {step} " + " ".join(f"{key} {sum(v) / len(v):.4f}" for key, v in sums.items()))
            sums.clear()
    student.model.requires_grad_(False)


class Lesson:
    """The batches of one step and what they add to the gradients."""

    def __init__(
        self, student: Student, sources: dict[str, Source], ladders: tuple[int, int], rng: np.random.Generator
    ) -> None:
        self.student, self.sources, self.ladders, self.rng = student, sources, ladders, rng
        self.others = [name for name in sources if name not in ("photographs", *LADDERS)]
        self.extra = [name for name in LADDERS[1:] if name in sources]

    def backward(self, step: int, done: float) -> dict[str, float]:
        """Add this step's gradients; the terms of the loss, for the report."""
        self.terms: dict[str, float] = {}
        self._photographs(thinking=done > 0.4 and step % 3 == 0)
        if self.others:
            self._rated(self.others[step % len(self.others)], full=bool(self.rng.random() < 0.15 + 0.3 * done))
        if "distortions" in self.sources and self.ladders[0]:
            self._ladders("distortions", self.ladders[0])
        if self.extra and self.ladders[1]:
            self._ladders(self.extra[step % len(self.extra)], self.ladders[1])
        return self.terms

    def _note(self, name: str, value: Tensor, weight: float) -> Tensor:
        self.terms[name] = float(value.detach())
        return weight * value

    def _photographs(self, thinking: bool) -> None:
        batch = self.sources["photographs"].draw_opinions(self.rng, bool(self.rng.random() < 0.4))
        distribution, reply, tokens = self.student.judge(batch)
        loss = self._note("photographs", losses.fidelity(distribution, batch.preferred, batch.weight), 1.0)
        loss = loss + self._note("scale", losses.on_scale(distribution, batch.mos, 0.3), 0.15)
        loss = loss + self._note("reply", reply, 0.05) + self._note("outside", losses.outside(distribution), 0.02)
        self.terms["spread"] = float(distribution.mean.detach().std())  # near zero means a collapse
        if thinking:
            loss = loss + self._note("judged", self.student.think(batch, tokens, distribution, 6), 0.1)
        loss.backward()

    def _rated(self, name: str, full: bool) -> None:
        source = self.sources[name]
        batch = (source.draw_votes if source.wins else source.draw_opinions)(self.rng, full)
        distribution, _, _ = self.student.judge(batch)
        loss = self._note(name, losses.fidelity(distribution, batch.preferred, batch.weight), WEIGHTS.get(name, 1.0))
        loss = loss + 0.02 * losses.outside(distribution)
        if not source.wins:  # opinions of other sets are on another scale, if not far from this one
            loss = loss + 0.05 * losses.on_scale(distribution, batch.mos, 0.5)
        loss.backward()

    def _ladders(self, name: str, count: int) -> None:
        batch = self.sources[name].draw_ladders(self.rng, count)
        distribution, _, tokens = self.student.judge(batch)
        number = {group: i for i, group in enumerate(dict.fromkeys(item.group for item in batch.items))}
        group = torch.tensor([number[item.group] for item in batch.items])
        level = torch.tensor([item.level for item in batch.items])
        loss = self._note(name, losses.ladder(distribution.mean, group, level), 1.5)
        loss = loss + 0.02 * losses.outside(distribution)
        if bool(batch.mos.isfinite().any()):
            loss = loss + self._note("anchors", losses.on_scale(distribution, batch.mos, 0.5), 0.06)
        if name == "distortions":
            loss = loss + self._note("named", self.student.think(batch, tokens, distribution, 15), 0.15)
        loss.backward()
