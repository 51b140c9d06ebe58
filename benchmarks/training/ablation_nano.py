"""One factor of RL2R at a time, with a language model: nano from a weak start, through the library's own trainers.

    python -m benchmarks.training.ablation_nano --rated labels.csv --images DIR --pristine DIR --work DIR \\
        --cold-start-steps 40 -o benchmarks/results/train_ablation_nano.csv

`train_ablation.py` asks the same of a linear policy, with many seeds. Here replies are sampled token by token by
`RankerTrainer` (`ExactRankerTrainer` for "exact"), from the start model, the two data sets and the pictures of 128x128
that `train_setup.py` describes. Every run has the same number of steps of 16 pictures, so that K = 2 sees a third of
the replies of K = 6. There is no KL penalty, and the vision tower rests, so that its tokens are kept from step to step.

Each row is the end of one run, the first the start model, on the held-out pictures, a mean of both sets. `srcc` is that
of the means of the score distributions (what a scorer reads), `srcc_reply` that of one sampled reply for each picture
(mean of 50 draws from the readout), `fidelity` the exact expected fidelity reward of a reply when all pictures of a set
are compared. Runs that are in the file already are not repeated. `--summary` prints means, and the mean difference from
the base run with the same seed with its 95% interval.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.training.setup import append, arguments, make_sets, provenance, settings, start_model
from vqr1_metric.backends.loading import LoadedModel, ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import load_image
from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.exact import labels, score_rewards
from vqr1_metric.train_ranker.run import build_trainer, prepare_data
from vqr1_metric.train_ranker.validation import correlations

VARIANTS = {
    "base": {},
    "exact": {"objective": "exact"},
    "binary reward": {"rule": "binary"},
    "fixed variance": {"variance": "fixed"},
    "K = 2": {"num_generations": 2},
    "K = 4": {"num_generations": 4},
    "comparison sets of 4": {"images_per_comparison": 4},
}
FIGURES = ("srcc", "srcc_reply", "fidelity")
PARTS = ("probabilities", "coverage", "tag_probability")
DRAWS = 50
BATCH = 24


def keep_tokens(visual: torch.nn.Module, kept: dict[bytes, Tensor]) -> None:
    """Let a resting vision tower see each picture once; its tokens are kept in ``kept`` under a hash of the patches."""
    own = visual.forward

    def forward(hidden_states: Tensor, grid_thw: Tensor, **_) -> BaseModelOutputWithPooling:
        tokens = []
        for patches, grid in zip(hidden_states.split(grid_thw.prod(-1).tolist()), grid_thw, strict=True):
            key = hashlib.blake2b(patches.numpy().tobytes() + bytes(grid.tolist())).digest()
            if key not in kept:
                with torch.no_grad():
                    kept[key] = own(patches, grid_thw=grid[None]).pooler_output
            tokens.append(kept[key])
        return BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=torch.cat(tokens))

    visual.forward = forward


@cache
def image(file: bytes) -> Tensor:
    """A held-out picture, decoded once."""
    return load_image(file)


@torch.no_grad()
def figures(loaded: LoadedModel, sets: Sequence[RatingSet]) -> dict[str, float]:
    """What a model is worth on held-out pictures, see above."""
    loaded.model.eval()
    backend = TransformersBackend(ModelSpec("in training"), loaded)
    found: dict[str, list[float]] = {}
    for s in sets:
        images = [image(picture.read()) for picture in s.images]
        batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
        parts = [backend.distributions(batch, loaded.pixel_config) for batch in batches]
        distribution = ScoreDistribution(*(torch.cat([getattr(part, name) for part in parts]) for name in PARTS))
        quality = torch.tensor(s.quality, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        index = torch.multinomial(distribution.probabilities, DRAWS, replacement=True, generator=generator)
        replies = distribution.grid[index].double()
        rows = [{"quality": value, "share": None} for value in s.quality]
        label = labels(rows, len(rows))
        reward = torch.cat(
            [
                score_rewards(one, distribution.mean, distribution.variance, label[at : at + BATCH], 1e-6, 1e-6)
                for at, one in pieces(distribution)
            ]
        )
        for name, value in {
            "srcc": correlations(distribution.mean.double(), quality)[0],
            "srcc_reply": float(np.mean([correlations(replies[:, i], quality)[0] for i in range(DRAWS)])),
            "fidelity": float((distribution.probabilities * reward).sum(1).mean()),
            "readable": float((distribution.coverage * distribution.tag_probability).mean()),
            "spread": float(distribution.mean.std()),
            "score_std": float(distribution.std.mean()),
        }.items():
            found.setdefault(name, []).append(value)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def pieces(distribution: ScoreDistribution) -> Iterator[tuple[int, ScoreDistribution]]:
    """Some pictures at a time: a reward table has 401 scores x all partners for each."""
    for at in range(0, len(distribution.probabilities), BATCH):
        yield at, ScoreDistribution(*(getattr(distribution, name)[at : at + BATCH] for name in PARTS))


def run(options, data: list[str], start: Path, variant: str, seed: int, kept: dict[bytes, Tensor]) -> dict:
    """One training run; its row."""
    output = options.work / f"ablation_{variant.replace(' ', '_')}_seed{seed}"
    shutil.rmtree(output, ignore_errors=True)
    base = {
        "objective": "sampled",
        "num_generations": 6,
        "micro_batch": 96,
        "max_new_tokens": 16,
        "learning_rate": options.rate,
        "lr_scheduler": "linear",
        "max_steps": options.steps,
        "trainer": {"save_strategy": "no", "disable_tqdm": True},
    }
    config = settings(options, data, str(start), seed, output, **{**base, **VARIANTS.get(variant, {})})
    training, held_out = prepare_data(config, open_pictures=False)
    trainer = build_trainer(config, training, [])
    keep_tokens(trainer.loaded.model.model.visual, kept)
    began = time.process_time()
    if variant != "start":
        trainer.train()
    row = {"variant": variant, "seed": seed, "steps": options.steps, "cpu_seconds": round(time.process_time() - began)}
    return {**row, **figures(trainer.loaded, held_out)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--summary", action="store_true", help="only read the CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.summary:
        data = make_sets(options)
        start = start_model(options, data)
        done = {(row["variant"], int(row["seed"])) for row in rows_of(options.output)}
        kept: dict[bytes, Tensor] = {}
        runs = [("start", 0), *((variant, seed) for seed in options.seeds for variant in options.variants)]
        for variant, seed in runs:
            if (variant, seed) not in done:
                row = run(options, data, start, variant, seed, kept)
                print(row, flush=True)
                append(options.output, {**row, **provenance()})
    print(summary(rows_of(options.output)))


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if it is not there."""
    if not table.is_file():
        return []
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


def summary(rows: list[dict[str, str]]) -> str:
    """A Markdown table: means over seeds, paired differences from base with 95% intervals (Student's t)."""
    from scipy.stats import t as student

    by_variant: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        values = np.array([float(row[name]) for name in FIGURES])
        by_variant.setdefault(row["variant"], {})[row["seed"]] = values
    base = by_variant.get("base", {})
    lines = [f"| variant | {' | '.join(f'{n} | against base' for n in FIGURES)} | seeds |"]
    lines.append("|---" * (2 * len(FIGURES) + 2) + "|")
    for name, found in by_variant.items():
        mean = np.mean(list(found.values()), axis=0)
        cells = [f"{value:.3f} | " for value in mean]
        both = [seed for seed in found if seed in base]
        if name not in ("start", "base") and len(both) > 1:
            difference = np.array([found[seed] - base[seed] for seed in both])
            half = student.ppf(0.975, len(both) - 1) * difference.std(0, ddof=1) / len(both) ** 0.5
            cells = [
                f"{value:.3f} | {d:+.3f} ± {h:.3f}" for value, d, h in zip(mean, difference.mean(0), half, strict=True)
            ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
