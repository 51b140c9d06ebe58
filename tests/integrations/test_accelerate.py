"""`update_without_padding` under a real Accelerator: in two processes every picture counts exactly once."""

import csv
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFilter
from stub_scorer import formula_scorer
from torch.utils.data import DataLoader

from vqr1_metric import VisualQualityR1Score
from vqr1_metric.integrations.accelerate import update_without_padding

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "accelerate_two_processes.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, SCRIPT, folder, str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def expected_scores(size: int) -> list[float]:
    pictures = torch.linspace(0.2, 0.8, size)[:, None, None, None].expand(size, 3, 28, 28)
    return sorted(result.score for result in formula_scorer().score(pictures))


@pytest.mark.parametrize("loader", ["even", "uneven", "dispatched", "split"])
@pytest.mark.parametrize("size", range(4, 9))
def test_every_picture_counts_once(ranks: list[dict], loader: str, size: int) -> None:
    first, second = (rank[f"{loader} {size}"] for rank in ranks)
    assert first["scores"] == second["scores"] == pytest.approx(expected_scores(size), abs=1e-3)
    assert first["own"] + second["own"] == size


def test_what_a_plain_update_counts(ranks: list[dict]) -> None:
    # The reason for the helper: 5 pictures in batches of 2 on 2 processes are 8 to a metric.
    assert ranks[0]["even 5"]["plain"] == 8
    assert ranks[0]["even 5"]["own"] == 3 and ranks[1]["even 5"]["own"] == 2
    assert ranks[0]["uneven 5"]["plain"] == 5


@pytest.mark.parametrize("size", range(4, 9))
def test_drop_last_drops_and_counts_the_rest(ranks: list[dict], size: int) -> None:
    for rank in ranks:
        assert len(rank[f"drop_last {size}"]["scores"]) == rank[f"drop_last {size}"]["plain"] == size // 4 * 4


def test_stream_without_a_length(ranks: list[dict]) -> None:
    assert ranks[0]["dispatched stream 5"]["scores"] == pytest.approx(expected_scores(5), abs=1e-3)
    for rank in ranks:
        assert "no length" in rank["errors"]["stream"] and "dispatch_batches" in rank["errors"]["stream"]


def test_errors(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "inside the loop over a loader that accelerator.prepare returned" in rank["errors"]["outside"]
        assert rank["errors"]["too many"] == "Expected one picture for each of the 2 samples, but got 4."


def test_one_process_counts_everything() -> None:
    accelerator = Accelerator(cpu=True)
    metric = VisualQualityR1Score(scorer=formula_scorer(), reduction="none")
    pictures = torch.linspace(0.2, 0.8, 5)[:, None, None, None].expand(5, 3, 28, 28)
    loader = accelerator.prepare(DataLoader(pictures, batch_size=2))
    assert [update_without_padding(accelerator, metric, list(batch)) for batch in loader] == [2, 2, 1]
    assert sorted(metric.compute().tolist()) == pytest.approx(expected_scores(5), abs=1e-3)
    assert update_without_padding(accelerator, metric, pictures) == 5  # no loader needed


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "super_resolution_training.py"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (26, 60, 72, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1)).save(folder / f"{index}.png")
    return folder


def options(model: Path, photographs: Path, output: Path) -> list[str]:
    small = ["--epochs", "2", "--steps", "1", "--size", "57"]
    return ["--images", str(photographs), "--model", str(model), "--output", str(output), *small]


def rows_of(output: Path) -> list[dict[str, float]]:
    with (output / "super_resolution.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the tiny model is not trained for the question
def test_example(tiny_qwen2_5_vl: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options(tiny_qwen2_5_vl, photographs, tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["psnr"] > 10 and row["vqr1_low"] <= row["vqr1"] <= row["vqr1_high"] for row in rows)
    assert (tmp_path / "super_resolution.png").stat().st_size > 10_000


@pytest.mark.slow
def test_example_in_two_processes_agrees_with_one(tiny_qwen2_5_vl: Path, photographs: Path, tmp_path: Path) -> None:
    """Validation alone (no training step changes the weights), where both must see the same two pictures once."""
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(free_port()), str(EXAMPLE), *options(tiny_qwen2_5_vl, photographs, output)]
        command += ["--learning-rate", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(rows_of(output))
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)
