"""``calculate_vqr1`` through the real BasicSR, as its validation calls metrics.

BasicSR asks for a torch of its own, so no test environment has it. To run these tests:

    pip install --no-deps --no-build-isolation --target iqa basicsr opencv-python-headless addict scikit-image lmdb
    PYTHONPATH=iqa pytest tests/integrations/test_basicsr.py
"""

import importlib
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from empty_torchvision import empty_torchvision

from vqr1_metric import QualityScorer

with empty_torchvision():
    metrics = pytest.importorskip(
        "basicsr.metrics", reason="BasicSR is not there (see the top of this file)", exc_type=ImportError
    )

from basicsr.utils.registry import METRIC_REGISTRY

from vqr1_metric.integrations import basicsr
from vqr1_metric.integrations.basicsr import calculate_vqr1

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def picture() -> np.ndarray:
    """BGR, uint8, (64, 72, 3)."""
    return np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)


def test_from_a_yaml_file(picture: np.ndarray, tiny_qwen2_5_vl: Path) -> None:
    text = f"""
    val:
      metrics:
        psnr: {{type: calculate_psnr, crop_border: 4, test_y_channel: false}}
        vqr1: {{type: calculate_vqr1, crop_border: 4, model: {tiny_qwen2_5_vl}, better: higher}}
    """
    options = yaml.safe_load(text)["val"]["metrics"]
    data = {"img": picture, "img2": picture // 2}  # as in SRModel.nondist_validation
    values = {name: metrics.calculate_metric(data, option) for name, option in options.items()}
    rgb = np.ascontiguousarray(picture[4:-4, 4:-4, ::-1])
    assert type(values["vqr1"]) is float
    assert values["vqr1"] == pytest.approx(QualityScorer(str(tiny_qwen2_5_vl)).score(rgb)[0].score, abs=1e-5)
    assert 0 < values["psnr"] < 20


def test_orders_and_grey(picture: np.ndarray, tiny_qwen2_5_vl: Path) -> None:
    model = {"model": str(tiny_qwen2_5_vl)}
    expected = calculate_vqr1(picture, **model)
    assert calculate_vqr1(picture.transpose(2, 0, 1), input_order="CHW", **model) == pytest.approx(expected, abs=1e-5)
    assert calculate_vqr1(picture[..., ::-1], **model) != pytest.approx(expected, abs=1e-3)
    grey = calculate_vqr1(picture[..., 0], **model)
    assert calculate_vqr1(picture[..., :1], **model) == pytest.approx(grey, abs=1e-5)


def test_registered_once(tiny_qwen2_5_vl: Path) -> None:
    assert METRIC_REGISTRY.get("calculate_vqr1") is calculate_vqr1
    importlib.reload(basicsr)  # BasicSR itself raises for a name registered twice
    assert METRIC_REGISTRY.get("calculate_vqr1") is calculate_vqr1


def test_no_score_and_errors(picture: np.ndarray, tiny_qwen2_5_vl: Path) -> None:
    model = {"model": str(tiny_qwen2_5_vl)}
    assert math.isnan(calculate_vqr1(np.zeros((1, 300, 3), np.uint8), **model))  # too thin to judge
    with pytest.raises(ValueError, match=r"Expected a picture as uint8 array .* float64 of shape"):
        calculate_vqr1(picture / 255, **model)
    with pytest.raises(ValueError, match="Expected input_order"):
        calculate_vqr1(picture, input_order="HCW", **model)
    with pytest.raises(ValueError, match="Expected a crop_border that leaves pixels of 72x64, but got 32"):
        calculate_vqr1(picture, crop_border=32, **model)
    with pytest.raises(ValueError, match="Expected mode to be one of"):
        calculate_vqr1(picture, mode="guess", **model)


def test_example(tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "basicsr_metric.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", str(tiny_qwen2_5_vl)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 5
