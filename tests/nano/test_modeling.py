"""The embedded model's class, tiny and random: a Qwen2.5-VL to everything that surrounds it, but for its tower."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, hardtanh
from transformers import AutoModelForImageTextToText

from tolerances import batch_room, relative_error, score_room
from vqr1_metric import visual_quality_r1_score
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.nano import modeling
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of")
SIZES = [(64, 96), (160, 64), (64, 96), (100, 230), (33, 47)]


@pytest.fixture
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]


@pytest.fixture
def tower(tiny_nano: Path) -> modeling.NanoTower:
    return load_model(ModelSpec(str(tiny_nano), device="cpu")).model.model.visual


def config_of(folder: Path) -> PixelConfig:
    return PixelConfig.from_file(folder / "preprocessor_config.json")


def test_patches_become_the_picture_again(tiny_nano: Path, images: list[torch.Tensor]) -> None:
    patches, (_, rows, columns) = to_patches(images[0], config_of(tiny_nano))
    (pixels,) = modeling._pictures(patches[None], (rows, columns))
    assert torch.allclose(pixels, images[0] / 127.5 - 1, atol=1e-6)


def test_tokens_follow_their_picture_whatever_its_size(tower, tiny_nano: Path, images: list[torch.Tensor]) -> None:
    made = [to_patches(image, config_of(tiny_nano)) for image in images]
    grids = torch.tensor([grid for _, grid in made])
    with torch.no_grad():
        together = tower(torch.cat([patches for patches, _ in made]), grids).pooler_output
        alone = torch.cat([tower(patches, torch.tensor([grid])).pooler_output for patches, grid in made])
    assert together.shape == (int(grids.prod(1).sum()), 64)
    assert relative_error(together, alone.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_equal_plain_ones(tower, dtype: torch.dtype) -> None:
    tower = tower.to(dtype)
    x = torch.randn(2, 3, 64, 96).to(dtype).contiguous(memory_format=torch.channels_last)
    for layer in (tower.stem, tower.blocks[2].spread, tower.blocks[2].reduce):
        with torch.no_grad():
            assert modeling._can_fuse(x, layer.weight)
            found = layer(x)
            plain = conv2d(
                x.double(), layer.weight.double(), layer.bias.double(), layer.stride, layer.padding, 1, layer.groups
            )
        plain = hardtanh(plain, 0.0, 6.0) if layer.clipped else plain
        assert relative_error(found, plain) < 4 * torch.finfo(dtype).eps
        x = torch.randn(2, layer.out_channels if layer is tower.blocks[2].spread else 24, 16, 24).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)


def test_faint_noise_is_seen_in_bfloat16(tower) -> None:
    flat = torch.full((1, 3, 64, 64), 0.9)
    noisy = flat + torch.randn(flat.shape) / 255
    with torch.no_grad():
        calm, rough = (tower.bfloat16().pixel_statistics(x)[:, : tower.config.filters].mean() for x in (flat, noisy))
    assert rough > calm + 0.05


def test_numbers_of_a_token_are_local_means_and_deviations(tower) -> None:
    x = torch.randn(1, 3, 64, 96)
    mean, deviation = modeling._local(x, 32).split(3, dim=1)
    block = x[0, 1, 32:, 64:]
    assert mean[0, 1, 1, 2] == pytest.approx(float(block.mean()), abs=1e-6)
    assert deviation[0, 1, 1, 2] == pytest.approx(float(block.std(correction=0)), rel=1e-4)


def test_saved_and_loaded_it_is_the_same(tiny_nano: Path, images: list[torch.Tensor], tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_nano)
    assert type(model) is modeling.NanoForConditionalGeneration
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_nano / name).read_bytes())
    before, after = (QualityScorer(str(folder), device="cpu").score(images) for folder in (tiny_nano, tmp_path))
    assert [result.score for result in before] == [result.score for result in after]
    assert len({result.score for result in before}) == len(images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_a_score_is_its_pictures_own(tiny_nano: Path, images: list[torch.Tensor], dtype: str, attention: str) -> None:
    settings = {"attn_implementation": attention, "batch_tokens": 100_000}
    scorer = QualityScorer(str(tiny_nano), dtype=dtype, device="cpu", **settings)
    room = batch_room(str(tiny_nano), dtype, images, **settings)
    alone = [scorer.score(image)[0].score for image in images]
    assert [result.score for result in scorer.score(images)] == pytest.approx(alone, abs=room)


def test_it_generates_what_it_would_say_without_a_cache(tiny_nano: Path, images: list[torch.Tensor]) -> None:
    scorer = QualityScorer(str(tiny_nano), device="cpu", dtype="float64")
    model, backend = scorer.backend.model, scorer.backend
    inputs = backend._inputs(images[:1], scorer.pixel_config, False, None, False)
    written = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            output = model(
                input_ids=ids,
                mm_token_type_ids=(ids == backend._image_token).int(),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
            )
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize("mode", ["think", "sample"])
def test_it_thinks_and_samples(tiny_nano: Path, images: list[torch.Tensor], mode: str) -> None:
    scorer = QualityScorer(str(tiny_nano), mode, num_samples=2, max_new_tokens=6, device="cpu", seed=1)
    first, second = (scorer.score(images[:2]) for _ in range(2))
    said = [[reply.reasoning for reply in result.replies] for result in first]
    assert said == [[reply.reasoning for reply in result.replies] for result in second]
    assert all(len(replies) == 2 for replies in said)


def test_gradients_reach_the_pixels(tower, tiny_nano: Path) -> None:
    tower, grid = tower.double(), torch.tensor([[1, 2, 3]])
    patches = (2 * torch.rand(6, 3072, dtype=torch.float64) - 1).requires_grad_()
    weight = torch.randn(6, 64, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((tower(patches, grid).pooler_output * weight).sum(), patches)
    direction, step = torch.randn_like(gradient), 1e-7
    with torch.no_grad():
        above, below = ((tower(patches + s * step * direction, grid).pooler_output * weight).sum() for s in (1, -1))
    assert float(above - below) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)
    image = torch.rand(1, 3, 64, 96, requires_grad=True)
    score = visual_quality_r1_score(image, QualityScorer(str(tiny_nano), device="cpu"), differentiable=True)
    (gradient,) = torch.autograd.grad(score, image)
    assert bool(gradient.isfinite().all()) and bool((gradient != 0).float().mean() > 0.9)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_it_scores(tiny_nano: Path, images: list[torch.Tensor], quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    results = QualityScorer(str(tiny_nano), quantization=quantization, device="cpu").score(images[:2])
    assert all(1 <= result.score <= 5 for result in results)


def test_scores_do_not_depend_on_memory_layout(tiny_nano: Path, images: list[torch.Tensor]) -> None:
    scorer = QualityScorer(str(tiny_nano), device="cpu")
    turned = images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert scorer.score(turned)[0].score == pytest.approx(scorer.score(images[0])[0].score, abs=score_room())
