"""What a student learns of a teacher: the losses by hand, the files, and whole runs with and without ratings."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqr1_metric import QualityScorer
from vqr1_metric.cli import main
from vqr1_metric.functional.distribution import GRID_SIZE, score_grid
from vqr1_metric.ratings import RatingError
from vqr1_metric.score_files import RecordWriter
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.data import prepare_data
from vqr1_metric.train_ranker.distill import distill_loss, normal_distribution, read_teacher
from vqr1_metric.train_ranker.run import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def outcome(*masses: tuple[float, float], unreadable: float = 0.0) -> torch.Tensor:
    """Probabilities of 401 scores and of "not readable", ``(1, 402)``."""
    found = torch.zeros(1, GRID_SIZE + 1, dtype=torch.float64)
    for score, mass in masses:
        found[0, round((score - 1) * 100)] = mass * (1 - unreadable)
    found[0, -1] = unreadable
    return found


def test_the_losses_by_hand() -> None:
    target = outcome((2.0, 0.5), (4.0, 0.5))[:, :-1]
    other = outcome((2.5, 0.5), (4.5, 0.5))
    assert float(distill_loss(other, target, "wasserstein")) == pytest.approx(0.5)
    assert float(distill_loss(other, target, "mean")) == pytest.approx(0.25)
    assert float(distill_loss(outcome((3.0, 1.0)), target, "wasserstein")) == pytest.approx(1.0)
    assert float(distill_loss(outcome((3.0, 1.0)), target, "mean")) == pytest.approx(0.0)  # a mean hides the spread
    half = outcome((2.0, 0.25), (4.0, 0.75), unreadable=0.2)
    entropy = -(0.5 * math.log(0.25 * 0.8) + 0.5 * math.log(0.75 * 0.8))
    assert float(distill_loss(half, target, "cross_entropy")) == pytest.approx(entropy)
    assert float(distill_loss(half, target, "wasserstein")) == pytest.approx(0.8 * 0.5 + 0.2 * 4)
    assert float(distill_loss(half, target, "mean")) == pytest.approx(0.8 * 0.25 + 0.2 * 16)


@pytest.mark.parametrize("kind", ["cross_entropy", "wasserstein", "mean"])
def test_the_gradient_leads_to_the_teacher(kind: str) -> None:
    target = normal_distribution(3.4, 0.5).double()[None]
    logits = torch.zeros(1, GRID_SIZE + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        distill_loss(logits.softmax(-1), target, kind).sum().backward()
        optimizer.step()
    found = logits.detach().softmax(-1)
    assert float(found[0, -1]) < 0.01
    assert float(found[0, :-1] @ score_grid(dtype=torch.float64) / found[0, :-1].sum()) == pytest.approx(3.4, abs=0.02)


def test_a_normal_distribution_on_the_grid() -> None:
    grid = score_grid(dtype=torch.float64)
    wide = normal_distribution(3.2, 0.4).double()
    mean = float(wide @ grid)
    assert mean == pytest.approx(3.2, abs=1e-3) and float(wide @ (grid - mean) ** 2) == pytest.approx(0.16, abs=1e-3)
    exact = normal_distribution(2.345, 0.0)
    assert exact[134] == pytest.approx(0.5, abs=1e-4) and exact[135] == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(ValueError, match=r"a score of 7"):
        normal_distribution(7.0, 1.0)


def test_what_a_teachers_file_may_hold(rated: Path, tmp_path: Path) -> None:
    uniform = [1 / GRID_SIZE] * GRID_SIZE
    lines = [
        {"path": str(rated / "0.png"), "score": 3.0, "probabilities": uniform},
        {"path": "1.png", "score": 2.5, "std": 0.3},
        {"path": "2.png", "score": None, "probabilities": None, "error": "cannot be read"},
    ]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (s,) = read_teacher([file], [rated])
    assert [image.mos for image in s.images] == [pytest.approx(3.0), pytest.approx(2.5, abs=1e-3)]
    assert [image.path for image in s.images] == [rated / "0.png", rated / "1.png"]
    for line, message in [
        ({"path": "0.png", "probabilities": [1.0]}, r"line 1, but got .*401"),
        ({"path": "0.png", "score": 9}, "a score of 9"),
        ({"score": 3}, "KeyError"),
        ({"path": "gone.png", "score": 3}, "gone.png is not in"),
    ]:
        file.write_text(json.dumps(line) + "\n")
        with pytest.raises(RatingError, match=message):
            read_teacher([file], [rated])
    with pytest.raises(RatingError, match="Expected a file of scores"):
        read_teacher([tmp_path / "none.jsonl"])


@pytest.fixture(scope="module")
def teacher(rated: Path, warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the warm model says of all pictures, as `vqr1 score -o` writes it."""
    file = tmp_path_factory.mktemp("teacher") / "scores.jsonl"
    scorer = QualityScorer(str(warm_model), max_pixels=56 * 56)
    with RecordWriter(file) as writer:
        for result in scorer.stream(rated / f"{i}.png" for i in range(24)):
            writer.write(result)
    return file


@pytest.mark.parametrize("kind", ["cross_entropy", "wasserstein"])
def test_a_student_comes_to_say_what_its_teacher_says(
    kind: str, teacher: Path, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    """The teacher's weights with noise; images without ratings."""
    from vqr1_metric.backends.loading import ModelSpec, load_model
    from vqr1_metric.train_ranker.processor import RankerProcessor

    loaded = load_model(ModelSpec(str(warm_model), device="cpu"))
    with torch.no_grad():
        for weight in loaded.model.model.language_model.layers.parameters():
            if weight.ndim == 2:
                weight += 0.5 * weight.std() * torch.randn(weight.shape)
    student = tmp_path / "student"
    loaded.model.save_pretrained(student)
    RankerProcessor(loaded, []).save_pretrained(student)
    more = {"data": [], "teacher": [str(teacher)], "objective": "distill", "distill_loss": kind, "micro_batch": 8}
    size = {
        "images_per_device": 24,
        "images_per_comparison": 24,
        "max_steps": 12,
        "kl_weight": 0.0,
    }
    config = RankerConfig(
        **{
            **settings,
            **more,
            **size,
            "model": str(student),
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-3,
        }
    )
    train(config)
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    apart = [entry["distill"] for entry in log if "distill" in entry]
    assert len(apart) == 12 and apart[-1] < apart[0] - 0.01


def test_a_teacher_beside_ratings_on_the_command_line(
    teacher: Path, rated: Path, warm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size = ["--images-per-device", "4", "--images-per-comparison", "4", "--max-pixels", "3136", "--max-steps", "3"]
    command = ["train", "--preset", "nano", "--objective", "distill", "--teacher", str(teacher), *size]
    command += ["--data", str(rated / "noise.csv"), "--images", str(rated), "--model", str(warm_model)]
    assert (
        main([*command, "--validation-fraction", "0.34", "--set", "logging_steps=1", "-o", str(tmp_path / "out")]) == 0
    )
    assert "SRCC noise " in capsys.readouterr().out
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any("eval_srcc_scores" in entry and "eval_srcc_noise" in entry for entry in log)
    before, after = (load_file(folder / "model.safetensors") for folder in (warm_model, tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_teachers_pictures_stay_beside_ratings_wherever_the_folder_lies(rated: Path, tmp_path: Path) -> None:
    """Of any seed and place: what ratings hold out is held out of the teacher's file too, and its split is the same."""
    for seed in range(5):
        splits = []
        for place in ("here", f"another/{seed}"):
            folder = tmp_path / place
            if not folder.exists():
                shutil.copytree(rated, folder)
            lines = [{"path": str(folder / f"{i}.png"), "score": 1 + i / 8, "std": 0.3} for i in range(24)]
            (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            config = RankerConfig(
                data=[str(folder / "noise.csv")],
                images=[str(folder)],
                teacher=[str(folder / "scores.jsonl")],
                objective="distill",
                images_per_device=4,
                images_per_comparison=4,
                validation_fraction=0.34,
                seed=seed,
            )
            sides = [{s.name: {Path(i.name).name for i in s.images} for s in sets} for sets in prepare_data(config)]
            assert all(side["noise"] <= side["scores"] for side in sides)
            assert len(sides[0]["scores"]) + len(sides[1]["scores"]) == 24
            splits.append(sides)
        assert splits[0] == splits[1]
