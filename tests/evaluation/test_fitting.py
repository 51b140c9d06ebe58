"""What intervals are worth after a calibration, and what a score means beside a reference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_files import save_picture
from stub_scorer import LinearBackend

from vqr1_metric.backends.base import ModelError
from vqr1_metric.cli import main
from vqr1_metric.evaluation import Reference, calibrate, evaluate
from vqr1_metric.evaluation.fitting import fit_temperature, on_score_scale
from vqr1_metric.functional.calibration import Calibration, temper
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid
from vqr1_metric.ratings import RatedImage, RatingError, RatingSet, read_ratings
from vqr1_metric.scorer import QualityScorer


def normal_rows(means: np.ndarray, std: float) -> np.ndarray:
    grid = score_grid().double().numpy()
    rows = np.exp(-0.5 * ((grid - means[:, None]) / std) ** 2)
    return rows / rows.sum(1, keepdims=True)


def test_a_temperature_widens_and_one_changes_nothing() -> None:
    rows = torch.from_numpy(normal_rows(np.array([2.0, 4.5]), 0.2))
    assert torch.allclose(temper(rows, 1.0), rows, atol=1e-6)
    stds = [ScoreDistribution(temper(rows, t)).std[0] for t in (0.5, 1.0, 4.0, 1e6)]
    assert stds == sorted(stds) and float(stds[2]) == pytest.approx(0.4, rel=0.1)
    assert torch.allclose(temper(rows, 1e6), torch.full_like(rows, 1 / 401), atol=1e-5)
    certain = torch.zeros(401).double()
    certain[100] = 1
    assert float(ScoreDistribution(temper(certain, 1e6)).std) > 1  # mass 0 does not stay so
    assert temper(torch.full((401,), math.nan), 2.0).isnan().all()


@pytest.mark.parametrize("error", [0.1, 0.2, 0.6])
def test_the_fit_finds_how_far_off_a_model_is(error: float) -> None:
    random = np.random.default_rng(0)
    means = random.uniform(2, 4, 1000)
    opinions = (means + error * random.standard_normal(1000)).clip(1, 5)
    temperature, coverage, before = fit_temperature(normal_rows(means, 0.2), opinions, [str(i) for i in range(1000)])
    assert math.sqrt(temperature) == pytest.approx(error / 0.2, rel=0.2)
    assert 0.93 <= coverage <= 0.97
    assert before == pytest.approx({0.1: 1.0, 0.2: 0.95, 0.6: 0.49}[error], abs=0.03)


@pytest.mark.parametrize("n", [60, 120])
def test_held_out_coverage_holds_for_small_sets_whole_scenes_and_a_bias(n: int) -> None:
    random = np.random.default_rng(n)
    found = []
    for _ in range(12):
        scene = np.repeat(np.arange(n // 4), 4)
        means = random.uniform(2, 4, n)
        opinions = (means - 0.3 + 0.2 * random.standard_normal(n // 4)[scene] + 0.2 * random.standard_normal(n)).clip(
            1, 5
        )
        found.append(fit_temperature(normal_rows(means, 0.1), opinions, [str(s) for s in scene])[1])
    assert 0.93 <= np.mean(found) <= 0.98


def test_scales_are_told() -> None:
    def rated(*mos: float, lower: bool | None = False) -> RatingSet:
        return RatingSet("s", tuple(RatedImage(f"{m}", m) for m in mos), lower)

    assert on_score_scale(rated(1, 3, 5)).tolist() == [1, 3, 5]
    assert on_score_scale(rated(0, 0.5, 1), (0, 1)).tolist() == [1, 3, 5]
    assert on_score_scale(rated(0, 100), (100, 0)).tolist() == [5, 1]
    assert on_score_scale(rated(1, 5, lower=True)).tolist() == [5, 1]
    with pytest.raises(RatingError, match=r"within 1 to 5, but got 0 to 1: tell the worst"):
        on_score_scale(rated(0, 1))
    with pytest.raises(RatingError, match="dmos"):
        on_score_scale(rated(2, 3, lower=None))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """60 rated pictures, opinions further off than the scorer thinks."""
    random = np.random.default_rng(0)
    lines = ["image,mos"]
    for i in range(60):
        red = 0.2 + 0.6 * i / 60
        save_picture(tmp_path / "pictures" / f"{i}.png", red)
        lines.append(f"{i}.png,{np.clip(1 + 4 * red + 0.5 * random.standard_normal(), 1, 5):.4f}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_scorer_with_a_calibration(many: Path) -> None:
    backend = LinearBackend()
    scorer = QualityScorer(backend=backend)
    ratings = read_ratings(many / "labels.csv", many / "pictures", strict=False)
    found = calibrate(scorer, ratings)
    assert found.images == 60 and found.coverage > found.before and found.temperature > 1
    found.write(many / "calibration.json")
    assert Calibration.read(many) == found == Calibration.read(many / "calibration.json")
    wider = QualityScorer(backend=backend, calibration=many / "calibration.json")
    picture = many / "pictures" / "30.png"
    before, after = scorer.score(picture)[0], wider.score(picture)[0]
    assert after.score == before.score and after.std == before.std
    low, high = (a - b for a, b in zip(after.interval(), before.interval(), strict=True))
    assert low < 0 < high
    assert wider.identity() != scorer.identity() and wider.identity()["calibration"] == found.temperature
    opinions = dict(zip([i.name for i in ratings.images], ratings.quality, strict=True))
    results = wider.score([image.path for image in ratings.images])
    inside = [r.interval()[0] <= opinions[Path(r.name).name] <= r.interval()[1] for r in results]
    assert np.mean(inside) >= 0.95


def test_a_calibration_is_refused_where_it_does_not_belong(many: Path) -> None:
    backend = LinearBackend()
    other = Calibration(2.0, identity={"mode": "think"})
    with pytest.raises(ModelError, match="its mode is 'think' instead of 'score'"):
        QualityScorer(backend=backend, calibration=other).score(many / "pictures" / "1.png")
    with pytest.raises(ValueError, match="a calibration that vqr1 calibrate wrote"):
        QualityScorer(backend=backend, calibration=many / "labels.csv")
    with pytest.raises(ValueError, match="temperature above 0"):
        Calibration(0.0)


def test_the_commands(many: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    scorer = QualityScorer(backend=LinearBackend())
    for command in ("calibrate", "reference"):
        monkeypatch.setattr(f"vqr1_metric.cli.{command}.build_scorer", lambda args: scorer)
    labels = [str(many / "labels.csv"), "--images", str(many / "pictures"), "--silent"]
    assert main(["calibrate", *labels, "-o", str(many / "c.json")]) == 0
    text = capsys.readouterr().out
    assert "60 rated images of labels" in text and "that the fit did not see" in text
    assert Calibration.read(many / "c.json").images == 60
    assert main(["calibrate", *labels, "-o", str(many / "c.json")]) == 1 and "--overwrite" in capsys.readouterr().err
    assert main(["reference", str(many / "pictures"), "-o", str(many / "r.json"), "--silent", "--name", "photos"]) == 0
    assert "60 photos" in capsys.readouterr().out
    assert main(["reference", str(many / "r.json"), "--score", "3", "--score", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "3: better than 51% of 60 photos" in text and "0.5: better than 0%" in text
    (many / "s.csv").write_text("path,score\nx.png,3.0\ny.png,nan\n")
    assert main(["reference", str(many / "r.json"), "--scores", str(many / "s.csv")]) == 0
    assert "x.png" in capsys.readouterr().out


def test_percentiles() -> None:
    found = Reference("r", 1000, tuple(1 + p / 25 for p in range(101)))
    assert [found.percentile(s) for s in (0.0, 1.0, 3.0, 5.0, 6.0)] == [0.0, 0.0, 50.0, 100.0, 100.0]
    assert found.percentile(3.02) == pytest.approx(50.5) and math.isnan(found.percentile(math.nan))
    flat = Reference("r", 20, (1.0,) * 40 + (2.0,) * 21 + (3.0,) * 40)
    assert flat.percentile(2.0) == 50.0
    with pytest.raises(RatingError, match="a reference that vqr1 reference wrote"):
        Reference.read("nowhere.json")


def test_evaluate_as_a_call(many: Path) -> None:
    scorer = QualityScorer(backend=LinearBackend())
    scores = {f"{i}.png": float(i % 7) for i in range(60)}
    report = evaluate(scorer, many / "labels.csv", {"seven": scores}, images=many / "pictures", resamples=20)
    rows = report.table()
    assert [row["scorer"] for row in rows] == ["linear", "seven", "log Laplacian variance", "contrast"]
    assert rows[0]["srcc_low"] < rows[0]["srcc"] < rows[0]["srcc_high"] and "| linear | 60 |" in report.markdown()
    folder = report.save(many / "out")
    assert json.loads((folder / "results.json").read_text()) == report.to_dict()
    alone = evaluate(scores, read_ratings(many / "labels.csv", many / "pictures", strict=False), baselines=False)
    assert [row["scorer"] for row in alone.table()] == ["scores"]
    with pytest.raises(RatingError, match="two scorers are called 'linear'"):
        evaluate(scorer, many / "labels.csv", {"linear": scores}, images=many / "pictures")
    (many / "votes.csv").write_text("a,b,votes_a,votes_b\n" + "".join(f"{i + 1}.png,{i}.png,5,1\n" for i in range(20)))
    votes = evaluate(scorer, many / "votes.csv", images=many / "pictures", baselines=False)
    assert votes.table()[0]["votes_met"] > 0.6 and "ceiling" in votes.markdown()
    (many / "dmos.csv").write_text("image,dmos\n" + "".join(f"{i}.png,{i}\n" for i in range(20)))
    with pytest.raises(RatingError, match="better when lower or higher"):
        evaluate(scorer, many / "dmos.csv", images=many / "pictures")
