"""One factor of RL2R at a time: reward rule, variance, K, comparison set, sampled or exact; many seeds.

    python -m benchmarks.training.ablation --rated labels.csv --images DIR --pristine DIR --work DIR \\
        -o benchmarks/results/train_ablation.csv

The paper's ablation takes days of 16 GPUs. Here the policy is as small as one can be that has a score distribution for
each picture: a linear softmax over the 401 scores, on the mean and the spread of nano's visual tokens (nothing of the
tower is trained). Rewards, advantages and the exact objective are the library's own. Both data sets of `train_setup.py`
are trained on at once, in batches of 16 pictures of one set. What differs from a language model: the score is one
choice in place of ten tokens, there is no format to keep and nothing is shared between reasoning and score.

Each row is one run: SRCC on held-out pictures, averaged over both sets, after a tenth of the steps and at the end.
`--summary` prints means, and the mean difference from the base run with the same seed with its 95% interval.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.setup import append, arguments, make_sets, provenance
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.pixels import to_patches
from vqr1_metric.functional.distribution import GRID_SIZE, ScoreDistribution, score_grid
from vqr1_metric.functional.reward import ranking_reward
from vqr1_metric.images import load_image
from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.data import read_data, split_validation
from vqr1_metric.train_ranker.exact import ADVANTAGE_EPSILON, expected_loss, labels, score_rewards
from vqr1_metric.train_ranker.validation import correlations

BASE = {"objective": "sampled", "rule": "fidelity", "variance": "estimated", "k": 6, "comparison": 16}
VARIANTS = {
    "base": {},
    "binary reward": {"rule": "binary"},
    "averaged probabilities": {"rule": "averaged"},
    "fixed variance": {"variance": "fixed"},
    "K = 2": {"k": 2},
    "K = 4": {"k": 4},
    "K = 12": {"k": 12},
    "comparison sets of 4": {"comparison": 4},
    "exact": {"objective": "exact"},
    "direct gradient of the fidelity": {"objective": "fidelity"},
}
BATCH = 16
START_STD = 0.8
"""Spread of the start policy's scores, about 3 for every picture."""


@torch.no_grad()
def features(visual: torch.nn.Module, pixel_config, s: RatingSet) -> Tensor:
    """Mean and standard deviation of the visual tokens of each picture, ``(N, 2 D)``."""
    found = []
    for picture in s.images:
        patches, grid = to_patches(load_image(picture.read()), pixel_config)
        tokens = visual(patches, grid_thw=torch.tensor([grid])).pooler_output
        found.append(torch.cat([tokens.mean(0), tokens.std(0)]))
    return torch.stack(found)


class Policy(torch.nn.Module):
    """A linear softmax over the scores; before any training every picture gets the same bell-shaped distribution."""

    def __init__(self, inputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.002 * torch.randn(GRID_SIZE, inputs, generator=generator))
        self.bias = torch.nn.Parameter(-0.5 * ((score_grid() - 3) / START_STD) ** 2)

    def forward(self, x: Tensor) -> ScoreDistribution:
        ones = x.new_ones(len(x))
        return ScoreDistribution((x @ self.weight.T + self.bias).softmax(-1), ones, ones)


def loss_of(distribution: ScoreDistribution, rows: list[dict], variant: dict, generator: torch.Generator) -> Tensor:
    """The loss of one batch: of K sampled scores, or of all scores."""
    label = labels(rows, variant["comparison"])
    if variant["objective"] != "sampled":
        rewards = score_rewards(distribution, distribution.mean, distribution.variance, label, 1e-6, 1e-6)
        through = variant["objective"] == "fidelity"
        outcome = torch.cat([distribution.probabilities, distribution.probabilities.new_zeros(len(rows), 1)], dim=1)
        return expected_loss(outcome, rewards, 0.0, through_rewards=through).mean()
    index = torch.multinomial(distribution.probabilities.detach(), variant["k"], replacement=True, generator=generator)
    scores = distribution.grid[index].double()
    quality = torch.tensor([row["quality"] for row in rows], dtype=torch.float64)
    reward = ranking_reward(
        scores,
        quality,
        variance=variant["variance"],
        rule=variant["rule"],
        group_B=torch.arange(len(rows)) // variant["comparison"],
    ).float()
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + ADVANTAGE_EPSILON)
    return -(advantage * distribution.probabilities.gather(1, index).log()).mean()


def run(sets: list[tuple], variant: dict, seed: int, steps: int, rate: float) -> tuple[float, float]:
    """Held-out SRCC, mean over the sets, after a tenth of the steps and at the end."""
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(sets[0][0].shape[1], generator)
    optimizer = torch.optim.Adam(policy.parameters(), rate)
    early = 0.0
    for step in range(1, steps + 1):
        x, quality, *_ = sets[int(torch.randint(len(sets), (), generator=generator))]
        chosen = torch.randperm(len(x), generator=generator)[:BATCH]
        rows = [{"quality": float(quality[i]), "share": None} for i in chosen]
        loss = loss_of(policy(x[chosen]), rows, variant, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step == steps // 10:
            early = validate(policy, sets)
    return early, validate(policy, sets)


@torch.no_grad()
def validate(policy: Policy, sets: list[tuple]) -> float:
    """Mean SRCC on the held-out pictures of all sets."""
    return float(np.mean([correlations(policy(x).mean.double(), quality)[0] for *_, x, quality in sets]))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--summary", action="store_true", help="only read the CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.summary:
        loaded = load_model(ModelSpec("nano", device="cpu"))
        sets = []
        for s in read_data(make_sets(options)):
            parts = split_validation(s, 0.0)
            train, val = (features(loaded.model.model.visual, loaded.pixel_config, part) for part in parts)
            mean, std = train.mean(0), train.std(0) + 1e-6
            quality = [torch.tensor(part.quality, dtype=torch.float64) for part in parts]
            sets.append(((train - mean) / std, quality[0], (val - mean) / std, quality[1]))
        for seed in range(options.seeds):
            for name in options.variants:
                early, late = run(sets, {**BASE, **VARIANTS[name]}, seed, options.steps, options.rate)
                row = {"variant": name, "seed": seed, "srcc_tenth": round(early, 4), "srcc_end": round(late, 4)}
                append(options.output, {**row, "steps": options.steps, **provenance()})
    print(summary(options.output))


def summary(table: Path) -> str:
    """A Markdown table: means over seeds, paired differences from the base run with 95% intervals (Student's t)."""
    from scipy.stats import t as student

    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = ["| variant | SRCC, a tenth of the steps | at the end | at the end, against base |", "|---|---|---|---|"]
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = float(row["srcc_tenth"]), float(row["srcc_end"])
    base = by_variant["base"]
    for name, found in by_variant.items():
        early, late = np.array(list(found.values())).T
        difference = np.array([found[seed][1] - base[seed][1] for seed in found])
        half = student.ppf(0.975, len(found) - 1) * difference.std(ddof=1) / len(found) ** 0.5
        against = "" if name == "base" else f"{difference.mean():+.3f} ± {half:.3f}"
        lines.append(f"| {name} | {early.mean():.3f} | {late.mean():.3f} | {against} |")
    return "\n".join([*lines, f"\n{len(base)} seeds."])


if __name__ == "__main__":
    main()
