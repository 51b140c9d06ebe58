"""Last step of the recipe: teach the language model pictures of more visual tokens than the crops had.

    python -m recipes.nano.widen --model nano/ --data labels.csv --images DIR --pristine DIR -o out/

The tower sees detail at the same scale in a large picture, but a language model trained on at most 144 visual tokens
forgets to answer at 384. Here it is shown up to `MOST_TOKENS` tokens, drawn with replacement from those of a crop, and
must state the distribution that it stated for the crop itself (a frozen copy is the teacher). Ladders of all
distortions go along. The vision tower stays as it is.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort

from .build import save_folder
from .data import load_folder, load_rated
from .finetune import ReadoutForward
from .objectives import ladder_loss
from .tokenizer import build_tokenizer
from .tower import FastTower

MOST_TOKENS = 400
MAX_PIXELS = 768 * 512
"""The pixel limit afterwards: 384 visual tokens."""
KINDS = (*DISTORTIONS, *["colour_cast", "rescale"] * 2)
"""Distortions of the ladders, in turn. A slight cast looks like more colour, which is good, and reducing by 1.5 like a
blur: these two are the slowest to fall at every step."""
MARGIN = 0.08
"""Wanted fall per level, on the scale 1 to 5."""


@torch.no_grad()
def rated_tokens(tower: FastTower, rated, count: int, rng: np.random.Generator) -> Tensor:
    """Visual tokens (count, T, D) of whole rated pictures."""
    chosen = rng.choice(len(rated.pictures), min(count, len(rated.pictures)), replace=False)
    images = torch.from_numpy(rated.pictures[chosen]).permute(0, 3, 1, 2)
    return torch.cat([tower(part.contiguous()) for part in images.split(8)])


@torch.no_grad()
def ladder_tokens(tower: FastTower, pristine, scenes: int, side: int, rng: np.random.Generator) -> Tensor:
    """Visual tokens (scenes, LEVELS + 1, T, D) of one crop of one picture at every strength of one distortion each."""
    ladders = []
    for number in range(scenes):
        picture = pristine[rng.integers(len(pristine))]
        left, top = (int(rng.integers(0, (extent - side) // 8 + 1)) * 8 for extent in picture.size)
        name = KINDS[number % len(KINDS)]
        rungs = [distort(picture, name, level, seed=number) for level in range(LEVELS + 1)]
        crops = np.stack([np.asarray(rung.crop((left, top, left + side, top + side))) for rung in rungs])
        ladders.append(tower(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()))
    return torch.stack(ladders)


def wider_grid(rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of 4 to `MOST_TOKENS` visual tokens, of any shape up to about 3 to 1."""
    count = rng.uniform(4, MOST_TOKENS)
    rows = max(1, round(float(np.sqrt(count * np.exp(rng.uniform(-1, 1))))))
    return rows, max(1, min(MOST_TOKENS // rows, round(count / rows)))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run it; returns the folder written."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.widen", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained nano")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--pristine", required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--ladder-weight", type=float, default=4.0)
    parser.add_argument("--rated", type=int, default=400)
    parser.add_argument("--ladders", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    tower = FastTower(model.model.visual)
    rated = rated_tokens(tower, load_rated(options.data, options.images, "train"), options.rated, rng)
    ladders = ladder_tokens(tower, load_folder(options.pristine), options.ladders, 256, rng)
    print(f"tokens of {len(rated)} rated pictures and {len(ladders)} ladders", flush=True)

    tokenizer = build_tokenizer()
    teacher = ReadoutForward(copy.deepcopy(model), tokenizer).eval()
    student = ReadoutForward(model, tokenizer).eval()
    weights = [*model.model.language_model.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(weights, options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        own = rated[rng.choice(len(rated), 10)]
        scenes = rng.choice(len(ladders), 3)
        levels = np.sort(rng.choice(LEVELS + 1, 5, replace=False))
        if rng.random() < 0.5:  # the first steps are the smallest
            levels = np.array([0, 1, 2, 3, rng.integers(4, LEVELS + 1)])
        rungs = ladders[scenes][:, levels].flatten(0, 1)
        losses = {name: torch.zeros(()) for name in ("imitate", "ladder", "reply")}
        for tokens, is_ladder in ((own, False), (rungs, True)):
            with torch.no_grad():
                blank = student.answers(torch.full((len(tokens),), 3.0))
                wanted, _ = teacher.read(tokens, blank)
            answers = student.answers(wanted.mean + 0.3 * torch.randn(len(tokens)))
            grid = wider_grid(rng) if rng.random() < 0.7 else None
            shown = tokens
            if grid is not None:  # one draw for all rungs, so that they differ in strength alone
                shown = tokens[:, torch.randint(tokens.shape[1], (grid[0] * grid[1],)).sort().values]
            stated, reply = student.read(shown, answers, None, shape=grid)
            losses["reply"] = losses["reply"] + reply - 0.05 * stated.coverage.clamp(min=1e-6).log().mean()
            if is_ladder:
                scene = torch.arange(len(scenes)).repeat_interleave(len(levels))
                level = torch.tensor(levels, dtype=torch.float32).repeat(len(scenes))
                losses["ladder"] = ladder_loss(stated.mean, scene, level, MARGIN)
                first = torch.arange(len(scenes)) * len(levels)
                losses["imitate"] = losses["imitate"] + 0.5 * (stated.mean[first] - wanted.mean[first]).square().mean()
            else:
                log_ratio = wanted.probabilities.clamp(min=1e-9).log() - stated.probabilities.clamp(min=1e-9).log()
                divergence = (wanted.probabilities * log_ratio).sum(1).mean()
                losses["imitate"] = losses["imitate"] + divergence + 3 * (stated.mean - wanted.mean).square().mean()
        loss = losses["imitate"] + options.ladder_weight * losses["ladder"] + 0.1 * losses["reply"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            values = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {step} {(time.monotonic() - began) / step:.2f}s {values}", flush=True)
    return save_folder(model, options.output, MAX_PIXELS)


if __name__ == "__main__":
    main()
