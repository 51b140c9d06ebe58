"""What only a GPU can show; run with `VQR1_TEST_GPU=1 pytest -m gpu`."""

import pytest
import torch

from vqr1_metric.backends.pixels import to_patches
from vqr1_metric.images import load_image
from vqr1_metric.scorer import QualityScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers"),
]


def test_pixels_stay_on_the_device(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cuda", dtype="float32")
    picture = torch.rand(3, 90, 120, device="cuda")
    assert load_image(picture).data_ptr() == picture.data_ptr()
    patches, _ = to_patches(picture, scorer.pixel_config)
    assert patches.is_cuda
    on_cpu, _ = to_patches(picture.cpu(), scorer.pixel_config)
    torch.testing.assert_close(patches.cpu(), on_cpu, atol=1e-5, rtol=1e-5)


def test_gpu_scores_equal_cpu_scores_and_devices_may_be_mixed(tiny_qwen2_5_vl):
    pictures = torch.rand(3, 3, 90, 120)
    cpu = [r.score for r in QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32").score(pictures)]
    gpu = QualityScorer(str(tiny_qwen2_5_vl), device="cuda", dtype="float32")
    assert [r.score for r in gpu.score([pictures[0].cuda(), pictures[1], pictures[2].cuda()])] == pytest.approx(
        cpu, abs=1e-4
    )


def test_gradients_reach_pixels_on_the_device(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cuda", dtype="float32")
    pictures = torch.rand(2, 3, 84, 84, device="cuda", requires_grad=True)
    scorer.distributions(pictures, differentiable=True).mean.sum().backward()
    assert pictures.grad.is_cuda and float(pictures.grad.abs().sum()) > 0


def test_unload_and_offload_give_the_memory_back(tiny_qwen2_5_vl):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cuda")
    score = scorer.score(torch.rand(3, 84, 84))[0]
    assert torch.cuda.memory_allocated() > before
    scorer.offload()
    assert torch.cuda.memory_allocated() == before
    assert scorer.score(torch.rand(3, 84, 84))[0].error is None  # comes back by itself
    scorer.unload()
    assert torch.cuda.memory_allocated() == before
    assert score.distribution.probabilities.device.type == "cpu"
