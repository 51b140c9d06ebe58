"""The score through the real pyiqa, as metric and as loss.

pyiqa asks for a torch of its own, so no test environment has it. To run these tests:

    pip install --no-deps --target iqa pyiqa opencv-python-headless
    PYTHONPATH=iqa pytest tests/integrations/test_pyiqa.py
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from empty_torchvision import empty_torchvision
from PIL import Image

from vqr1_metric import QualityScorer
from vqr1_metric.evaluation.peers import pyiqa_metric
from vqr1_metric.images import load_image

with empty_torchvision():
    pyiqa = pytest.importorskip(
        "pyiqa", reason="pyiqa is not installed (see the top of this file)", exc_type=ImportError
    )

from vqr1_metric.integrations.pyiqa import NAMES, register
from vqr1_metric.ratings import RatingError

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def options(tiny_qwen2_5_vl: Path) -> dict:
    register()
    return {"model": str(tiny_qwen2_5_vl), "device": torch.device("cpu")}


def test_names_are_listed_once() -> None:
    assert register() == register() == list(NAMES)
    assert set(NAMES) <= set(pyiqa.list_models())
    assert pyiqa.list_models(metric_mode="NR", filter="visualquality*") == sorted(NAMES)
    assert not set(NAMES) & set(pyiqa.list_models(metric_mode="FR"))


def test_metric(options: dict) -> None:
    metric = pyiqa.create_metric("visualquality_r1", **options)
    assert (metric.lower_better, metric.metric_mode, metric.score_range) == (False, "NR", "1, 5")
    images = torch.rand(3, 3, 56, 56)
    scores = metric(images)
    expected = [result.score for result in QualityScorer(options["model"]).score(images)]
    assert scores.shape == (3, 1) and not scores.requires_grad
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert metric(images[:, :1]).shape == (3, 1)
    assert sum(weight.numel() for weight in metric.parameters()) == 0
    with pytest.raises(AssertionError, match="normalized to"):
        metric(images * 2)


def test_a_path_has_the_score_it_has_everywhere(options: dict, tmp_path: Path) -> None:
    """Turned by EXIF, transparent, of 16 bits, with a profile: pyiqa's own reader knows none of them."""
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image, exif = Image.fromarray(values), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    metric, scorer = pyiqa.create_metric("visualquality_r1", **options), QualityScorer(options["model"])
    for path in sorted(tmp_path.iterdir()):
        assert float(metric(str(path))) == pytest.approx(scorer.score(path)[0].score, abs=1e-5), path.name
    with Image.open(tmp_path / "clear.png") as opened:
        assert float(metric(opened)) == pytest.approx(scorer.score(opened)[0].score, abs=1e-5)


def test_default_model_and_options(options: dict) -> None:
    nets = {name: pyiqa.create_metric(name, device=options["device"]).net for name in NAMES}
    assert {name: net.scorer.spec.model for name, net in nets.items()} == NAMES
    assert all(net.scorer.spec.device == "cpu" and not net.scorer.loaded for net in nets.values())
    thinking = pyiqa.create_metric("visualquality_r1", mode="think", num_samples=2, **options).net.scorer
    assert thinking.mode == "think" and thinking.sampling.num_samples == 2
    with pytest.raises(ValueError, match="Expected mode to be one of"):
        pyiqa.create_metric("visualquality_r1", mode="guess", **options)


def test_loss(options: dict) -> None:
    loss = pyiqa.create_metric("visualquality_r1", as_loss=True, **options)
    images = torch.rand(2, 3, 56, 56) * 1.2 - 0.1  # a network overshoots
    images.requires_grad_()
    quality = loss(images)
    expected = QualityScorer(options["model"]).distributions(images.detach().clamp(0, 1)).mean.mean()
    torch.testing.assert_close(quality.detach(), expected)
    (-quality).backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
    assert loss(images.detach()).item() == pytest.approx(expected.item(), abs=1e-5)
    each = pyiqa.create_metric("visualquality_r1", as_loss=True, loss_reduction="none", **options)
    assert each(images).shape == (2, 1)


@pytest.mark.parametrize(("name", "sign"), [("piqe", -1), ("entropy", 1)])
def test_evaluation_runs_a_metric_of_pyiqa(name: str, sign: int) -> None:
    """These have no weights to download; in which direction they go is pyiqa's to know."""
    picture = Path(__file__).resolve().parents[2] / "examples" / "pictures" / "lake_noisy.jpg"
    direct = pyiqa.create_metric(name, device="cpu")(load_image(picture)[None] / 255).item()
    assert pyiqa_metric(name, "cpu")(picture) == {"score": pytest.approx(sign * direct)}


def test_evaluation_refuses_a_metric_that_needs_a_reference() -> None:
    with pytest.raises(RatingError, match="needs no reference, but 'psnr' does"):
        pyiqa_metric("psnr")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_example(options: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "pyiqa_metric.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", options["model"]])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "pyiqa knows visualquality_r1 visualquality_r1-nano" in printed and "lake_noisy.jpg" in printed
