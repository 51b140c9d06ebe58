"""What a run reports to TensorBoard and trackio is really written; both are optional packages."""

import importlib.util
import sqlite3
import sys
from pathlib import Path

import pytest

from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.run import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def reporting(settings: dict, model: Path, output: Path, tool: str) -> RankerConfig:
    more = {
        "model": str(model),
        "output_dir": str(output),
        "objective": "exact",
        "micro_batch": 4,
        "max_steps": 2,
        "validation_fraction": 0.34,
        "eval_steps": 2,
        "report_to": [tool],
    }
    return RankerConfig(**{**settings, **more})


def test_tensorboard_gets_training_and_validation_figures(
    settings: dict, warm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(reporting(settings, warm_model, tmp_path / "out", "tensorboard"))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # the run has set it
    (file,) = (tmp_path / "out/logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/fidelity", "train/spread", "train/kl", "eval/srcc_noise", "eval/plcc_blur"} <= tags
    assert [event.step for event in events.Scalars("train/fidelity")] == [1, 2]
    assert 0 < events.Scalars("train/fidelity")[0].value <= 1.01


def test_trackio_gets_them_too(
    settings: dict, warm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio")
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = reporting(settings, warm_model, tmp_path / "out", "trackio")
    config.trainer = {"project": "rankers"}
    train(config)
    (file,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        text = " ".join(str(row) for row in database.execute("SELECT metrics FROM metrics"))
    assert "train/fidelity" in text and "eval/srcc_noise" in text


def test_a_tool_that_is_not_installed_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else real(name, *a))
    config = RankerConfig.preset("nano", data=["a.csv"], output_dir="out", report_to=["trackio"])
    with pytest.raises(ConfigError, match="Expected trackio to be installed: pip install trackio"):
        config.check()
