"""Does `risk` keep an optimiser from fooling its judge? `python -m benchmarks.risk IMAGES --judge FOLDER`.

Gradient ascent on the pixels of photographs, against nano: the objective is mean - risk * std of its distribution.
Each result is then scored by a judge that was not optimised (another training run, from another start), and its
distance from the photograph is the PSNR. Prints means over the images and the 95% interval of the judge's gain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vqr1_metric.images import load_image
from vqr1_metric.scorer import QualityScorer


def ascend(scorer: QualityScorer, image: Tensor, risk: float, steps: int, rate: float) -> Tensor:
    """The image after ``steps`` of Adam on its pixels, as 8 bits."""
    pixels = image.clone().requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        distribution = scorer.distributions(pixels, differentiable=True)
        (risk * distribution.std - distribution.mean).sum().backward()
        optimiser.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return (pixels.detach() * 255).round().to(torch.uint8)


def main() -> None:
    """Run all risks over all images and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder of photographs")
    parser.add_argument("--judge", required=True, help="a model that was not optimised")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="of the square cut from each image's middle")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--risks", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    optimised, judge = QualityScorer("nano", device="cpu"), QualityScorer(args.judge, device="cpu")
    images = []
    for path in sorted(args.images.iterdir())[: args.count]:
        image = load_image(path, path.name)
        top, left = ((size - args.side) // 2 for size in image.shape[-2:])
        images.append(image[:, top : top + args.side, left : left + args.side].float() / 255)
    before, judged = optimised.score(images), np.array([r.score for r in judge.score(images)])
    print(
        "| risk | nano: score | std | coverage | judge: score | gain [95%] | PSNR, dB |\n|---|---|---|---|---|---|---|"
    )
    print(_row("none (photographs)", before, judged, judged, None))
    for risk in args.risks:
        changed = [ascend(optimised, image, risk, args.steps, args.rate) for image in images]
        errors = [float(((a.float() / 255 - b) ** 2).mean()) for a, b in zip(changed, images, strict=True)]
        psnr = float(np.mean([-10 * np.log10(error) for error in errors]))
        after = np.array([r.score for r in judge.score(changed)])
        print(_row(f"{risk:g}", optimised.score(changed), after, judged, psnr), flush=True)


def _row(name: str, results: list, after: np.ndarray, judged: np.ndarray, psnr: float | None) -> str:
    score, std, coverage = (
        float(np.mean([getattr(r, field) for r in results])) for field in ("score", "std", "coverage")
    )
    gain = "" if psnr is None else _interval(after - judged)
    cells = [name, f"{score:.2f}", f"{std:.2f}", f"{coverage:.2f}", f"{after.mean():.2f}", gain]
    return "| " + " | ".join([*cells, "" if psnr is None else f"{psnr:.1f}"]) + " |"


def _interval(values: np.ndarray) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


if __name__ == "__main__":
    main()
