"""How often are verdicts and intervals wrong? Simulations of `vqr1 diff` and of the intervals, as a table.

    python -m benchmarks.verdicts                    # prints the tables, a few minutes on one core
    python -m benchmarks.verdicts --runs 4000 --write docs/evaluation.md

Gaps without a true difference: how often is one method called better? Gaps with one: how often is it found, against
Student's t test, which is the best there is for normal gaps? And how often does an interval hold what it is about?
With --write the tables replace those between the marks `<!-- verdicts -->` of a page.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from vqr1_metric.evaluation.agreement import agreement
from vqr1_metric.evaluation.paired import compare_paired
from vqr1_metric.functional.intervals import mean_interval

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]

#: Gaps of mean 0 and standard deviation 1, but for the heavy tail, which has none.
SHAPES: dict[str, Draw] = {
    "normal": lambda random, n: random.standard_normal(n),
    "uniform": lambda random, n: random.uniform(-math.sqrt(3), math.sqrt(3), n),
    "skewed (exponential)": lambda random, n: random.exponential(1, n) - 1,
    "very skewed (lognormal)": lambda random, n: (random.lognormal(0, 1, n) - math.exp(0.5)) / 2.161,
    "heavy tail (t, 2 d.f.)": lambda random, n: random.standard_t(2, n),
    "half of them ties": lambda random, n: random.standard_normal(n) * math.sqrt(2) * (random.random(n) < 0.5),
}
SIZES = (2, 3, 5, 6, 8, 10, 14, 20, 50, 100, 200)
MARK = "<!-- verdicts -->"


def grouped(random: np.random.Generator, groups: int) -> tuple[Array, list[str]]:
    """Clips of 2 to 30 frames whose gaps are alike: the spread between clips is as large as that within."""
    sizes = random.integers(2, 31, groups)
    clip = np.repeat(np.arange(groups), sizes)
    return random.standard_normal(groups)[clip] + random.standard_normal(len(clip)), [str(i) for i in clip]


def verdict(gaps: Array, groups: Sequence[str] | None = None) -> str:
    """What `vqr1 diff` would say."""
    return compare_paired(np.zeros(len(gaps)), gaps, groups=groups).verdict


def false_verdicts(runs: int, seed: int) -> list[list[str]]:
    """Share of runs without a difference that have a winner, in percent."""
    lines = [["scenes or groups", *map(str, SIZES)]]
    for name, draw in SHAPES.items():
        random = np.random.default_rng(seed)
        cells = [np.mean([verdict(draw(random, n)) != "open" for _ in range(runs)]) for n in SIZES]
        lines.append([name, *(f"{100 * cell:.1f}" for cell in cells)])
    random = np.random.default_rng(seed)
    cells = [np.mean([verdict(*grouped(random, n)) != "open" for _ in range(runs)]) for n in SIZES]
    return [*lines, ["normal, clips as groups", *(f"{100 * cell:.1f}" for cell in cells)]]


def power(runs: int, seed: int) -> list[list[str]]:
    """Share of runs with a true difference that find it, in percent, as `verdict / t test`."""
    sizes = [n for n in SIZES if 5 <= n <= 100]
    lines = [["true difference", *map(str, sizes)]]
    for effect in (0.3, 0.5, 1.0, 2.0):
        random = np.random.default_rng(seed)
        cells = []
        for n in sizes:
            gaps = [draw + effect for draw in random.standard_normal((runs, n))]
            ours = np.mean([verdict(row) == "after" for row in gaps])
            t = np.mean([stats.ttest_1samp(row, 0).pvalue < 0.05 for row in gaps])
            cells.append(f"{100 * ours:.0f} / {100 * t:.0f}")
        lines.append([f"{effect:g} standard deviations", *cells])
    return lines


def coverage(runs: int, seed: int) -> list[list[str]]:
    """Share of 95% intervals of a mean that hold it, in percent."""
    sizes = [n for n in SIZES if n != 6]
    lines = [["values", *map(str, sizes)]]
    for name, draw in SHAPES.items():
        random = np.random.default_rng(seed)
        cells = []
        for n in sizes:
            ends = (mean_interval(torch.from_numpy(draw(random, n))) for _ in range(runs))
            cells.append(f"{100 * np.mean([float(low) <= 0 <= float(high) for low, high in ends]):.1f}")
        lines.append([name, *cells])
    return lines


def correlations(runs: int, seed: int) -> list[list[str]]:
    """Share of 95% intervals of SRCC that hold it, in percent, for pictures and for scenes of 2 to 9 versions."""
    sizes = (5, 8, 10, 14, 20, 50, 100)
    lines = [["pictures or scenes", *map(str, sizes)]]
    for rho in (0.3, 0.7, 0.9):
        truth = 6 / math.pi * math.asin(rho / 2)
        for kind in ("pictures", "scenes"):
            random = np.random.default_rng(seed)
            cells = []
            for n in sizes:
                held = [_holds(random, n, rho, kind == "scenes", truth) for _ in range(runs)]
                cells.append(f"{100 * np.mean(held):.1f}")
            lines.append([f"{kind}, SRCC {truth:.2f}", *cells])
    return lines


def _holds(random: np.random.Generator, n: int, rho: float, scenes: bool, truth: float) -> bool:
    sizes = random.integers(2, 10, n) if scenes else np.ones(n, int)
    scene = np.repeat(np.arange(n), sizes)

    def variable() -> Array:
        shared = math.sqrt(0.5) if scenes else 0.0
        return shared * random.standard_normal(n)[scene] + math.sqrt(1 - shared**2) * random.standard_normal(len(scene))

    x = variable()
    y = rho * x + math.sqrt(1 - rho**2) * variable()
    names = [str(i) for i in scene] if scenes else None
    low, high = agreement(x, y, names, resamples=200, only=("srcc",)).intervals["srcc"]
    return low <= truth <= high


def table(lines: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    head, *body = lines
    rows = [head, [":--", *("--:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    """Print the tables, and write them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="simulations for each cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this page")
    args = parser.parse_args()
    noise = 196 * math.sqrt(0.05 * 0.95 / args.runs)
    parts = [f"{args.runs} simulations a cell, seed {args.seed}; noise ±{noise:.1f}.\n"]
    for title, make, runs in (
        ("False verdicts in percent (at most 5 is wanted; below 6 no test could tell):", false_verdicts, args.runs),
        ("True differences of normal gaps found in percent, `vqr1 diff` / t test:", power, args.runs),
        ("95% intervals of a mean that hold it, in percent:", coverage, args.runs),
        (
            "95% intervals of SRCC that hold it, in percent (a quarter of the simulations):",
            correlations,
            args.runs // 4,
        ),
    ):
        parts += [title + "\n", table(make(runs, args.seed))]
        print("\n".join(parts[-2:]), flush=True)
    if args.write is not None:
        before, _, after = args.write.read_text(encoding="utf-8").split(MARK)
        args.write.write_text(f"{before}{MARK}\n{chr(10).join(parts)}{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
