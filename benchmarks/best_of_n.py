"""Denoiser rows, scoring and total time of best-of-n with previews against plain best-of-n, at equal final choice.

    python benchmarks/best_of_n.py --out benchmarks/results/best_of_n.csv            tiny pipeline and nano, on a CPU
    python benchmarks/best_of_n.py --sizes full --device cuda --size 1024 --steps 30 --batch-size 4 --repeats 2

For each n, each number of survivors and each strategy: what it costs, in how many of the repeats (other seeds) its
choice is the plain run's, and how much lower its choice scores on average. The rows with "equal" in the last column
are, for each n, the cheapest in denoiser rows whose choice was the plain run's in every repeat.

    python benchmarks/best_of_n.py --equal-rows --n 8 16 --repeats 20 --out benchmarks/results/best_of_n_equal_rows.csv

asks instead what the same denoiser rows buy: those of a plain best of n, spent on more candidates of which previews
drop three of four, on zero-order search, or on particles that are resampled on the way. All use the Euler ancestral
scheduler, because particles need one that draws noise. Each line is the mean over the repeats of the chosen picture's
score less that of the plain run with the same seeds, with the half-width of its 95% interval (Student's t).

Every repeat runs all settings one after the other; times are medians over the repeats, ratios medians of the ratios to
the plain run of the same repeat. On a CPU, time is the processor time of this process. ``--sizes full`` has the sizes
of SDXL and of the 7B scoring model, with random weights (benchmarks/real_sizes.py): its times mean something, its
choices do not. ``--sizes small`` is the same code in small numbers.
"""

import argparse
import csv
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.utils import logging
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from real_sizes import scoring_model, sdxl
from tiny_pipeline import tiny_stable_diffusion

from vqr1_metric import QualityScorer
from vqr1_metric.integrations.diffusers import BestOfN, BestOfNOutput


class TimedScorer:
    """A scorer that adds up how long it takes."""

    def __init__(self, scorer: QualityScorer, clock: Callable[[], float]) -> None:
        self.timed, self.clock, self.seconds = scorer, clock, 0.0

    @property
    def backend(self) -> Any:
        return self.timed.backend

    def score(self, images: Any) -> list:
        started = self.clock()
        results = self.timed.score(images)
        self.seconds += self.clock() - started
        return results


def settings(n: int, previews_at: list[float]) -> list[dict[str, Any]]:
    """The plain run first."""
    return [
        {},
        *(
            {"preview_at_ratio": preview_at, "survivors": survivors, "strategy": strategy}
            for preview_at in previews_at
            for survivors in sorted({max(1, n // 8), max(1, n // 4), n // 2})
            for strategy in ("restart", "inplace")
        ),
    ]


def timed(best: BestOfN, **options: Any) -> tuple[BestOfNOutput, float, float]:
    """What came out, seconds of scoring, seconds in all."""
    scorer = best.picture_scorer.scorer
    scorer.seconds, started = 0.0, scorer.clock()
    output = best(**options)
    return output, scorer.seconds, scorer.clock() - started


def compare(best: BestOfN, n: int, repeats: int, previews_at: list[float], common: dict[str, Any]) -> list[dict]:
    """The lines of one n."""
    runs = [
        [timed(best, n=n, seed=1000 * repeat, **common, **setting) for setting in settings(n, previews_at)]
        for repeat in range(repeats)
    ]
    lines = []
    for i, setting in enumerate(settings(n, previews_at)):
        ours, plain = [run[i] for run in runs], [run[0] for run in runs]
        output = ours[0][0]
        same = sum(a.seeds == b.seeds for (a, *_), (b, *_) in zip(ours, plain, strict=True))
        lost = [b.scores[0] - a.scores[0] for (a, *_), (b, *_) in zip(ours, plain, strict=True)]
        ratios = [a[2] / b[2] for a, b in zip(ours, plain, strict=True)]
        lines.append(
            {
                "n": n,
                "strategy": output.strategy,
                "preview_at": setting.get("preview_at_ratio", ""),
                "survivors": setting.get("survivors", n),
                "denoiser_rows": output.denoiser_rows,
                "rows_ratio": round(output.denoiser_rows / plain[0][0].denoiser_rows, 3),
                "scoring_s": round(statistics.median(run[1] for run in ours), 3),
                "total_s": round(statistics.median(run[2] for run in ours), 3),
                "time_ratio": round(statistics.median(ratios), 3),
                "same_choice": f"{same}/{repeats}",
                "score_lost": abs(round(statistics.mean(lost), 3)),
                "chosen": "",
            }
        )
    equal = [line for line in lines if line["same_choice"] == f"{repeats}/{repeats}"]
    min(equal, key=lambda line: line["denoiser_rows"])["chosen"] = "equal"
    return lines


def equal_rows(best: BestOfN, n: int, repeats: int, common: dict[str, Any]) -> list[dict]:
    """The lines of one n: what each way to spend the rows of a plain best of n gains over it."""
    steps = common["num_inference_steps"]
    before = int(0.4 * steps) + 1
    more = max(n, int(n * steps / (before + (steps - before) / 4)))
    ways: dict[str, Callable[[int], BestOfNOutput]] = {
        "plain": lambda seed: best(n=n, seed=seed, **common),
        f"pruned from {more}": lambda seed: best(
            n=more, seed=seed, preview_at_ratio=0.4, survivors=max(1, more // 4), strategy="inplace", **common
        ),
        "search": lambda seed: best.search(
            budget=2 * n * steps, n=max(2, n // 4), neighbours=max(2, n // 4), seed=seed, **common
        ),
    }
    for strength in (2.0, 10.0):
        ways[f"particles, max, strength {strength:g}"] = lambda seed, strength=strength: best.particles(
            n=n, strength=strength, seed=seed, **common
        )
    outputs = {name: [way(1000 * repeat) for repeat in range(repeats)] for name, way in ways.items()}
    plain = [out.scores[0] for out in outputs["plain"]]
    lines = []
    for name, outs in outputs.items():
        gains = [out.scores[0] - score for out, score in zip(outs, plain, strict=True)]
        spread = statistics.stdev(gains) / math.sqrt(repeats) if repeats > 1 else math.nan
        lines.append(
            {
                "n": n,
                "way": name,
                "denoiser_rows": round(statistics.mean(out.denoiser_rows for out in outs)),
                "best_score": round(statistics.mean(out.scores[0] for out in outs), 3),
                "gain": round(statistics.mean(gains), 3),
                "half_width_95": round(float(stats.t.ppf(0.975, max(1, repeats - 1))) * spread, 3),
                "repeats": repeats,
            }
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("tiny", "small", "full"), default="tiny")
    parser.add_argument("--model", default="nano", help="scoring model of --sizes tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="candidates in one call of the pipe")
    parser.add_argument("--previews-at", type=float, nargs="+", default=[0.15, 0.35])
    parser.add_argument("--equal-rows", action="store_true", help="compare strategies at the rows of a plain run")
    parser.add_argument("--out", type=Path, help="CSV file; by default standard output")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    common = {"num_inference_steps": options.steps, "height": options.size, "width": options.size}
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.sizes == "tiny":
        pipe, scorer = tiny_stable_diffusion().to(options.device), QualityScorer(options.model, device=options.device)
        common["prompt"] = "a lighthouse"
    else:
        pipe, embeddings = sdxl(options.sizes, options.device)
        scorer = QualityScorer(backend=scoring_model(options.sizes, options.device))
        common |= embeddings
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    best = BestOfN(pipe, TimedScorer(scorer, clock), batch_size=options.batch_size)
    first = best(n=1, **common)  # loads the model and warms up
    if math.isnan(first.scores[0]):
        raise RuntimeError(f"A picture got no score: {first.ranking[0].result.error}")

    if options.equal_rows:
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        lines = [line for n in options.n for line in equal_rows(best, n, options.repeats, common)]
    else:
        lines = [line for n in options.n for line in compare(best, n, options.repeats, options.previews_at, common)]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    file = options.out.open("w", encoding="utf-8", newline="") if options.out else sys.stdout
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    device = f"{os.cpu_count()} CPUs, one thread, seconds of processor time"
    device = device if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    print(f"# commit {commit}; python {' '.join(sys.argv)}", file=file)
    print(f"# {platform.machine()}, {device}; torch {torch.__version__}; scorer {scorer.backend.revision}", file=file)
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    if options.out:
        file.close()


if __name__ == "__main__":
    main()
