"""The example scripts run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_super_resolution_validation(tiny_qwen2_5_vl, monkeypatch, capsys):
    run("super_resolution_validation.py", monkeypatch, "--model", tiny_qwen2_5_vl)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["nearest", "bicubic"]
    psnr = [float(line.split()[2]) for line in lines]
    quality = [float(line.split()[5]) for line in lines]
    assert 15 < psnr[0] < psnr[1] < 40
    assert all(1 <= score <= 5 for score in quality) and quality[0] != quality[1]


def test_differentiable_loss(tiny_qwen2_5_vl, monkeypatch, capsys):
    run("differentiable_loss.py", monkeypatch, "--model", tiny_qwen2_5_vl)
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split("score ")[1].split(",")[0]) for line in lines]
    assert len(scores) == 6 and scores[-1] > scores[0]
