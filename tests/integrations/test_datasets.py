"""Scores as new columns of a batch, alone and through the real datasets library."""

import io
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import change_file
from PIL import Image

from vqr1_metric import QualityScorer
from vqr1_metric.integrations.datasets import PictureScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five pictures, the last of which is damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 56, 64, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)
    paths[4].write_bytes(paths[4].read_bytes()[:2000])
    return paths


@pytest.fixture
def expected(files: list[Path], tiny_qwen2_5_vl: Path) -> list[float]:
    return [result.score for result in QualityScorer(str(tiny_qwen2_5_vl)).score(files[:4])]


def check(columns: dict, expected: list[float]) -> None:
    assert columns["score"][:4] == pytest.approx(expected, abs=1e-5)
    assert all(0 < std < 2 and 0 <= share <= 1 for std, share in zip(columns["std"], columns["coverage"], strict=True))
    assert columns["error"] == [None] * 4


def test_paths_bytes_pictures_and_undecoded_columns(files: list[Path], expected, tiny_qwen2_5_vl: Path) -> None:
    score = PictureScorer(str(tiny_qwen2_5_vl), column="picture")
    contents = [file.read_bytes() for file in files[:4]]
    check(score({"picture": [str(file) for file in files[:4]], "other": range(4)}), expected)
    check(score({"picture": contents}), expected)
    check(score({"picture": [Image.open(io.BytesIO(content)) for content in contents]}), expected)
    check(score({"picture": [{"bytes": content, "path": None} for content in contents]}), expected)
    check(score({"picture": [{"bytes": None, "path": str(file)} for file in files[:4]]}), expected)


def test_rows_without_a_score(files: list[Path], tiny_qwen2_5_vl: Path) -> None:
    score = PictureScorer(str(tiny_qwen2_5_vl), column="picture", prefix="vqr1_")
    columns = score({"picture": [files[4].read_bytes(), None, torch.rand(3, 56, 56), b""]})
    assert list(columns) == ["vqr1_score", "vqr1_std", "vqr1_coverage", "vqr1_tag_probability", "vqr1_error"]
    assert [math.isnan(value) for value in columns["vqr1_score"]] == [True, True, False, True]
    damaged, missing, none, empty = columns["vqr1_error"]
    assert damaged.startswith("is damaged or truncated") and none is None and empty == "is empty"
    assert missing == "expected a path, bytes, a PIL picture, an array or a tensor, but got NoneType"
    assert score({"picture": []})["vqr1_score"] == []
    with pytest.raises(ValueError, match="Expected a column 'picture' of pictures, but there are image, label"):
        score({"image": [], "label": []})


def test_pickles_to_the_recipe(tiny_qwen2_5_vl: Path) -> None:
    assert len(pickle.dumps(PictureScorer(str(tiny_qwen2_5_vl)))) < 2000


def test_what_is_hashed_follows_the_models_content(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    """`datasets` keys its cache by the pickle: a retrained model under the old path must not answer with old scores."""
    folder = shutil.copytree(tiny_qwen2_5_vl, tmp_path / "model")
    before = pickle.dumps(PictureScorer(str(folder)))
    assert pickle.dumps(PictureScorer(str(folder))) == before
    change_file(folder / "model.safetensors")
    assert pickle.dumps(PictureScorer(str(folder))) != before


def test_dataset_map(files: list[Path], expected, tiny_qwen2_5_vl: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"image": [str(file) for file in files[:4]], "label": [3, 1, 4, 1]})
    decoded = rows.cast_column("image", datasets.Image())
    for dataset in (rows, decoded):
        scored = dataset.map(
            PictureScorer(str(tiny_qwen2_5_vl)), batched=True, batch_size=3, load_from_cache_file=False
        )
        check({name: list(scored[name]) for name in ("score", "std", "coverage", "error")}, expected)
        assert list(scored["label"]) == [3, 1, 4, 1]


def test_cache_of_datasets_knows_the_settings() -> None:
    fingerprint = pytest.importorskip("datasets.fingerprint", reason="datasets is not installed")
    same, again, other = (
        fingerprint.Hasher.hash(PictureScorer("nano", **options)) for options in ({}, {}, {"max_pixels": 50_000})
    )
    assert same == again != other
