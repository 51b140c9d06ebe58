"""The example in a reduced form: fewer scenes, two steps, a tiny model."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_example_trains_on_ratings(
    warm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    example = runpy.run_path(str(EXAMPLES / "train_on_your_ratings.py"))
    command = ["--model", str(warm_model), "--scenes", "3", "--steps", "2", "-o", str(tmp_path)]
    found = example["main"](command)
    printed = capsys.readouterr().out
    assert f"{found['before']:.3f} before, {found['after']:.3f} after" in printed
    ratings = (tmp_path / "pictures/ratings.csv").read_text().splitlines()
    assert len(ratings) == 1 + 3 * 16 and ratings[5] == "scene0_grain2_jpeg0.png,78,scene0"
    scored = [line for line in printed.splitlines() if line.endswith("_jpeg0.png")]
    assert len(scored) == 4 and all(1 <= float(line.split()[0]) <= 5 for line in scored)
