"""Weights spread over devices or quantised: the same pictures, nearly the same scores."""

import shutil

import pytest
import torch

from vqr1_metric import nano
from vqr1_metric.nano.configuration import NanoConfig
from vqr1_metric.nano.modeling import NanoForConditionalGeneration
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


def scores(folder, **options):
    pictures = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    return QualityScorer(str(folder), **options).distributions(pictures).mean


def test_device_map_gives_the_same_scores(tiny_qwen2_5_vl):
    """accelerate's hooks move inputs between the parts; here all parts are on the CPU."""
    plain = scores(tiny_qwen2_5_vl, device="cpu", dtype="float32")
    spread = scores(tiny_qwen2_5_vl, device_map="auto", dtype="float32")
    torch.testing.assert_close(spread.cpu(), plain, atol=1e-5, rtol=0)


def test_weights_offloaded_to_the_disk_give_the_same_scores(tiny_qwen2_5_vl, tmp_path):
    """The head has no weight of its own then (it is on the meta device between calls): it is called as a module."""
    from accelerate import disk_offload

    plain = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32")
    pictures = torch.rand(2, 3, 96, 128)
    expected = plain.distributions(pictures).mean
    plain.unload()
    backend = plain.backend
    disk_offload(backend.model.lm_head, tmp_path, execution_device=torch.device("cpu"))
    assert backend.model.lm_head.weight.is_meta
    torch.testing.assert_close(plain.distributions(pictures).mean, expected, atol=1e-5, rtol=0)
    plain.unload()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """nano's shape with random weights."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    NanoForConditionalGeneration(NanoConfig.from_pretrained(nano.FOLDER)).save_pretrained(folder)
    for path in nano.FOLDER.glob("*.js*on"):
        if path.name != "config.json":
            shutil.copy(path, folder)
    shutil.copy(nano.FOLDER / "chat_template.jinja", folder)
    return folder


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_stay_near_full_precision(quantization, random_model):
    """Through bitsandbytes, which runs on a CPU too; the weights take less memory."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the extra 'quant'")
    full = QualityScorer(str(random_model), device="cpu", dtype="float32")
    small = QualityScorer(str(random_model), device="cpu", dtype="float32", quantization=quantization)
    pictures = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)).cumsum(2)
    pictures = pictures / pictures.amax()
    expected, got = full.distributions(pictures).probabilities, small.distributions(pictures).probabilities
    distance = 0.5 * (expected - got).abs().sum(1).max()
    assert 0 < distance < 0.1
    layers = [s.backend.model.model.language_model.layers for s in (full, small)]  # the tower is convolutions
    before, after = (sum(weight.nbytes for weight in part.parameters()) for part in layers)
    assert after < 0.35 * before
