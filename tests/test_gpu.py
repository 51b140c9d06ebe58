"""What only a GPU can show; run with `VQR1_TEST_GPU=1 pytest -m gpu`."""

import pytest
import torch

from vqr1_metric.backends import windows
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


@pytest.mark.parametrize("lengths", [[64] * 40, [64, 64, 32, 64, 16, 300], [1024]])
@pytest.mark.parametrize("dim", [80, 72, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_variable_length_attention_equals_the_groups_of_equal_windows(lengths, dim, causal, monkeypatch):
    states = torch.randn(3, sum(lengths), 4, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    found = windows.windowed_attention(*states, starts, dim**-0.5, causal=causal)
    grad = torch.autograd.grad(found.float().square().sum(), states)[0]
    assert windows._variable_length(states[0], frozenset({"scale"})) is windows._varlen_attn(frozenset({"scale"}))
    monkeypatch.setattr(windows, "_variable_length", lambda query, options: None)
    expected = windows.windowed_attention(*states, starts, dim**-0.5, causal=causal)
    expected_grad = torch.autograd.grad(expected.float().square().sum(), states)[0]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grad, expected_grad, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_scores_do_not_depend_on_the_others(tiny_qwen2_5_vl, dtype):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cuda", dtype=dtype, deterministic=True)
    pictures = list(torch.rand(64, 3, 84, 112, device="cuda"))
    together = scorer.distributions(pictures).probabilities
    assert torch.equal(together[9:10], scorer.distributions([pictures[9]]).probabilities)


def test_too_little_memory_makes_smaller_batches(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cuda", batch_tokens=1 << 30)
    pictures = list(torch.rand(64, 3, 448, 448, device="cuda"))
    expected = [r.score for r in scorer.score(pictures)]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (96 << 20)) / total)
        with pytest.warns(UserWarning, match="do not fit into the free memory"):
            found = [r.score for r in scorer.score(pictures)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == pytest.approx(expected, abs=0.05)
