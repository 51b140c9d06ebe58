"""Validate a super-resolution network with the no-reference score, beside the PSNR it is usually trained for.

    python examples/super_resolution_validation.py [--model FOLDER]

The pictures are drawn by code, the "networks" are two ways of enlarging them: the loop is what matters.
"""

import argparse

import torch
from torch.nn.functional import interpolate
from torchmetrics.image import PeakSignalNoiseRatio

from vqr1_metric import VisualQualityR1Score


def drawn_pictures(count: int = 6, size: int = 224) -> torch.Tensor:
    """Sharp-edged pictures, ``(count, 3, size, size)`` in [0, 1]: random rectangles and discs."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pictures = torch.ones(count, 3, size, size) * torch.rand(count, 3, 1, 1, generator=generator)
    for picture in pictures:
        for shape in range(40):
            cx, cy, width, height = (
                torch.rand(4, generator=generator) * torch.tensor([1, 1, 0.2, 0.2]) * size
            ).tolist()
            inside = ((x - cx).abs() < width) & ((y - cy).abs() < height)
            if shape % 2:
                inside = (x - cx) ** 2 + (y - cy) ** 2 < width**2
            picture[:, inside] = torch.rand(3, 1, generator=generator)
    return pictures


def main() -> None:
    """Print both metrics for both networks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano", help="'nano', a local folder or a Hub name")
    model = parser.parse_args().model

    loader = drawn_pictures().split(2)
    networks = {
        "nearest": lambda low: interpolate(low, scale_factor=4, mode="nearest"),
        "bicubic": lambda low: interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1),
    }
    psnr, quality = PeakSignalNoiseRatio(data_range=1.0), VisualQualityR1Score(model)
    for name, network in networks.items():
        with torch.no_grad():
            for high in loader:
                low = interpolate(high, scale_factor=1 / 4, mode="area")
                enlarged = network(low)
                psnr.update(enlarged, high)
                quality.update(enlarged)  # no reference needed: also works where there is no `high`
        low_end, high_end = quality.confidence_interval()
        print(
            f"{name:8} PSNR {psnr.compute():.2f} dB   quality {quality.compute():.3f} [{low_end:.3f}, {high_end:.3f}]"
        )
        psnr.reset()
        quality.reset()
    quality.unload()  # the trained network gets the memory back


if __name__ == "__main__":
    main()
