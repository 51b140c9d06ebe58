"""Our preprocessing against the models' own image processor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.images import load_image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN2_5 = PixelConfig(14, 2, 2, 56 * 56, 28 * 28 * 1280, CLIP_MEAN, CLIP_STD)
QWEN3 = PixelConfig(16, 2, 2, 65536, 16777216, (0.5,) * 3, (0.5,) * 3)


def photograph_like(width, height):
    """Smooth structure and fine texture, uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)], -1)
    noise = np.random.default_rng(0).normal(0, 0.15, (height, width, 3))
    return ((waves + noise + 2) / 4 * 255).clip(0, 255).astype(np.uint8)


def own_processor(config):
    return Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=list(config.mean),
        image_std=list(config.std),
    )


@pytest.mark.parametrize("config", [QWEN2_5, QWEN3], ids=["qwen2.5", "qwen3"])
@pytest.mark.parametrize("size", [(640, 480), (1700, 1300), (30, 500), (17, 11), (252, 280), (224, 224)])
def test_equals_the_models_own_processor_within_rounding(config, size):
    picture = photograph_like(*size)
    expected = own_processor(config)(Image.fromarray(picture), return_tensors="pt")
    patches, grid = to_patches(load_image(picture), config)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    # Undo the normalisation. Pillow rounds after each of its two passes: up to 1.1 grey levels apart, a third on
    # average.
    std = torch.tensor(config.std).repeat_interleave(config.temporal_patch_size * config.patch_size**2)
    difference = ((patches - expected["pixel_values"]) * std).abs() * 255
    assert difference.max() <= 1.15
    assert difference.mean() <= 0.4


def test_no_resize_no_difference():
    picture = photograph_like(280, 252)
    expected = own_processor(QWEN2_5)(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_patches(load_image(picture), QWEN2_5)[0], expected, atol=1e-6, rtol=1e-5)


def test_uint8_and_float_pixels_agree():
    picture = load_image(photograph_like(300, 200))
    torch.testing.assert_close(
        to_patches(picture, QWEN2_5)[0], to_patches(picture.float() / 255, QWEN2_5)[0], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(1, 1), (5000, 30), (27, 27), (4000, 3000), (20000, 150), (200, 1)])
def test_sizes_fit_the_grid_and_the_limits(size):
    height, width = QWEN2_5.target_size(size[1], size[0])
    assert height % 28 == 0 and width % 28 == 0
    assert QWEN2_5.min_pixels <= height * width
    assert height * width <= QWEN2_5.max_pixels or min(height, width) == 28
    assert QWEN2_5.visual_tokens(size[1], size[0]) == height * width // 784


def test_aspect_ratio_is_refused():
    with pytest.raises(ValueError, match="aspect ratio"):
        QWEN2_5.target_size(1, 5000)


def test_gradients_against_finite_differences():
    config = PixelConfig(4, 2, 2, 64, 1024, CLIP_MEAN, CLIP_STD)
    pixels = torch.rand(3, 11, 13, dtype=torch.float64, requires_grad=True) * 0.6 + 0.2
    weights = torch.randn_like(to_patches(pixels, config, torch.float64)[0].detach())
    assert torch.autograd.gradcheck(
        lambda x: (to_patches(x, config, torch.float64)[0] * weights).sum(), pixels.detach().requires_grad_()
    )


def test_reads_old_and_new_configurations(tmp_path):
    old = {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    new = {**old, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    del new["min_pixels"], new["max_pixels"]
    configs = []
    for name, values in (("a.json", old), ("b.json", new), ("c.json", {"image_processor": new})):
        (tmp_path / name).write_text(json.dumps(values))
        configs.append(PixelConfig.from_file(tmp_path / name))
    assert configs[0] == configs[1] == configs[2]
    del new["patch_size"]
    (tmp_path / "d.json").write_text(json.dumps(new))
    with pytest.raises(ValueError, match="'patch_size' is missing"):
        PixelConfig.from_file(tmp_path / "d.json")


def test_limits():
    assert QWEN2_5.with_limits(max_pixels=784 * 4).max_pixels == 784 * 4
    assert QWEN2_5.with_limits() == QWEN2_5
    with pytest.raises(ValueError, match="max_pixels"):
        QWEN2_5.with_limits(max_pixels=100)
