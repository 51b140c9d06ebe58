"""Ray Data on a local cluster of two workers: everything scored once, resumed, never mixed."""

import math
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1_metric import QualityScorer

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vqr1-metric[ray]'")
pq = pytest.importorskip("pyarrow.parquet")

from vqr1_metric.integrations.ray import ScoringActor, score_to_parquet  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # two workers import torch and load a model each
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def cluster():
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """23 pictures of two sizes, the last of which is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:02}.png" for index in range(23)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (56, 56 + 28 * (index % 2), 3), dtype=np.uint8)).save(path)
    paths[-1].write_bytes(paths[-1].read_bytes()[:500])
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def expected(files: list[str], tiny_qwen2_5_vl: Path) -> dict[str, float]:
    return dict(zip(files, (result.score for result in QualityScorer(str(tiny_qwen2_5_vl)).score(files)), strict=True))


def rows_of(dataset) -> list[dict]:
    return sorted(dataset.take_all(), key=lambda row: str(row.get("path", row.get("id"))))


def check(rows: list[dict], expected: dict[str, float]) -> None:
    assert [row["path"] for row in rows] == sorted(expected)
    scores = [row["score"] for row in rows]
    assert scores[:-1] == pytest.approx([expected[row["path"]] for row in rows][:-1], abs=1e-4)
    assert math.isnan(scores[-1]) and rows[-1]["error"].startswith("is damaged or truncated")
    assert [row["error"] for row in rows[:-1]] == [None] * 22


def test_an_actor_with_another_model_refuses(tiny_qwen2_5_vl: Path) -> None:
    fingerprint = f"{QualityScorer(str(tiny_qwen2_5_vl)).fingerprint:x}"
    assert ScoringActor(str(tiny_qwen2_5_vl), column="path", expected=fingerprint).column == "path"
    with pytest.raises(ValueError, match="is not the one that this run began with"):
        ScoringActor(str(tiny_qwen2_5_vl), column="path", expected=fingerprint, dtype="bfloat16")


def test_paths_with_two_workers(cluster, files: list[str], expected, tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "scores", str(tiny_qwen2_5_vl)
    dataset = ray.data.from_items([{"path": path} for path in files], override_num_blocks=6)
    settings = {"model": model, "concurrency": 2, "batch_size": 4, "rows_per_file": 5}
    check(rows_of(score_to_parquet(dataset, str(folder), **settings)), expected)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(written) >= 4 and all(name.endswith(".parquet") for name in written)

    # Nothing is left to do: no file changes. A lost file is scored again, and only that.
    check(rows_of(score_to_parquet(dataset, str(folder), **settings)), expected)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    lost = sorted(folder.iterdir())[0]
    missing = set(pq.read_table(lost)["path"].to_pylist())
    lost.unlink()
    (folder / "interrupted.unfinished").write_bytes(b"PAR1")
    check(rows_of(score_to_parquet(dataset, str(folder), **settings)), expected)
    new = [file for file in folder.glob("*.parquet") if file.name not in set(written) - {lost.name}]
    assert {path for file in new for path in pq.read_table(file)["path"].to_pylist()} == missing

    with pytest.raises(ValueError, match="scores of another model or other settings"):
        score_to_parquet(dataset, str(folder), **settings, max_pixels=50_000)


def test_bytes_with_a_key(cluster, files: list[str], expected, tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    contents = [{"id": index, "content": Path(file).read_bytes()} for index, file in enumerate(files[:6])]
    scored = score_to_parquet(
        ray.data.from_items(contents), str(tmp_path), column="content", key="id", model=str(tiny_qwen2_5_vl)
    )
    rows = rows_of(scored)
    assert set(rows[0]) == {"id", "score", "std", "coverage", "tag_probability", "error"}
    assert [row["score"] for row in rows] == pytest.approx([expected[file] for file in files[:6]], abs=1e-4)


def test_actor_in_a_pipeline_of_ones_own(cluster, files: list[str], expected, tiny_qwen2_5_vl: Path) -> None:
    pictures = ray.data.read_images(files[:6], include_paths=True)
    scored = pictures.map_batches(
        ScoringActor,
        fn_constructor_kwargs={"model": str(tiny_qwen2_5_vl), "column": "image", "drop_column": True},
        concurrency=1,
        batch_size=4,
    )
    rows = rows_of(scored)
    assert "image" not in rows[0]
    assert [row["score"] for row in rows] == pytest.approx([expected[row["path"]] for row in rows], abs=1e-4)


def test_example(cluster, tiny_qwen2_5_vl: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "ray_scoring.py"
    options = ["--model", str(tiny_qwen2_5_vl), "--output", str(tmp_path / "scores"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 pictures in ")


def test_documented(cluster, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that docs/integrations.md shows, on nano."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    code = text.partition("## Ray Data")[2].partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code, names)
    monkeypatch.chdir(tmp_path)
    assert 1 <= names["score_all"](files[:3]) <= 5
    assert list((tmp_path / "scores").glob("*.parquet"))
