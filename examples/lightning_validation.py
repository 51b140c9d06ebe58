"""Train a small denoiser with Lightning; the score of its validation pictures picks the checkpoint.

    pip install 'vqr1-metric[lightning]'
    python examples/lightning_validation.py --images FOLDER --epochs 10

Writes scores, checkpoints and a grid of the best and worst pictures of every epoch to ``lightning_logs``.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from vqr1_metric import VisualQualityR1Score
from vqr1_metric.images import SUFFIXES, load_image
from vqr1_metric.integrations.lightning import VisualQualityR1Validation

NOISE = 0.1  # standard deviation, of values in [0, 1]


class Denoiser(LightningModule):
    """Three convolutions that predict the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 3, 3, padding=1),
        )

    def denoise(self, clean):
        noisy = clean + NOISE * torch.randn_like(clean)
        return noisy - self.net(noisy)

    def training_step(self, clean, batch_idx):
        return nn.functional.mse_loss(self.denoise(clean), clean)

    def validation_step(self, clean, batch_idx):
        return {"images": self.denoise(clean).clamp(0, 1)}  # the judge takes pixels in [0, 1]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def squares(folder: Path, size: int) -> list[torch.Tensor]:
    """The middle of every picture of a folder, floats of shape (3, size, size)."""
    found = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES):
        pixels = load_image(file) / 255
        top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
        if top >= 0 and left >= 0:
            found.append(pixels[:, top : top + size, left : left + size])
    if len(found) < 2:
        raise SystemExit(f"Expected at least two pictures of {size}x{size} pixels or more in {folder}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--output", type=Path, default=Path())
    args = parser.parse_args()

    seed_everything(0)
    pictures = squares(args.images, args.size)
    quality = VisualQualityR1Validation(VisualQualityR1Score(args.model), grid=3, offload=True)
    best = ModelCheckpoint(monitor="val/vqr1", mode="max", filename="{epoch}")
    trainer = Trainer(
        max_epochs=args.epochs, callbacks=[quality, best], logger=CSVLogger(args.output), log_every_n_steps=1
    )
    trainer.fit(Denoiser(), DataLoader(pictures * 10, 2, shuffle=True), DataLoader(pictures, 2))
    shown = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    print(f"last epoch: {shown}\nbest checkpoint: {best.best_model_path} ({float(best.best_model_score):.3f})")
    print(f"pictures: {trainer.logger.log_dir}")


if __name__ == "__main__":
    main()
