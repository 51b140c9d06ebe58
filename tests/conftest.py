"""Fixtures of the whole suite: offline, on the CPU, one thread, seeded; tiny checkpoints built once per session."""

import os
import tempfile

# Before anything imports torch or transformers. VQR1_TEST_GPU=1 pytest -m gpu runs what needs a GPU.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["VQR1_CACHE"] = tempfile.mkdtemp(prefix="vqr1-tests-")
if os.environ.get("VQR1_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import FAMILIES, HYBRID, build_tiny_model, build_tiny_nano


def pytest_sessionfinish() -> None:
    """What the package remembered of the tests' models."""
    shutil.rmtree(os.environ["VQR1_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, whatever ran before it; one thread, as small models run fastest."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2-VL checkpoint in float32."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen2_vl", "qwen2_vl")


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2.5-VL checkpoint in float32."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen2_5_vl", "qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen3-VL checkpoint in float32."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen3.5-VL checkpoint in float32, half of whose layers have linear attention."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / HYBRID, HYBRID)


@pytest.fixture(scope="session")
def tiny_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model of the embedded model's class in float32."""
    return build_tiny_nano(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(params=FAMILIES)
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """Each family's folder in turn: a test that takes it runs three times."""
    return request.getfixturevalue(f"tiny_{request.param}")
