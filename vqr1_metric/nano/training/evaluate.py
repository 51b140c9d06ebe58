"""Measure a nano: agreement with opinions on a held-out split, and falling scores on ladders of synthetic distortions.

python -m vqr1_metric.nano.training.evaluate --model vqr1_metric/nano --data labels.csv --images DIR --kodak DIR
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqr1_metric.distortions import DISTORTIONS, LEVELS, ladder
from vqr1_metric.scorer import QualityScorer

from .data import load_folder, load_rated


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties averaged."""
    _unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def correlations(predicted: Sequence[float], target: Sequence[float]) -> tuple[float, float]:
    """Spearman's and Pearson's (raw, no fitted map) correlation of two sequences."""
    x, y = np.asarray(predicted, float), np.asarray(target, float)
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1]), float(np.corrcoef(x, y)[0, 1])


def evaluate_rated(
    scorer: QualityScorer, labels: str | Path, images: str | Path, split: str = "val"
) -> dict[str, float]:
    """SRCC, PLCC and spread on the rated pictures of one split."""
    rated = load_rated(labels, images, split)
    began = time.monotonic()
    results = scorer.score([Image.fromarray(picture) for picture in rated.pictures])
    seconds = time.monotonic() - began
    means = np.array([result.score for result in results])
    srcc, plcc = correlations(means, rated.scores)
    return {
        "pictures": len(means),
        "srcc": srcc,
        "plcc": plcc,
        "mean_absolute_error": float(np.abs(means - rated.scores).mean()),
        "spread": float(means.std()),
        "std": float(np.mean([result.std for result in results])),
        "coverage": float(np.mean([float(result.distribution.coverage) for result in results])),
        "tag_probability": float(np.mean([float(result.distribution.tag_probability) for result in results])),
        "seconds": seconds,
    }


def evaluate_ladders(scorer: QualityScorer, pictures: Sequence[Image.Image], seed: int = 0) -> dict[str, dict]:
    """For each distortion: mean score at level 0 to 8, whether it falls strictly, and violations picture by picture.

    A violation is a step, out of pictures x 8, at which a picture's own score does not fall.
    """
    table = {}
    for name in DISTORTIONS:
        rungs = [rung for picture in pictures for rung in ladder(picture, name, seed)]
        scores = np.array([result.score for result in scorer.score(rungs)]).reshape(len(pictures), LEVELS + 1)
        steps = np.diff(scores, axis=1)
        means = scores.mean(0)
        table[name] = {
            "means": [round(float(mean), 4) for mean in means],
            "falls_strictly": bool((np.diff(means) < 0).all()),
            "violations": int((steps >= 0).sum()),
            "violations_per_picture": round(float((steps >= 0).sum(1).mean()), 3),
            "steps": steps.size,
        }
    return table


def _print_ladders(table: dict[str, dict]) -> None:
    print(f"{'distortion':<14}" + "".join(f"{level:>6}" for level in range(LEVELS + 1)) + "  strict  violations")
    for name, row in table.items():
        means = "".join(f"{mean:6.2f}" for mean in row["means"])
        verdict = "yes" if row["falls_strictly"] else "NO"
        print(f"{name:<14}{means}  {verdict:<6}  {row['violations']} of {row['steps']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description="SRCC/PLCC of a nano on held-out opinions, and its distortion ladders."
    )
    parser.add_argument("--model", required=True, help="model folder, or nano for the embedded one")
    parser.add_argument("--data", help="labels: image, split, mos")
    parser.add_argument("--images", help="folder of the rated pictures")
    parser.add_argument("--split", default="val")
    parser.add_argument("--kodak", help="folder of pristine pictures for the ladders")
    parser.add_argument("--pictures", type=int, help="use only so many pristine pictures")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if bool(options.data) != bool(options.images) or not (options.data or options.kodak):
        parser.error("Expected --data with --images, --kodak, or all three.")
    torch.set_num_threads(options.threads)
    scorer, figures = QualityScorer(options.model), {}
    if options.data:
        figures["rated"] = evaluate_rated(scorer, options.data, options.images, options.split)
        print("  ".join(f"{name} {value:.4g}" for name, value in figures["rated"].items()))
    if options.kodak:
        figures["ladders"] = evaluate_ladders(scorer, load_folder(options.kodak)[: options.pictures])
        _print_ladders(figures["ladders"])
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
