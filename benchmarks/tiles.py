"""Tiles against whole images: agreement within a scene, time and memory.

    python -m benchmarks.tiles --data sr4kiqa/ --tiles 512

The folder holds ``labels.csv`` with the columns image, scene and mos. For each scene with at least 5 images the rank
correlation of scores and ratings is taken; what is printed is its mean over scenes, with the 95% interval of 2000
resamples of scenes, and the mean difference to whole images, scene by scene. Whole and tiled scores of an image are
timed one after the other. Peaks of memory are those of a process of its own for each way (``--memory``).
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from vqr1_metric import QualityScorer
from vqr1_metric.images import load_image
from vqr1_metric.parts import TiledScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--memory", choices=("whole", "tiles"), help="print the peak of this way alone, for one image")
    parser.add_argument("--size", type=int, nargs=2, default=(2160, 3840), help="of the image for --memory")
    args = parser.parse_args()
    scorer = QualityScorer(args.model)
    tiled = TiledScorer(scorer, args.tiles)
    if args.memory:
        image = np.random.default_rng(0).integers(0, 256, (*args.size, 3), dtype=np.uint8)
        list((tiled if args.memory == "tiles" else scorer).stream([image]))
        print(json.dumps({"way": args.memory, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return
    rows = list(csv.DictReader((args.data / "labels.csv").open()))[: args.limit]
    scenes: dict[str, list[dict[str, float]]] = defaultdict(list)
    seconds = {"whole": 0.0, "tiles": 0.0}
    for row in rows:
        pixels = load_image(args.data / row["image"])
        begun = time.process_time()
        (whole,) = scorer.score(pixels)
        between = time.process_time()
        parts = tiled.score(row["image"], pixels)
        seconds["whole"] += between - begun
        seconds["tiles"] += time.process_time() - between
        worst = parts.worst
        scores = {
            "whole": whole.score,
            "mixture": parts.score,
            "worst": np.nan if worst is None else worst.result.score,
        }
        scenes[row["scene"]].append({"mos": float(row["mos"]), **scores})
    found = [group for group in scenes.values() if len(group) >= 5]
    ways = ("whole", "mixture", "worst")
    table = np.array([[spearmanr([r["mos"] for r in g], [r[way] for r in g])[0] for way in ways] for g in found])
    draws = np.random.default_rng(0).integers(0, len(table), (2000, len(table)))
    for i, way in enumerate(ways):
        low, high = np.percentile(table[draws, i].mean(1), [2.5, 97.5])
        gap = table[:, i] - table[:, 0]
        near, far = np.percentile(gap[draws].mean(1), [2.5, 97.5])
        print(
            f"{way:8} SRCC within a scene {table[:, i].mean():.3f} [{low:.3f}, {high:.3f}], "
            f"against whole {gap.mean():+.3f} [{near:+.3f}, {far:+.3f}]"
        )
    ratio = seconds["tiles"] / seconds["whole"]
    print(f"{len(rows)} images, {len(found)} scenes; processor time of tiles / whole: {ratio:.2f}")
    for way in ("whole", "tiles"):
        command = [sys.executable, "-m", "benchmarks.tiles", "--data", str(args.data), "--model", args.model]
        subprocess.run([*command, "--tiles", str(args.tiles), "--memory", way], check=True)


if __name__ == "__main__":
    main()
