"""From a warm start to a ranker on two data sets with unlike scales: SRCC on held-out pictures against steps.

    python benchmarks/train_two_sets.py --rated labels.csv --images DIR --pristine DIR --work DIR \\
        -o benchmarks/results/train_two_sets.csv --plot benchmarks/results/train_two_sets.png

Exact RL2R (`vqr1 train --preset nano`) on both sets at once, as `train_setup.py` describes them. Pictures are compared
within their set alone, so that scores of 0 to 1 and of 0 to 100 are never put on one scale.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch
from train_setup import append, arguments, log_of, make_sets, provenance, settings, start_model

from vqr1_metric.train_ranker.run import train

SETS = ("opinions", "distortions")


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
    """Curves of both sets, a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = {"opinions": "rated photographs (scores 0 to 1)", "distortions": "synthetic distortions (scores 0 to 100)"}
    figure, axes = plt.subplots(figsize=(5.2, 2.9), dpi=110)
    for (name, label), colour in zip(names.items(), ("#1f5fa8", "#c2571a"), strict=True):
        for i, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
            points = [(int(r["step"]), float(r[f"srcc_{name}"])) for r in rows if r["seed"] == seed]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker="o", ms=3, label=None if i else label)
    axes.set(xlabel="steps of 16 pictures", ylabel="SRCC, held-out pictures", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
