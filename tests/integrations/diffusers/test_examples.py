"""The diffusion examples run as they are, here with a tiny scoring model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]


def run(script: str, *arguments: str | Path, cwd: Path) -> str:
    """Standard output of a script, started as its documentation says but for the folder."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_best_of_n(tiny_qwen2_5_vl, tmp_path):
    options = ["--n", 6, "--keep", 2, "--steps", 5, "--size", 64]
    text = run("examples/best_of_n.py", "--model", tiny_qwen2_5_vl, *options, cwd=tmp_path)
    assert text.count("dropped") == 3
    assert "inplace" in text
    assert f"{2 * (2 * 6 + 3 * 3)} denoiser rows" in text
    with Image.open(tmp_path / "best_of_n.png") as grid:
        assert grid.size == (128, 64 + 14)


def test_backpropagating_the_score_raises_it_on_held_out_seeds(tiny_qwen2_5_vl, tmp_path):
    text = run("examples/reward_backprop.py", "--model", tiny_qwen2_5_vl, "--updates", 6, "--size", 32, cwd=tmp_path)
    before, after = (float(re.search(rf"held-out seeds {when}: (\S+)", text).group(1)) for when in ("before", "after"))
    assert after > before


@pytest.mark.slow
def test_benchmark(tiny_qwen2_5_vl, tmp_path):
    options = ["--n", 8, "--repeats", 2, "--out", "out.csv"]
    run("benchmarks/best_of_n.py", "--model", tiny_qwen2_5_vl, *options, cwd=tmp_path)
    lines = [line for line in (tmp_path / "out.csv").read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("n,strategy")
    assert lines[1].startswith(f"8,plain,,8,{2 * 8 * 20},")
    assert sum(line.endswith(",equal") for line in lines) == 1
