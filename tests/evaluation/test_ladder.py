"""Distortion ladders: monotonicity by hand, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_files import save_picture

from vqr1_metric.cli import main
from vqr1_metric.evaluation.ladder import check_distortions, ladder_pictures, ladder_statistics
from vqr1_metric.ratings import RatingError


def test_statistics_by_hand() -> None:
    falling = [5.0, 4, 3, 2, 1]
    found = ladder_statistics([falling, [5.0, 4, 4.5, 2, 1], [1.0, 1, 1, 1, 1], [5.0, math.nan, 3, 2, 1]])
    assert (found["n"], found["left_out"]) == (3, 1)
    assert found["monotonicity"] == pytest.approx((1.0 + 0.9 + 0.0) / 3)
    assert found["falling"] == pytest.approx((4 + 3 + 0) / 12) and found["reversed_worst"] == 0.5
    assert found["means"][0] == pytest.approx(11 / 3) and found["drop"] == pytest.approx(8 / 3)
    assert ladder_statistics([falling[::-1]])["monotonicity"] == pytest.approx(-1.0)
    assert "no picture" in ladder_statistics([[math.nan, 1.0]])["reason"]


def test_pictures(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 0.5, (60, 40))
    names, rungs = ladder_pictures(tmp_path, ["blur", "jpeg"], max_edge=30)
    assert names == ["a.png"] and len(rungs) == 2 * 9 and len({key for key, _ in rungs}) == 17
    assert rungs[0][1]().shape == (20, 30, 3) and np.ptp(rungs[8][1]()) < np.ptp(rungs[0][1]())
    with pytest.raises(RatingError, match="Expected distortions out of"):
        check_distortions(["fog"])
    with pytest.raises(RatingError, match="holds none"):
        ladder_pictures(tmp_path / "none", ["blur"])


def test_command(tmp_path: Path, backend) -> None:
    for i in range(3):
        save_picture(tmp_path / "pristine" / f"{i}.png", 0.5 + 0.1 * i)
    arguments = ["evaluate", "--ladder", str(tmp_path / "pristine"), "-o", str(tmp_path / "out"), "--silent"]
    assert main([*arguments, "--distortion", "darken", "--distortion", "blur", "--resamples", "50"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert backend.pictures == 3 * (1 + 2 * 8)
    found = results["scorers"]
    assert found["linear"]["darken"]["monotonicity"] == 1.0 and found["linear"]["darken"]["falling"] == 1.0
    assert found["log Laplacian variance"]["blur"]["monotonicity"] > 0.9
    assert "| linear | darken | 3 | 1.000 [1.000, 1.000] | 100% |" in (tmp_path / "out" / "table.md").read_text()
    assert main([*arguments, "--scores", "x.csv"]) == 2
