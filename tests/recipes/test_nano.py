"""The recipe: fast tower equal to the library's, losses, and a whole tiny run that ends in a loadable folder."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from recipes.nano import __main__ as recipe
from recipes.nano import finetune, widen
from recipes.nano.build import MAX_PIXELS, MIN_PIXELS, build_model, save_folder
from recipes.nano.data import Batches, Rated, assumed_score, load_rated
from recipes.nano.features import STATISTICS, classical_features, statistics
from recipes.nano.objectives import fidelity_loss, ladder_loss
from recipes.nano.prepare import RUNGS, prepare
from recipes.nano.pretrain import PooledHead
from recipes.nano.start import centre_tokens, filters, start_merger
from recipes.nano.teacher import components, cross_fitted, kernel_ridge
from recipes.nano.tokenizer import build_tokenizer
from recipes.nano.tower import FastTower
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.pixels import to_patches as library_patches
from vqr1_metric.images.distortions import distort
from vqr1_metric.scorer import QualityScorer

PIXELS = PixelConfig(16, 2, 1, MIN_PIXELS, MAX_PIXELS, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    """nano with starting weights."""
    return build_model(seed=1).eval()


def _pictures(count: int, size: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (count, 3, size // 8, size // 8), dtype=np.uint8)).float()
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize("size", [128, 384])
def test_fast_tower_equals_the_library(model, size: int) -> None:
    images = _pictures(2, size)
    patches, grids = zip(*(library_patches(image, PIXELS) for image in images), strict=True)
    with torch.no_grad():
        theirs = model.model.visual(torch.cat(patches), grid_thw=torch.tensor(grids)).pooler_output
        mine = FastTower(model.model.visual)(images).flatten(0, 1)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_readout_of_training_equals_that_of_scoring(model, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "nano")
    # The folder holds fp16 weights; train from those, so that both sides have the same numbers.
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    forward = finetune.ReadoutForward(loaded, build_tokenizer()).eval()
    images = _pictures(2, 256)
    with torch.no_grad():
        mine, _, _ = forward(images, forward.answers(torch.tensor([3.0, 4.25])))
    scorer = QualityScorer(str(folder))
    scorer.backend.use_trie(forward.trie)  # a random model uses all spellings, training knows the plain one
    theirs = scorer.distributions(list(images))
    torch.testing.assert_close(mine.probabilities, theirs.probabilities, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(mine.tag_probability, theirs.tag_probability, atol=1e-5, rtol=1e-3)


def test_filters_are_independent_and_but_the_signed_luminance_blind_to_grey() -> None:
    made = filters().flatten(1)
    assert torch.linalg.matrix_rank(made[3:]) == len(made) - 3  # the signed chroma are there twice
    grey = made.sum(1)
    assert grey[0] > 1
    assert grey[1:].abs().max() < 1e-9


@torch.no_grad()
def test_tower_starts_with_clipped_sizes_of_the_coefficients(model) -> None:
    images = _pictures(3, 128)
    tower = FastTower(model.model.visual)
    stream = tower.patches(images)
    patches = (images.float() / 255 - 0.5) / 0.5
    patches = patches.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    size = (patches.double() @ filters().flatten(1).T).abs()[..., 3:]
    for place, limits in ((127, (0.1, 0.4)), (3, (1.6, 6.4))):
        wanted = sum((size / limit).clamp(max=1) for limit in limits).mean((0, 1))
        got = stream[..., place : place + 124].double().mean((0, 1))
        assert torch.corrcoef(torch.stack([wanted, got]))[0, 1] > 0.97
        assert (wanted - got).abs().mean() < 0.15
    torch.testing.assert_close(stream[..., -1], torch.full_like(stream[..., -1], 256.0), atol=1.0, rtol=0)


@torch.no_grad()
def test_tokens_start_centred_with_the_wanted_spread_and_a_constant() -> None:
    visual = build_model(seed=2).model.visual
    tower, images = FastTower(visual), _pictures(12, 128)
    start_merger(visual, visual.merger.ln_q(tower.patches(images)).mean(1))
    head = PooledHead(192, 4).eval()
    head.start(tower(images).mean(1))
    score, _ = head(tower(images))
    centre_tokens(visual, head.norm, spread=0.3, constant=16.0)
    pooled = tower(images).mean(1)
    assert (pooled[:, -1] == 16).all()
    torch.testing.assert_close(pooled[:, :-1].mean(0), torch.zeros(191), atol=1e-3, rtol=0)
    assert pooled[:, :-1].var(0).mean().sqrt().item() == pytest.approx(0.3, rel=0.05)
    assert (head(tower(images))[0] - score).abs().max() < 0.2  # all but the last place tell the head what they told


def test_teacher_predicts_pictures_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.arange(200)
    table = torch.randn(200, 6, generator=generator)
    scores = table[:, 0] + 0.5 * table[:, 1] ** 2
    expected = cross_fitted(table, scores, picture)
    assert torch.corrcoef(torch.stack([expected, scores]))[0, 1] > 0.8
    shuffled = cross_fitted(table, scores[torch.randperm(200, generator=generator)], picture)
    assert torch.corrcoef(torch.stack([shuffled, scores]))[0, 1].abs() < 0.3
    memory = kernel_ridge(table, scores, table)
    assert (memory - scores).abs().mean() < (expected - scores).abs().mean()


def test_components_keep_what_varies_most() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    table = hidden + 0.01 * torch.randn(300, 9, generator=generator)
    directions, values = components(table - table.mean(0), kept=3)
    told = (table - table.mean(0)) @ directions
    assert told.square().mean().item() == pytest.approx(1, rel=1e-3)
    assert values[2] < 0.01 * values[1]
    assert told[:, 2].std() < told[:, 1].std()


def test_features_see_blur_noise_and_colour() -> None:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:128, 0:128]
    scene = np.stack([128 + 100 * np.sin(x / 5), 128 + 80 * np.cos(y / 7), 40 + x], -1) + rng.normal(
        0, 6, (128, 128, 3)
    )
    scene = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    names = (None, "blur", "noise", "colour")
    versions = [scene if name is None else distort(scene, name, 5) for name in names]
    batch = torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in versions])
    features = classical_features(batch)
    assert features.shape == (4, 119)
    assert features.isfinite().all()
    assert ((features[1:] - features[0]).abs().amax(1) > 0.1).all()
    torch.testing.assert_close(classical_features(batch[1:2])[0], features[1], atol=1e-4, rtol=1e-4)


def test_fidelity_loss_rewards_the_right_order_and_has_finite_gradients() -> None:
    target, variance = torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.full((4,), 0.01)
    right = torch.tensor([1.0, 2.0, 3.0, 3.0], requires_grad=True)
    wrong = torch.tensor([3.0, 2.0, 1.0, 1.0], requires_grad=True)
    good, bad = fidelity_loss(right, variance, target), fidelity_loss(wrong, variance, target)
    assert good < 0.01 < 0.5 < bad
    (good + bad).backward()
    assert right.grad.isfinite().all()
    assert wrong.grad.isfinite().all()


def test_ladder_loss_compares_within_a_scene_only() -> None:
    scene, level = torch.tensor([-1, 0, 0, 1, 1]), torch.tensor([0.0, 0.0, 4.0, 0.0, 8.0])
    falling = ladder_loss(torch.tensor([1.0, 4.0, 2.0, 2.5, 1.0]), scene, level)
    rising = ladder_loss(torch.tensor([1.0, 2.0, 4.0, 1.0, 2.5]), scene, level)
    assert falling < 0.01 < 1 < rising
    assert ladder_loss(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0.0, 3.0])) == 0


def test_assumed_scores_fall_to_the_worst_and_less_for_colour() -> None:
    assert assumed_score(4.0, "blur", 0) == 4.0
    assert assumed_score(4.0, "blur", 8) == pytest.approx(1.2)
    assert assumed_score(4.0, "colour", 8) > 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Five crops and four ladders of 128x128."""
    rated = Rated(_pictures(4, 256).permute(0, 2, 3, 1).numpy(), np.array([1.5, 2.0, 3.0, 4.0]), list("abcd"))
    folder = tmp_path_factory.mktemp("prepared")
    prepare(rated, [], 128, (5, 4), folder, seed=3, report=lambda line: None)
    return folder


def test_prepared_crops_carry_their_statistics(prepared: Path) -> None:
    crops, table = (np.load(prepared / f"rated_{name}.npy") for name in ("crops", "statistics"))
    assert crops.shape == (5, 128, 128, 3)
    again = statistics(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(torch.from_numpy(table), again, atol=1e-4, rtol=1e-4)
    assert np.load(prepared / "ladder_statistics.npy").shape == (4, RUNGS, STATISTICS)
    assert (np.diff(np.load(prepared / "ladder_level.npy"), axis=1) > 0).all()
    assert np.load(prepared / "rated_picture.npy").tolist() == [0, 1, 2, 3, 0]


def test_prepared_folder_is_made_once(prepared: Path) -> None:
    before = (prepared / "rated_crops.npy").stat().st_mtime_ns
    prepare(Rated(np.zeros((1, 128, 128, 3), np.uint8), np.ones(1), ["x"]), [], 128, (5, 4), prepared)
    assert (prepared / "rated_crops.npy").stat().st_mtime_ns == before


def test_batches_are_a_function_of_the_seed(prepared: Path) -> None:
    targets = torch.randn(5, 7), torch.randn(4, RUNGS, 7)
    opinions = torch.tensor([1.5, 2.0, 3.0, 4.0, 1.5])
    first, again = (next(iter(Batches(prepared, opinions, targets, 2, 2, seed=5))) for _ in range(2))
    assert first["images"].shape == (2 + 2 * RUNGS, 3, 128, 128)
    assert first["targets"].shape == (2 + 2 * RUNGS, 7)
    assert all(torch.equal(first[name], again[name]) for name in ("images", "scores", "level"))
    for number in range(2):
        rungs = first["scene"] == number
        assert (first["level"][rungs].diff() > 0).all()
        assert (first["scores"][rungs].diff() < 0).all()


@pytest.fixture
def rated_folder(tmp_path: Path) -> Path:
    """Twelve noisy pictures of 128x128 with labels that fall with the noise."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(12):
        y, x = np.mgrid[0:128, 0:130]
        scene = np.stack([128 + 90 * np.sin(x / (5 + number)), 100 + y, 200 - x], -1) + rng.normal(
            0, 1 + 4 * number, (128, 130, 3)
        )
        Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "split": "val" if number % 4 == 3 else "train", "mos": 1 - number / 12})
    with open(tmp_path / "labels.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "split", "mos"])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


# A model of a few steps leaves the answer grammar, of which scoring warns.
@pytest.mark.filterwarnings("ignore:.*answers would be a score:UserWarning")
def test_recipe_trains_a_few_steps_and_writes_a_folder_that_loads(rated_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    for number, picture in enumerate(_pictures(2, 256)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(pristine / f"{number}.png")
    common = ["--data", str(rated_folder / "labels.csv"), "--images", str(rated_folder), "-o", str(output)]
    common += ["--pristine", str(pristine), "--crops", "16", "4", "--rated-crops", "3", "--ladders", "2"]
    common += ["--workers", "1", "--threads", "1", "--every", "1", "--wide-steps", "1"]
    recipe.main([*common, "--steps", "2", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("stage")] == [
        ["stage", "1", "step", "1"],
        ["stage", "1", "step", "2"],
        ["stage", "2", "step", "1"],
    ]
    assert "nan" not in "".join(lines)
    score = QualityScorer(str(output)).score(str(rated_folder / "0.png"))[0]
    assert 1 <= score.score <= 5

    started = recipe.main([*common, "--steps", "0", "1", "--start", str(output / "stage1.safetensors")])
    assert "stage 2 step 1" in capsys.readouterr().out
    assert (started / "model.safetensors").stat().st_size < 12_000_000


def test_widening_changes_the_language_model_alone(rated_folder: Path, model, tmp_path: Path, capsys) -> None:
    start = save_folder(model, tmp_path / "start")
    (tmp_path / "pristine").mkdir()
    for number, picture in enumerate(_pictures(2, 256)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "pristine" / f"{number}.png")
    paths = {"--model": start, "--data": rated_folder / "labels.csv", "--images": rated_folder}
    paths |= {"--pristine": tmp_path / "pristine", "-o": tmp_path / "wide"}
    arguments = [str(part) for pair in paths.items() for part in pair]
    wide = widen.main([*arguments, "--steps", "25", "--rated", "3", "--ladders", "2"])
    assert "step 25" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (start, wide))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("visual") for name in changed)
    assert QualityScorer(str(wide)).pixel_config.max_pixels == widen.MAX_PIXELS


def test_labels_are_checked(rated_folder: Path) -> None:
    labels = rated_folder / "labels.csv"
    with pytest.raises(ValueError, match="split 'test'"):
        load_rated(labels, rated_folder, "test")
    labels.write_text("image,mos\n0.png,0.5\n")
    with pytest.raises(ValueError, match="split is missing"):
        load_rated(labels, rated_folder, "train")
    labels.write_text("image,split,mos\n0.png,train,55\n")
    with pytest.raises(ValueError, match="between 0 and 1"):
        load_rated(labels, rated_folder, "train")


def test_no_warnings_from_a_training_step(model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            tokens = FastTower(model.model.visual)(_pictures(1, 128))
    assert tokens.isfinite().all()
