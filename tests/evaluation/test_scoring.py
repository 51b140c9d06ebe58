"""Cached scores: nothing twice, nothing mixed, the same by one process and by two."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_files import run_processes, save_picture
from PIL import Image
from stub_scorer import LinearBackend

from vqr1_metric.evaluation import scoring
from vqr1_metric.evaluation.baselines import BASELINES, baseline_scores
from vqr1_metric.evaluation.ladder import ladder_pictures
from vqr1_metric.evaluation.pictures import reduce_short_edge
from vqr1_metric.evaluation.thumbnails import thumbnail
from vqr1_metric.ratings import RatedImage
from vqr1_metric.scorer import QualityScorer


def items(folder: Path, count: int) -> list[RatedImage]:
    return [RatedImage(f"{i}.png", path=save_picture(folder / f"{i}.png", (i + 1) / 26)) for i in range(count)]


def test_cache_holds_pictures_by_content(tmp_path: Path) -> None:
    backend = LinearBackend()
    scorer = QualityScorer(backend=backend)
    pictures = items(tmp_path, 3)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    pictures.append(RatedImage("copy.png", path=tmp_path / "copy.png"))
    pictures.append(RatedImage("gone.png", path=tmp_path / "gone.png"))
    done = []
    rows = scoring.score_items(scorer, pictures, tmp_path / "cache", progress=done.append)
    assert backend.pictures == 3 and sum(done) == 4
    assert rows[0]["score"] == rows[3]["score"] and rows[3]["path"].endswith("copy.png")
    assert rows[4]["score"] is None and rows[4]["error"] == "no such file"
    assert scoring.score_items(scorer, pictures, tmp_path / "cache") == rows and backend.pictures == 3
    save_picture(tmp_path / "1.png", 0.9)  # another picture under an old name
    assert scoring.score_items(scorer, pictures, tmp_path / "cache")[1]["score"] > 4 and backend.pictures == 4


def test_cache_keeps_settings_apart(tmp_path: Path) -> None:
    backend = LinearBackend()
    pictures = items(tmp_path, 2)
    settings = [{}, {"max_pixels": 10_000}, {"mode": "sample"}, {"mode": "sample", "seed": 1}]
    for setting in settings:
        rows = scoring.score_items(QualityScorer(backend=backend, **setting), pictures, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4 and backend.pictures == 4
    assert rows[0]["replies"][0]["reasoning"] == "Red 0." and rows[0]["score"] == round(rows[0]["score"], 4)
    backend.revision = "2"
    scoring.score_items(QualityScorer(backend=backend), pictures, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5 and backend.pictures == 6


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 2)
    backend = LinearBackend()
    scorer = QualityScorer(backend=backend)
    pictures = items(tmp_path, 6)
    whole = scoring.score_items(scorer, pictures, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/scores-0.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # killed within a line
    backend.pictures = 0
    assert scoring.score_items(scorer, pictures, tmp_path / "cache") == whole
    assert backend.pictures == 3


def test_pictures_are_reduced_to_the_short_edge(tmp_path: Path) -> None:
    backend = LinearBackend()
    large = save_picture(tmp_path / "large.png", 0.5, (90, 60))
    small = save_picture(tmp_path / "small.png", 0.5, (20, 24))
    pictures = [RatedImage("large.png", path=large), RatedImage("small.png", path=small)]
    scoring.score_items(QualityScorer(backend=backend), pictures, tmp_path / "cache", short_edge=30)
    assert sorted(backend.sizes) == [(24, 20), (30, 45)]
    assert reduce_short_edge(Image.new("RGB", (1001, 1500)), 768).size == (768, 1151)
    scores = baseline_scores(large), baseline_scores(large, 30)
    assert scores[0]["contrast"] > scores[1]["contrast"]


def test_a_file_of_floats_is_a_picture_everywhere(tmp_path: Path) -> None:
    """The scorer takes floats in [0, 1]; what stands beside it needs 8 bits."""
    random = np.random.default_rng(0)
    levels = random.integers(0, 256, (60, 90), np.uint8)
    eight, floats = tmp_path / "a.png", tmp_path / "b" / "b.tif"
    floats.parent.mkdir()
    Image.fromarray(levels).save(eight)
    Image.fromarray(levels.astype(np.float32) / 255).save(floats)
    assert baseline_scores(floats) == pytest.approx(baseline_scores(eight))
    assert baseline_scores(floats, 30) == pytest.approx(baseline_scores(eight, 30))
    scorer = QualityScorer(backend=LinearBackend())
    rows = scoring.score_items(scorer, [RatedImage("b.tif", path=floats)], tmp_path / "cache", short_edge=30)
    assert not rows[0]["error"] and scorer.backend.sizes == [(30, 45)]
    assert ladder_pictures(floats.parent, ["blur"])[1][1][1]().dtype == np.uint8
    assert thumbnail(floats, tmp_path / "cache") == thumbnail(eight, tmp_path / "cache")


def test_baselines_by_hand(tmp_path: Path) -> None:
    flat, checker = tmp_path / "flat.png", tmp_path / "checker.png"
    Image.new("RGB", (8, 8), (128, 128, 128)).save(flat)
    board = Image.new("L", (8, 8))
    board.putdata([255 * ((i + i // 8) % 2) for i in range(64)])
    board.save(checker)
    assert baseline_scores(flat) == pytest.approx({"log Laplacian variance": -13.8155, "contrast": 0.0}, abs=1e-3)
    # The Laplacian of a chessboard is +-4 x 255, its contrast 255 / 2.
    assert baseline_scores(checker) == pytest.approx({"log Laplacian variance": 13.8554, "contrast": 127.5}, abs=1e-3)
    (tmp_path / "bad.png").write_bytes(b"no")
    assert all(value != value for value in baseline_scores(tmp_path / "bad.png").values()) and len(BASELINES) == 2


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    items(tmp_path / "pictures", 11)
    script = Path(__file__).resolve().parents[1] / "support" / "evaluation_two_processes.py"
    folders = [tmp_path / name for name in ("two", "two", "one")]
    found = run_processes([sys.executable, str(script), str(tmp_path / "pictures"), "cache"], folders)
    first, second, alone = (json.loads(lines[-1]) for lines in found)
    assert first["rows"] == second["rows"] == alone["rows"] and len(alone["rows"]) == 11
    assert (first["pictures"], second["pictures"], alone["pictures"]) == (7, 4, 11)
