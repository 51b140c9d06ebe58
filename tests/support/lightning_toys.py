"""A Lightning module that makes pictures, for one process in the tests and for two in a run of its own.

``python tests/lightning_toys.py MODEL FOLDER`` trains one epoch in two processes and writes what each of them logged.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from vqr1_metric import VisualQualityR1Score
from vqr1_metric.integrations.lightning import VisualQualityR1Validation

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


def pictures(count: int = 6, size: int = 56) -> torch.Tensor:
    """Noise of growing contrast, different for each picture."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return 0.5 + (noise - 0.5) * torch.linspace(0.1, 1, count)[:, None, None, None]


class Fading(LightningModule):
    """Shows its validation pictures at a brightness that its training lowers, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.brightness = torch.nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch, batch_idx):
        return self.brightness * batch.mean()

    def validation_step(self, batch, batch_idx):
        return {"images": (batch * self.brightness).clamp(0, 1)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def loader(count: int = 6, batch_size: int = 2) -> DataLoader:
    return DataLoader(list(pictures(count)), batch_size=batch_size)


def two_processes(model: str, folder: Path) -> None:
    torch.set_num_threads(1)
    callback = VisualQualityR1Validation(VisualQualityR1Score(model), images="images", grid=2)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        devices=2,
        strategy="ddp_fork",
        logger=CSVLogger(folder),
        callbacks=[callback],
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(Writing(folder), loader(), loader())


class Writing(Fading):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            logged["brightness"] = float(self.brightness)
            (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(logged))


if __name__ == "__main__":
    two_processes(sys.argv[1], Path(sys.argv[2]))
