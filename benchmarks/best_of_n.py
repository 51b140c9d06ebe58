"""Denoiser rows, scoring and total time of best-of-n with previews against plain best-of-n, at equal final choice.

    python benchmarks/best_of_n.py [--model nano] [--n 8 16 32] [--repeats 5] [--out benchmarks/results/best_of_n.csv]

For each n, each number of survivors and each strategy: what it costs, in how many of the repeats (other seeds) its
choice is the plain run's, and how much lower its choice scores on average. The rows with "equal" in the last column
are, for each n, the cheapest in denoiser rows whose choice was the plain run's in every repeat. The pipeline is the
tiny random one of examples/; times are of a CPU, rows hold for any pipeline with guidance.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_pipeline import tiny_stable_diffusion

from vqr1_metric import QualityScorer
from vqr1_metric.integrations.diffusers import BestOfN

FIELDS = ["n", "strategy", "preview_at", "survivors", "denoiser_rows", "scoring_s", "total_s", "same_choice"]
FIELDS += ["score_lost", "chosen"]


def measure(best: BestOfN, plain: list, n: int, options: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: means over the repeats."""
    outputs = [best("a lighthouse", n=n, seed=1000 * i, **options) for i in range(len(plain))]
    same = [a.seeds == b.seeds for a, b in zip(outputs, plain, strict=True)]
    lost = [b.scores[0] - a.scores[0] for a, b in zip(outputs, plain, strict=True)]
    return {
        "n": n,
        "strategy": outputs[0].strategy,
        "preview_at": options.get("preview_at_ratio", ""),
        "survivors": options.get("survivors", n),
        "denoiser_rows": outputs[0].denoiser_rows,
        "scoring_s": round(sum(o.scoring_seconds for o in outputs) / len(outputs), 3),
        "total_s": round(sum(o.total_seconds for o in outputs) / len(outputs), 3),
        "same_choice": f"{sum(same)}/{len(same)}",
        "score_lost": round(sum(lost) / len(lost), 4),
        "chosen": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--previews-at", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--out", type=Path, help="CSV file; by default standard output")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    best = BestOfN(tiny_stable_diffusion(), QualityScorer(options.model, device="cpu"), batch_size=8)
    common = {"num_inference_steps": options.steps, "height": options.size, "width": options.size}
    best("a lighthouse", n=1, **common)  # loads the model

    lines = []
    for n in options.n:
        plain = [best("a lighthouse", n=n, seed=1000 * i, **common) for i in range(options.repeats)]
        block = [measure(best, plain, n, common)]
        for preview_at in options.previews_at:
            for survivors in (max(1, n // 8), n // 4, n // 2):
                for strategy in ("restart", "inplace"):
                    steer = {"preview_at_ratio": preview_at, "survivors": survivors, "strategy": strategy}
                    block.append(measure(best, plain, n, common | steer))
        equal = [line for line in block if line["same_choice"] == f"{options.repeats}/{options.repeats}"]
        min(equal, key=lambda line: line["denoiser_rows"])["chosen"] = "equal"
        lines += block

    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    file = options.out.open("w", encoding="utf-8", newline="") if options.out else sys.stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(f"# commit {commit.strip() or 'unknown'}; python {' '.join(sys.argv)}", file=file)
    print(f"# {platform.machine()}, {os.cpu_count()} CPUs, one thread; torch {torch.__version__}", file=file)
    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    writer.writerows(lines)
    if options.out:
        file.close()


if __name__ == "__main__":
    main()
