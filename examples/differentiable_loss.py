"""Gradients of the score reach the pixels: raise the score of a noisy picture, but stay near to it.

    python examples/differentiable_loss.py [--model FOLDER]

The same loss, with a network in place of the pixels, trains super-resolution or a diffusion model. A score that is
optimised alone is soon fooled; keep a term that ties the result to the input, and judge with another metric.
"""

import argparse

import torch

from vqr1_metric import QualityScorer, visual_quality_r1_score


def main() -> None:
    """Print the score and the distance from the input while the pixels change."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano", help="'nano', a local folder or a Hub name")
    scorer = QualityScorer(parser.parse_args().model)

    ramp = torch.linspace(0.2, 0.8, 224)
    noisy = torch.stack([ramp.expand(224, 224), ramp.expand(224, 224).T, torch.full((224, 224), 0.5)])[None]
    noisy = (noisy + 0.05 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    pixels = noisy.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=2e-3)
    for step in range(6):
        score = visual_quality_r1_score(pixels.clamp(0, 1), scorer, differentiable=True)
        distance = (pixels - noisy).square().mean()
        print(f"step {step}: score {score.item():.3f}, RMS distance {distance.sqrt().item():.4f}")
        optimizer.zero_grad()
        (-score + 10 * distance).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
