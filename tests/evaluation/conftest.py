"""A small labelled set and a scorer that judges it by a formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_files import save_picture
from stub_scorer import LinearBackend

from vqr1_metric.scorer import QualityScorer


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> LinearBackend:
    """What every command of the tests scores with: no model, but all of the machinery around it."""
    backend = LinearBackend()
    scorer = QualityScorer(backend=backend)
    for command in ("evaluate", "diff"):
        monkeypatch.setattr(f"vqr1_metric.cli.{command}.build_scorer", lambda args: scorer)
    return backend


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder with 24 pictures and labels.csv; redder is better, opinions with some noise."""
    random = np.random.default_rng(0)
    lines = ["image,mos,std,scene,method"]
    for i in range(24):
        red = (i + 1) / 26
        name = f"{i // 4}_{i % 4}.png"
        save_picture(tmp_path / "pictures" / name, red)
        lines.append(f"{name},{1 + 4 * red + 0.3 * random.standard_normal():.4f},0.4,s{i // 4},m{i % 4}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
