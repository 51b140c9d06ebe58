"""Rehearse a full-size model: what a lab runs before it downloads 16 GB, on any machine, without a network.

    python -m benchmarks.rehearse --size 7b -o folder/ [--csv benchmarks/results/rehearse.csv]

writes a checkpoint folder of the published layout with random weights and the real vocabulary (17 GB of disk at 7B;
kept and used again), then loads, scores, explains, compares, evaluates, exports a LoRA adapter, scores with it and
saves. Each step runs in a process of its own, so that its peak memory is its own. Time and memory are printed and, with
--csv, appended with machine and commit. Random weights: the scores mean nothing. Needs the package that ships Qwen's
vocabulary (pip install --no-deps dashscope) and memory for the weights (7B: 17 GB).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.rehearse.folder import GIB, SHAPES, write_folder
from benchmarks.rehearse.steps import STEPS, peak_gib
from benchmarks.speed.scoring_measure import commit, processor_name

COLUMNS = ("size", "step", "seconds", "peak_gib", "note", "cores", "machine", "commit", "date")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Write the folder, run every step, print a row for each; raises if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    tensors, size = write_folder(args.size, args.output)
    facts = {
        "size": args.size,
        "cores": os.cpu_count(),
        "machine": processor_name() if args.device == "cpu" else args.device,
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    note = f"{tensors} tensors, {size / GIB:.1f} GiB"
    rows = [facts | {"step": "write", "seconds": time.perf_counter() - start, "peak_gib": peak_gib(), "note": note}]
    report(rows[-1])
    for step in args.steps:
        command = [sys.executable, "-m", "benchmarks.rehearse.steps", step, str(args.output), args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(f"{step} failed:\n{done.stderr[-3000:]}")
        rows.append(facts | json.loads(done.stdout.splitlines()[-1]))
        report(rows[-1])
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            for row in rows:
                writer.writerow(row | {name: f"{row[name]:.2f}" for name in ("seconds", "peak_gib")})
    return rows


def report(row: dict[str, Any]) -> None:
    print(f"{row['step']:<22} {row['seconds']:8.1f} s {row['peak_gib']:7.2f} GiB   {row['note']}", flush=True)


if __name__ == "__main__":
    main()
