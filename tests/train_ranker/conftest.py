"""Rated pictures, and a tiny model that has learnt the form of the reply: without it no reply earns anything."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.train_ranker.config import RankerConfig


@pytest.fixture(scope="session")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two label files of unlike scales, ``noise.csv`` (0 to 100) and ``blur.txt`` (0 to 1), beside 24 pictures."""
    folder = tmp_path_factory.mktemp("rated")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:56, :56] / 56
    lines: dict[str, list[str]] = {"noise": ["image,mos"], "blur": []}
    for i in range(24):
        clean = np.stack([0.5 + 0.4 * np.sin(20 * x + i), 0.5 + 0.4 * np.cos(17 * y + i), x], axis=-1)
        strength = (i // 2 % 12) / 12
        noisy = clean + random.normal(0, 1, clean.shape) * strength * 0.5
        Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{i}.png")
        if i % 2:
            lines["noise"].append(f"{i}.png,{100 - 90 * strength:.2f}")
        else:
            lines["blur"].append(f"{i}.png {1 - strength:.3f}")
    (folder / "noise.csv").write_text("\n".join(lines["noise"]) + "\n")
    (folder / "blur.txt").write_text("\n".join(lines["blur"]) + "\n")
    return folder


@pytest.fixture(scope="session")
def settings(rated: Path) -> dict:
    """Settings of a small run on CPU, without a model and an output folder."""
    return {
        "data": [str(rated / "noise.csv"), str(rated / "blur.txt")],
        "thinking": False,
        "images_per_device": 4,
        "images_per_comparison": 4,
        "num_generations": 3,
        "micro_batch": 6,
        "max_new_tokens": 16,
        "learning_rate": 3e-4,
        "lr_scheduler": "constant",
        "gradient_checkpointing": False,
        "max_pixels": 56 * 56,
        "validation_fraction": 0.0,
        "logging_steps": 1,
        "max_steps": 4,
        "save_steps": 100,
    }


@pytest.fixture(scope="session")
def warm_model(settings: dict, tiny_qwen2_5_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2.5-VL after 150 supervised steps: it writes ``<answer>d.dd</answer>`` with scores that vary."""
    import torch

    from vqr1_metric.train_ranker.coldstart import cold_start
    from vqr1_metric.train_ranker.run import prepare_data

    folder = tmp_path_factory.mktemp("warm")
    config = RankerConfig(
        **{**settings, "model": str(tiny_qwen2_5_vl), "output_dir": str(folder), "objective": "exact"},
        cold_start_steps=150,
        cold_start_learning_rate=3e-3,
    )
    torch.set_num_threads(1)  # session fixtures run before the one that sets it
    torch.manual_seed(0)
    return cold_start(config, prepare_data(config)[0], folder / "model")


@pytest.fixture
def trl_trainer():
    """The module of the trainer on TRL, where TRL can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", minversion="1.16", reason="RL with sampled replies needs trl 1.16")
        try:
            from vqr1_metric.train_ranker import trainer
        except ImportError as error:
            pytest.skip(f"trl cannot be imported here: {error}")
    return trainer
