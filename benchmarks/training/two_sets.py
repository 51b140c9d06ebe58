"""From a warm start to a ranker on two data sets with unlike scales: SRCC on held-out pictures against steps.

    python -m benchmarks.training.two_sets --rated labels.csv --images DIR --pristine DIR --work DIR --seeds 0 1 2 \\
        --cold-start-steps 40 --learning-rate 3e-4 --steps 60 --eval-steps 15 \\
        -o benchmarks/results/train_two_sets.csv --plot benchmarks/results/train_two_sets.png

Exact RL2R (`vqr1 train --preset nano`) on both sets at once, as `train_setup.py` describes them. Pictures are compared
within their set alone, so that scores of 0 to 1 and of 0 to 100 are never put on one scale.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.training.setup import append, arguments, log_of, make_sets, provenance, settings, start_model
from vqr1_metric.train_ranker.run import train

SETS = ("opinions", "distortions")
#: Of the SRCC shown in a panel.
HALF_RANGE = 0.06


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--eval-steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plot", type=Path, help="PNG file of the curves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = make_sets(options)
    start = start_model(options, data)
    for seed in options.seeds:
        output = options.work / f"two_sets_seed{seed}"
        config = settings(options, data, str(start), seed, output)
        rate = {"learning_rate": options.learning_rate, "lr_scheduler": "linear"}
        train(replace(config, max_steps=options.steps, eval_steps=options.eval_steps, **rate))
        for entry in log_of(output):
            if "eval_srcc" in entry:
                figures = {f"srcc_{name}": round(entry[f"eval_srcc_{name}"], 4) for name in SETS}
                row = {"seed": seed, "step": entry["step"], **figures, "spread": round(entry["eval_spread"], 4)}
                append(options.output, {**row, **provenance()})
    if options.plot:
        plot(options.output, options.plot)


def plot(table: Path, file: Path) -> None:
    """One panel for each set, both of the same scale: mean and range over the seeds, a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    seeds = len({row["seed"] for row in rows})
    steps = sorted({int(row["step"]) for row in rows})
    titles = {"opinions": "rated photographs (scores 0 to 1)", "distortions": "synthetic distortions (scores 0 to 100)"}
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.1), dpi=110)
    for axis, (name, title), colour in zip(axes, titles.items(), ("#1f5fa8", "#c2571a"), strict=True):
        found = [[float(r[f"srcc_{name}"]) for r in rows if int(r["step"]) == step] for step in steps]
        low, high = (np.array([pick(values) for values in found]) for pick in (min, max))
        mean = np.array([np.mean(values) for values in found])
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0, label="lowest to highest")
        axis.plot(steps, mean, color=colour, lw=1.6, marker="o", ms=3, label=f"mean of {seeds} seeds")
        middle = (low.min() + high.max()) / 2
        axis.set(xlabel="steps of 16 pictures", ylabel="SRCC, held-out pictures", xticks=steps)
        axis.set(ylim=(middle - HALF_RANGE, middle + HALF_RANGE))
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
