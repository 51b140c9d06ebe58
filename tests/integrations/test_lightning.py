"""The metric inside a Lightning module, and the validation callback, under a real Trainer."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_toys import QUIET, Fading, loader, pictures

from vqr1_metric import QualityScorer, VisualQualityR1Score
from vqr1_metric.integrations.lightning import VisualQualityR1Validation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers"),
    # What Lightning says to everyone: few workers, no validation logger, a checkpoint folder that exists.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


@pytest.fixture
def judge(tiny_qwen2_5_vl: Path) -> QualityScorer:
    return QualityScorer(str(tiny_qwen2_5_vl))


class History(Callback):
    """What stood in callback_metrics after every validation, sanity checking included."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(tmp_path: Path, *callbacks: Callback, module: Fading | None = None, epochs: int = 2, **options) -> Trainer:
    options = {"logger": False, "enable_checkpointing": False} | QUIET | options
    trainer = Trainer(
        max_epochs=epochs, limit_train_batches=1, default_root_dir=tmp_path, callbacks=list(callbacks), **options
    )
    trainer.fit(module or Fading(), loader(), loader())
    return trainer


def mean_score(judge: QualityScorer, images: torch.Tensor) -> float:
    return torch.tensor([result.score for result in judge.score(images)]).mean().item()


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def test_metric_as_an_attribute_of_a_module(judge: QualityScorer, tmp_path: Path) -> None:
    class Judged(Fading):
        def __init__(self) -> None:
            super().__init__()
            self.quality = VisualQualityR1Score(scorer=judge)

        def validation_step(self, batch, batch_idx):
            self.quality(super().validation_step(batch, batch_idx)["images"])
            self.log("val/vqr1", self.quality, on_epoch=True)

    module, history = Judged(), History()
    trainer = fit(tmp_path, history, module=module, epochs=1)
    assert history.seen[-1]["val/vqr1"] == pytest.approx(mean_score(judge, pictures() * module.brightness), abs=1e-5)
    # The judge's weights are in neither the optimizer nor the checkpoint.
    assert [name for name, _ in module.named_parameters()] == ["brightness"]
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").stat().st_size < 20_000


def test_callback_logs_mean_interval_and_grid(judge: QualityScorer, tmp_path: Path) -> None:
    metric, history, module = VisualQualityR1Score(scorer=judge), History(), Fading()
    callback = VisualQualityR1Validation(metric, grid=2, grid_size=32)
    logger = CSVLogger(tmp_path)
    trainer = fit(tmp_path, callback, history, module=module, logger=logger, num_sanity_val_steps=2)
    sanity, _, last = history.seen
    assert sanity == {}
    assert last["val/vqr1"] == pytest.approx(mean_score(judge, pictures() * module.brightness), abs=1e-5)
    assert last["val/vqr1_low"] < last["val/vqr1"] < last["val/vqr1_high"]
    assert int(metric.moments[0].sum()) == 6, "the metric must be reset before each epoch"
    assert "val/vqr1" in Path(logger.log_dir, "metrics.csv").read_text()
    grids = sorted(Path(logger.log_dir).glob("val_vqr1_*.png"))
    assert [grid.name for grid in grids] == ["val_vqr1_000001.png", "val_vqr1_000002.png"]
    assert size_of(grids[0]) == (2 * 32, 2 * (32 + 14))
    assert trainer.validate(module, loader(3), verbose=False)[0]["val/vqr1"] == pytest.approx(
        mean_score(judge, pictures(3) * module.brightness), abs=1e-5
    )


def test_grid_shows_the_best_above_and_the_worst_below(tmp_path: Path) -> None:
    from vqr1_metric.integrations.lightning import _Extremes

    extremes = _Extremes(2, 16)
    grey = {score: torch.full((3, 8, 8), score / 10) for score in (1, 2, 3, 4, 5)}
    extremes.add([grey[3], grey[5]], torch.tensor([3.0, 5.0]))
    extremes.add([grey[1], torch.zeros(3, 8, 8), grey[4], grey[2]], torch.tensor([1.0, torch.nan, 4.0, 2.0]))
    scores, shown = extremes.rows()
    assert sorted(scores.tolist()) == [1, 2, 4, 5]
    assert shown[:, 0, 8, 8].tolist() == (scores * 25.5).round().tolist()
    sheet = extremes.drawn()
    places = {(0, 0): 5, (1, 0): 4, (0, 1): 1, (1, 1): 2}
    for (column, row), score in places.items():
        assert sheet.getpixel((column * 16 + 8, row * 30 + 8))[0] == round(score * 25.5)
    # A wide picture is fitted into the square, and nothing is drawn of nothing.
    wide = _Extremes(1, 16)
    wide.add([torch.zeros(3, 4, 16)], torch.tensor([2.0]))
    assert wide.pictures[0, 0, :, 8].tolist() == [255] * 6 + [0] * 4 + [255] * 6
    assert _Extremes(2, 16).drawn() is None


def test_the_test_loop_is_judged_too(judge: QualityScorer, tmp_path: Path) -> None:
    class Tested(Fading):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    callback = VisualQualityR1Validation(VisualQualityR1Score(scorer=judge), grid=1)
    trainer = Trainer(logger=CSVLogger(tmp_path), default_root_dir=tmp_path, callbacks=[callback], **QUIET)
    (seen,) = trainer.test(Tested(), loader(), verbose=False)
    assert seen["test/vqr1"] == pytest.approx(mean_score(judge, pictures()), abs=1e-5)
    assert seen["test/vqr1_low"] < seen["test/vqr1"] < seen["test/vqr1_high"]
    assert [grid.name for grid in Path(trainer.logger.log_dir).glob("*.png")] == ["test_vqr1_000000.png"]


def test_drives_checkpoints_and_early_stopping(judge: QualityScorer, tmp_path: Path) -> None:
    judged = []

    class Falling(VisualQualityR1Score):
        """The real metric, with values that fall from epoch to epoch."""

        def compute(self):
            judged.append(int(self.moments[0].sum()))
            return super().compute() * 0 + 4 - len(judged)

    callback = VisualQualityR1Validation(Falling(scorer=judge), every_n_epochs=2, grid=0, offload=True)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/vqr1", mode="max", every_n_epochs=2)
    stop = EarlyStopping("val/vqr1", mode="max", patience=2, strict=False)
    trainer = fit(tmp_path, callback, best, stop, epochs=20, enable_checkpointing=True)
    # Scored after epochs 2 and 4. Early stopping first sees a value at 2, then none better at 3 and 4.
    assert judged == [6, 6] and trainer.current_epoch == 4
    assert Path(best.best_model_path).name == "epoch=1.ckpt" and float(best.best_model_score) == 3


def test_finding_the_pictures(judge: QualityScorer, tmp_path: Path) -> None:
    class Bare(Fading):
        def validation_step(self, batch, batch_idx):
            return batch * self.brightness

    class Unfit(Fading):
        def validation_step(self, batch, batch_idx):
            return {"loss": batch.mean(), "fake": batch}

    def run(module, **options):
        callback = VisualQualityR1Validation(VisualQualityR1Score(scorer=judge), grid=0, **options)
        return fit(tmp_path, callback, module=module, epochs=1, num_sanity_val_steps=0).callback_metrics["val/vqr1"]

    module = Bare()
    assert run(module) == pytest.approx(mean_score(judge, pictures() * module.brightness), abs=1e-5)
    expected = mean_score(judge, pictures())
    assert run(Unfit(), images="fake") == pytest.approx(expected, abs=1e-5)
    assert run(Unfit(), images=lambda outputs, batch: list(batch)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"the key 'images', but it returned a dictionary .*\['fake', 'loss'\]"):
        run(Unfit())


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected a VisualQualityR1Score.*got 'nano'"):
        VisualQualityR1Validation("nano")
    with pytest.raises(ValueError, match="every_n_epochs of at least 1"):
        VisualQualityR1Validation(VisualQualityR1Score("nano"), every_n_epochs=0)


def test_grid_reaches_tensorboard(judge: QualityScorer, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = VisualQualityR1Validation(VisualQualityR1Score(scorer=judge), grid=2)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, callback, epochs=1, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["val/vqr1/best_and_worst"]
    assert "val/vqr1_low" in events.Tags()["scalars"]


def test_two_processes(judge: QualityScorer, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "support" / "lightning_toys.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, judge.spec.model, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["val/vqr1"] == pytest.approx(mean_score(judge, pictures() * first["brightness"]), abs=1e-5)
    assert first["val/vqr1_low"] < first["val/vqr1"] < first["val/vqr1_high"]
    (grid,) = tmp_path.rglob("val_vqr1_*.png")
    assert size_of(grid) == (2 * 128, 2 * (128 + 14))


@pytest.mark.filterwarnings("ignore::UserWarning")  # as everyone sees: workers, GPUs, a model that is not trained
def test_example(judge: QualityScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "lightning_validation.py"
    options = ["--model", judge.spec.model, "--size", "56", "--epochs", "2", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    runpy.run_path(str(script), run_name="__main__")
    assert "best checkpoint" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 2 and len(list(tmp_path.rglob("*.ckpt"))) == 1
