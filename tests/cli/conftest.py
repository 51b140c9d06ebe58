"""The command line in this process, on a tiny model, and a folder of small pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def vqr1(tiny_qwen2_5_vl: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``vqr1`` with the tiny model, unless arguments name another."""

    def run(*arguments: str | Path, model: str | Path = tiny_qwen2_5_vl) -> Outcome:
        capsys.readouterr()
        command, *rest = map(str, arguments)
        code = main([command, "--model", str(model), "--device", "cpu", *rest])
        return Outcome(code, *capsys.readouterr())

    return run


def _write_pictures(folder: Path, names: Sequence[str], *, side: int = 56) -> list[Path]:
    """Small pictures, no two alike."""
    random = np.random.default_rng(len(names))
    paths = [folder / name for name in names]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (side + i % 3, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def write_pictures() -> Callable[..., list[Path]]:
    """``write_pictures(folder, names)``: small pictures, no two alike."""
    return _write_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three pictures, one of them damaged, a text and a subfolder with two pictures."""
    folder = tmp_path / "photos"
    _write_pictures(folder, ["b.png", "a.jpg", "c.PNG", "sub/d.png", "sub/deeper/e.png", "sub/.hidden.png"])
    data = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("no picture")
    return folder
