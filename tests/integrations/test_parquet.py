"""Scores in Parquet files: all once, resumed, never mixed, whatever the images are called."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stub_scorer import LinearBackend, formula_scorer

from vqr1_metric.images.names import unescape_name
from vqr1_metric.scorer import QualityScorer

pq = pytest.importorskip("pyarrow.parquet")

from vqr1_metric.integrations.parquet import score_to_parquet  # noqa: E402


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(np.full((28, 28, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no")
    return folder


def test_scored_once_and_resumed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "scores"
    assert score_to_parquet(formula_scorer(), [photos], output, rows_per_file=3) == 8
    assert len(list(output.glob("*.parquet"))) == 3 and len(list(output.iterdir())) == 3
    table = pq.read_table(output)
    rows = dict(zip(table["path"].to_pylist(), table["score"].to_pylist(), strict=True))
    expected = {result.name: result.score for result in formula_scorer().score_folder(photos)}
    assert rows == pytest.approx(expected, nan_ok=True)
    errors = dict(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert math.isnan(rows[f"{photos}/bad.png"]) and errors.pop(f"{photos}/bad.png")
    assert set(errors.values()) == {None}
    monkeypatch.chdir(photos)
    Image.new("RGB", (28, 28)).save("new.png")
    scorer = formula_scorer()
    assert score_to_parquet(scorer, ["."], output) == 1 and scorer.backend.pictures == 1


def test_an_interruption_costs_one_file_at_most(photos: Path, tmp_path: Path):
    class Failing(LinearBackend):
        def distributions(self, images, pixel_config, *, replies=None):
            if self.pictures >= 4:
                raise RuntimeError("the machine went away")
            return super().distributions(images, pixel_config)

    scorer = QualityScorer(backend=Failing(), deterministic=True)
    with pytest.raises(RuntimeError, match="went away"):
        score_to_parquet(scorer, [photos], tmp_path / "scores", rows_per_file=2)
    assert pq.read_table(tmp_path / "scores").num_rows == 4
    again = QualityScorer(backend=LinearBackend(), deterministic=True)
    assert score_to_parquet(again, [photos], tmp_path / "scores") == 4
    paths = pq.read_table(tmp_path / "scores")["path"].to_pylist()
    assert len(paths) == len(set(paths)) == 8


def test_models_are_not_mixed(photos: Path, tmp_path: Path):
    score_to_parquet(formula_scorer(), [photos], tmp_path / "scores")
    with pytest.raises(ValueError, match="which must not be mixed"):
        score_to_parquet(QualityScorer(backend=LinearBackend()), [photos], tmp_path / "scores")


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_that_are_not_text(photos: Path, tmp_path: Path):
    os.rename(photos / "0.png", os.fsencode(photos) + b"/a\xff\n.png")
    score_to_parquet(formula_scorer(), [photos], tmp_path / "scores")
    paths = [os.fsencode(unescape_name(path)) for path in pq.read_table(tmp_path / "scores")["path"].to_pylist()]
    assert os.fsencode(photos) + b"/a\xff\n.png" in paths


def test_the_documents_function_for_other_engines(photos: Path):
    pandas = pytest.importorskip("pandas")
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    code = next(block for block in text.split("```python\n") if "def score(frames)" in block).split("```")[0]
    names: dict = {}
    exec(compile(code, "integrations.md", "exec"), names)
    frame = pandas.DataFrame({"path": [str(photos / "1.png"), str(photos / "bad.png")], "label": [1, 2]})
    (scored,) = names["score"]([frame])
    assert scored["error"][1] and list(scored["label"]) == [1, 2] and scored["score"].notna().tolist() == [True, False]
