"""Packed pictures are read out as with the dense mask, and hold no padding."""

import pytest
import torch

from vqr1_metric.backends import packing
from vqr1_metric.backends.loading import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend

#: A thousand roundings of float32 in the same direction; in float64 transformers rounds norms to float32 alike in both.
ROUNDING = 1024 * torch.finfo(torch.float32).eps
SIZES = [(112, 140), (224, 84), (84, 84), (112, 140), (56, 200)]


def backends(folder, dtype: str) -> tuple[TransformersBackend, TransformersBackend, object]:
    dense, packed = (
        TransformersBackend(ModelSpec(str(folder), device="cpu", dtype=dtype, attn_implementation=attention))
        for attention in ("sdpa", "packed")
    )
    return dense, packed, dense.pixel_config.with_limits(min_pixels=56 * 56)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROUNDING), ("float64", 1e-11)])
@pytest.mark.parametrize("replies", [None, [f"<think>\nseen {'twice ' * i}</think>\n" for i in range(len(SIZES))]])
def test_equals_the_dense_mask(tiny_model, dtype: str, tolerance: float, replies):
    dense, packed, config = backends(tiny_model, dtype)
    pictures = [torch.rand(3, *size) for size in SIZES]
    expected = dense.distributions(pictures, config, replies=replies)
    found = packed.distributions(pictures, config, replies=replies)
    for name in ("probabilities", "coverage", "tag_probability"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=tolerance)
    assert float(expected.probabilities.std(0).max()) > 1e-3  # the pictures differ


def test_gradients_equal_those_of_the_dense_mask(tiny_model):
    pictures = [torch.rand(3, *size, dtype=torch.float64).requires_grad_() for size in SIZES[:3]]
    gradients = []
    *both, config = backends(tiny_model, "float64")
    for backend in both:
        with torch.enable_grad():
            backend.distributions(pictures, config).mean.sum().backward()
        gradients.append([picture.grad.clone() for picture in pictures])
        for picture in pictures:
            picture.grad = None
    assert all(float(grad.abs().max()) > 0 for grad in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10 * float(expected.abs().max()), rtol=1e-8)


def test_no_row_is_padding(tiny_qwen2_5_vl, monkeypatch):
    *_, backend, config = backends(tiny_qwen2_5_vl, "float32")
    rows = []
    layer = backend.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:2]))
    pictures = [torch.rand(3, *size) for size in SIZES]
    backend.trie  # noqa: B018  its own pass, on the calibration picture
    rows.clear()
    backend.distributions(pictures, config)
    tokens = sum(backend.sequence_length(config.visual_tokens(*size), False) for size in SIZES)
    assert rows == [(1, tokens)]


def test_a_picture_does_not_see_the_others(tiny_qwen2_5_vl):
    _, backend, config = backends(tiny_qwen2_5_vl, "float64")
    pictures = [torch.rand(3, *size) for size in SIZES]
    before = backend.distributions(pictures, config).probabilities
    pictures[1] = 1 - pictures[1]
    after = backend.distributions(pictures, config).probabilities
    changed = (after - before).abs().amax(1)
    assert float(changed[1]) > 1e-4 and float(changed[[0, 2, 3, 4]].max()) < 1e-12


def test_sampling_attends_as_before(tiny_qwen2_5_vl):
    from vqr1_metric.backends.base import Sampling

    dense, packed, config = backends(tiny_qwen2_5_vl, "float64")
    pictures = [torch.rand(3, *size) for size in SIZES[:3]]
    options = {"thinking": False, "add_vision_id": False}
    sampling = Sampling(num_samples=2, max_new_tokens=8)
    expected = dense.sample_replies(pictures, config, sampling, **options)
    assert packed.sample_replies(pictures, config, sampling, **options) == expected


def test_prompts_are_asked_for_as_causal_windows(tiny_qwen2_5_vl, monkeypatch):
    _, backend, config = backends(tiny_qwen2_5_vl, "float32")
    backend.trie  # noqa: B018
    asked = []
    attend = packing.windowed_attention

    def recorded(query, key, value, starts, scale, *, causal):
        asked.append((query.shape[0], starts.tolist(), causal))
        return attend(query, key, value, starts, scale, causal=causal)

    monkeypatch.setattr(packing, "windowed_attention", recorded)
    backend.distributions([torch.rand(3, *size) for size in SIZES[:2]], config)
    lengths = [
        backend.sequence_length(config.visual_tokens(*size), False) - len(backend.trie) - 1 for size in SIZES[:2]
    ]
    assert asked == [(sum(lengths), [0, lengths[0], sum(lengths)], True)] * 2  # two layers
