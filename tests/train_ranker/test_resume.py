"""A run goes on by content: what may differ, what may not, and checkpoints that are damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vqr1_metric.train_ranker.checks import ConfigError
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.resume import damage, last_checkpoint
from vqr1_metric.train_ranker.run import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def config_of(settings: dict, model: Path, output: Path, **more) -> RankerConfig:
    small = {"objective": "exact", "micro_batch": 4, "max_steps": 3, "save_steps": 1, "data": settings["data"][:1]}
    return RankerConfig(**{**settings, **small, "model": str(model), "output_dir": str(output), **more})


@pytest.fixture(scope="module")
def finished(settings: dict, warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    train(config_of(settings, warm_model, output))
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that looks as if it had been killed after its second checkpoint."""
    shutil.copytree(finished, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name in ("checkpoint-3", "trainer_state.json", "config.json", "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_folders_may_move(settings: dict, rated: Path, warm_model: Path, run: Path, finished: Path, tmp_path) -> None:
    shutil.copytree(rated, tmp_path / "pictures")
    shutil.copytree(warm_model, tmp_path / "model")
    (tmp_path / "labels").mkdir()
    shutil.move(tmp_path / "pictures/noise.csv", tmp_path / "labels/noise.csv")
    moved = {"data": [str(tmp_path / "labels/noise.csv")], "images": [str(tmp_path / "pictures")]}
    train(config_of(settings, tmp_path / "model", run, **moved), resume=True)
    assert same(run, finished)


def test_a_lower_micro_batch_is_the_same_run(settings, warm_model: Path, run: Path, finished: Path) -> None:
    train(config_of(settings, warm_model, run, micro_batch=2), resume=True)
    start, a, b = weights(warm_model), weights(run), weights(finished)
    moved = max(float((b[name] - start[name]).abs().max()) for name in b)
    assert max(float((a[name] - b[name]).abs().max()) for name in b) < 0.1 * moved  # but for rounding


def test_more_steps_are_allowed_and_said_fewer_are_not(settings, warm_model: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="Expected max_steps above the 2 steps of the run"):
        train(config_of(settings, warm_model, run, max_steps=1), resume=True)
    with pytest.warns(UserWarning, match="has another length than before"):
        train(config_of(settings, warm_model, run, max_steps=5), resume=True)
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "grad_norm" in entry] == [1, 2, 3, 4, 5]


def test_other_processes_pictures_scores_and_models_are_refused(
    settings: dict, rated: Path, warm_model: Path, run: Path, tiny_qwen2_5_vl: Path, tmp_path: Path
) -> None:
    shutil.copytree(rated, tmp_path / "pictures")
    Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "pictures/1.png")
    other = {"data": [str(tmp_path / "pictures/noise.csv")]}
    with pytest.raises(ConfigError, match="pictures or scores have changed since"):
        train(config_of(settings, warm_model, run, **other), resume=True)
    with pytest.raises(ConfigError, match=r"Expected the start model of the run in .*, but .* is another one"):
        train(config_of(settings, tiny_qwen2_5_vl, run), resume=True)
    with pytest.raises(ConfigError, match=r"learning_rate is 0.1 and was 0.0003"):
        train(config_of(settings, warm_model, run, learning_rate=0.1), resume=True)
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "processes": 2}))
    with pytest.raises(ConfigError, match=r"Expected 2 processes, as the run in .* had, but got 1"):
        train(config_of(settings, warm_model, run), resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_known(harm, name: str, run: Path) -> None:
    assert damage(run / "checkpoint-2") is None
    harm(run / "checkpoint-2" / name)
    assert name in damage(run / "checkpoint-2")
    assert last_checkpoint(run).name == "checkpoint-1"


def test_without_a_manifest_a_cut_file_is_known_too(run: Path) -> None:
    (run / "checkpoint-2/files.json").unlink()
    assert damage(run / "checkpoint-2") is None
    cut(run / "checkpoint-2/model.safetensors")
    assert damage(run / "checkpoint-2") == "model.safetensors is damaged"


def test_the_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    settings: dict, warm_model: Path, run: Path, finished: Path
) -> None:
    cut(run / "checkpoint-2/model.safetensors")
    with pytest.warns(UserWarning, match=r"Passed over checkpoint-2: model.safetensors is damaged. Going on from"):
        train(config_of(settings, warm_model, run), resume=True)
    assert same(run, finished)


def test_none_left_is_said_and_nothing_starts_anew(settings: dict, warm_model: Path, run: Path) -> None:
    (run / "checkpoint-1/rng_state.pth").unlink()
    cut(run / "checkpoint-2/optimizer.pt")
    with pytest.raises(ConfigError, match=r"whole checkpoint .* checkpoint-2: optimizer.pt is damaged; checkpoint-1"):
        train(config_of(settings, warm_model, run), resume=True)


def test_settings_of_an_older_run_can_be_read(run: Path) -> None:
    values = json.loads((run / "ranker.json").read_text())
    (run / "ranker.json").write_text(json.dumps({**values, "no_such_setting": 1}))
    assert RankerConfig.load(run).max_steps == 3
