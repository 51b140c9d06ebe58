"""Lightning: judge what a model makes during validation, and let the score drive checkpoints and early stopping.

The metric alone works as an attribute of a module (``self.log("val/vqr1", self.quality, on_epoch=True)``). The callback
here leaves the module as it is, and adds an interval and a grid of the best and worst pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vqr1_metric.images import ImageError, ImageLike, load_image, split_images
from vqr1_metric.metric import VisualQualityR1Score

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.trainer.states import TrainerFn
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "vqr1_metric.integrations.lightning needs Lightning: pip install 'vqr1-metric[lightning]'"
        ) from None

_CAPTION = 14  # pixels below each picture


class VisualQualityR1Validation(Callback):  # type: ignore[misc]  # Lightning's types are not read
    """Score the pictures that ``validation_step``, or ``test_step``, returns.

    At the end of a scored validation epoch it logs, into ``trainer.callback_metrics`` and every logger,

    - ``name``: the mean score over all pictures of all processes, and ``name_low``, ``name_high``, its interval (the
      metric's ``confidence_level``; NaN for fewer than five pictures);
    - a grid, best pictures above, worst below: ``add_image`` of TensorBoard, ``log_image`` of Weights & Biases; for any
      other logger a PNG file ``<name>_<step>.png`` in its folder.

    Sanity checking is skipped, and the metric is reset before every scored epoch.

    Epochs that are not scored leave the last value in ``callback_metrics``. So give ``ModelCheckpoint(monitor=name)``
    the same ``every_n_epochs``, and ``EarlyStopping(monitor=name, mode="max")`` ``strict=False`` and a patience that
    counts all validation epochs.

    Args:
        metric: a :class:`~vqr1_metric.metric.VisualQualityR1Score` of the callback's own.
        images: how to find the pictures: ``"images"`` takes that key of what ``validation_step`` returned (a returned
            tensor is taken itself), a function gets ``(outputs, batch)``. A network's floats may leave [0, 1], which
            raises: make the metric with ``clamp=True``.
        name: of the logged values.
        every_n_epochs: score after epochs n, 2n, ...; ``trainer.validate`` always scores.
        grid: pictures in each row of the grid; 0 for none.
        grid_size: pixels of a picture's side in the grid.
        offload: keep the judge's weights on the CPU between scored epochs.

    Lightning repeats some pictures to give every process equally many; they count twice here as in all its metrics.
    """

    def __init__(
        self,
        metric: VisualQualityR1Score,
        *,
        images: str | Callable[[Any, Any], ImageLike] = "images",
        name: str = "val/vqr1",
        every_n_epochs: int = 1,
        grid: int = 4,
        grid_size: int = 128,
        offload: bool = False,
    ) -> None:
        if not isinstance(metric, VisualQualityR1Score):
            raise ValueError(f"Expected a VisualQualityR1Score, such as VisualQualityR1Score('nano'), got {metric!r}.")
        if every_n_epochs < 1 or grid < 0 or grid_size < 16:
            raise ValueError(
                "Expected every_n_epochs of at least 1, grid of at least 0 and grid_size of at least 16, but got "
                f"{every_n_epochs}, {grid} and {grid_size}."
            )
        self.metric = metric
        self.images = images
        self.name = name
        self.every_n_epochs = every_n_epochs
        self.grid, self.grid_size = grid, grid_size
        self.offload = offload

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        if self._due(trainer):
            self.metric.to(pl_module.device)  # the scores, which are gathered there; the judge has its own device
            self.metric.reset()
            self._extremes = _Extremes(self.grid, self.grid_size)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score one batch; the pictures of all validation loaders count as one set."""
        if not self._due(trainer):
            return
        images = split_images(self._find_images(outputs, batch))
        if images:
            results = self.metric.scorer.score(images, on_error=self.metric.on_error)
            self.metric.update(cast("Any", results))  # it takes results too, which its signature does not say
            self._extremes.add(images, torch.tensor([result.score for result in results]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean, its interval and the grid."""
        if not self._due(trainer):
            return
        name = self._name(trainer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="An interval of the mean needs")  # of few pictures it is NaN
            low, high = self.metric.confidence_interval()
        values = {name: self.metric.compute(), f"{name}_low": low, f"{name}_high": high}
        # All processes hold the same values already; sync_dist tells Lightning that this was thought of.
        pl_module.log_dict(values, on_epoch=True, sync_dist=True)
        if self.grid:
            gathered = [pl_module.all_gather(t.to(pl_module.device)).cpu() for t in self._extremes.rows()]
            if trainer.is_global_zero:
                self._log_grid(trainer, _Extremes.merged(self.grid, self.grid_size, *gathered).drawn())
        if self.offload:
            self.metric.offload()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As for validation, of what ``test_step`` returned."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation; logged under the same name with ``test`` for a leading ``val``."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _name(self, trainer: Trainer) -> str:
        testing = trainer.state.fn == TrainerFn.TESTING and self.name.startswith("val")
        return "test" + self.name.removeprefix("val") if testing else self.name

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        due: bool = trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due

    def _find_images(self, outputs: Any, batch: Any) -> Any:
        if callable(self.images):
            return self.images(outputs, batch)
        if isinstance(outputs, Tensor) and outputs.ndim >= 3:
            return outputs
        try:
            return outputs[self.images]
        except (TypeError, KeyError, IndexError):
            raise ValueError(
                f"Expected validation_step to return pictures, or a dictionary with the key {self.images!r}, but it "
                f"returned {_shown(outputs)}. Return them, or pass images=lambda outputs, batch: ..."
            ) from None

    def _log_grid(self, trainer: Trainer, picture: Image.Image | None) -> None:
        if picture is None:
            return
        name = self._name(trainer)
        title, step = f"{name}/best_and_worst", trainer.global_step
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(title, [picture], step)
            elif hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(title, load_image(picture), step)
            elif logger.log_dir or logger.save_dir:
                folder = Path(logger.log_dir or logger.save_dir)
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{name.replace('/', '_')}_{step:06d}.png")


class _Extremes:
    """Thumbnails of the k best and the k worst pictures seen so far, in tensors of fixed shape."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.scores = torch.zeros(0)
        self.pictures = torch.zeros(0, 3, size, size, dtype=torch.uint8)

    def add(self, images: list[ImageLike], scores: Tensor) -> None:
        """Take the pictures that belong among the extremes; those without a score never do."""
        both = torch.cat([self.scores, scores])
        candidates = [i - len(self.scores) for i in self._kept(both).tolist() if i >= len(self.scores)]
        shown = [_thumbnail(images[i], self.size) for i in candidates]
        self._store(
            torch.cat([self.scores, scores[candidates]]), torch.cat([self.pictures, *(s.unsqueeze(0) for s in shown)])
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """Scores of shape ``(2k,)``, NaN where there is no picture, and pictures ``(2k, 3, size, size)``."""
        missing = 2 * self.count - len(self.scores)
        return pad(self.scores, (0, missing), value=torch.nan), pad(self.pictures, (0, 0, 0, 0, 0, 0, 0, missing))

    @classmethod
    def merged(cls, count: int, size: int, scores: Tensor, pictures: Tensor) -> _Extremes:
        """The extremes of all processes, out of their gathered rows."""
        extremes = cls(count, size)
        extremes._store(scores.reshape(-1), pictures.reshape(-1, 3, size, size))
        return extremes

    def drawn(self) -> Image.Image | None:
        """Best pictures in the upper row, worst in the lower, each with its score; None without pictures."""
        if not len(self.scores):
            return None
        best_first = self.scores.argsort(descending=True, stable=True).tolist()
        width = min(self.count, len(best_first))
        sheet = Image.new("RGB", (width * self.size, 2 * (self.size + _CAPTION)), "white")
        draw = ImageDraw.Draw(sheet)
        for row, indices in enumerate((best_first[:width], best_first[::-1][:width])):
            for column, index in enumerate(indices):
                left, top = column * self.size, row * (self.size + _CAPTION)
                sheet.paste(Image.fromarray(self.pictures[index].permute(1, 2, 0).numpy()), (left, top))
                draw.text((left + 3, top + self.size + 1), f"{self.scores[index]:.2f}", fill="black")
        return sheet

    def _store(self, scores: Tensor, pictures: Tensor) -> None:
        kept = self._kept(scores)
        self.scores, self.pictures = scores[kept], pictures[kept]

    def _kept(self, scores: Tensor) -> Tensor:
        """Indices of the k best and the k worst, each once."""
        order = scores.argsort(descending=True, stable=True)
        order = order[~scores[order].isnan()]
        if len(order) <= 2 * self.count:
            return order
        return torch.cat([order[: self.count], order[len(order) - self.count :]])


def _thumbnail(image: ImageLike, size: int) -> Tensor:
    """The picture fitted into a white square, uint8 ``(3, size, size)``."""
    try:
        pixels = load_image(image).detach().cpu()
    except ImageError:  # it was readable a moment ago, when it was scored
        return torch.full((3, size, size), 255, dtype=torch.uint8)
    pixels = pixels if pixels.is_floating_point() else pixels / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = interpolate(pixels.float().unsqueeze(0), shape, mode="bilinear", antialias=True)[0]
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    square = pad(small, (left, size - shape[1] - left, top, size - shape[0] - top), value=1.0)
    return (square * 255).round().clamp(0, 255).to(torch.uint8)


def _shown(outputs: Any) -> str:
    if isinstance(outputs, dict):
        return f"a dictionary with the keys {sorted(outputs)}"
    return f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
