"""The blank space around a model's numbers: measured by one pass of the smallest image, once for its weights."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from model_folders import change_file

from vqr1_metric.backends import spellings
from vqr1_metric.backends.checkpoints import CHECKPOINTS
from vqr1_metric.backends.loading import load_model
from vqr1_metric.backends.spec import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.protocol import VISUALQUALITY_R1

IDENTITY = {"weights": "1", "dtype": "float32"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VQR1_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spellings"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Visual tokens of every image that a tree was read for."""
    seen: list[int] = []
    read = TransformersBackend._tree_hidden

    def counted(self, images, pixel_config, *rest):
        seen.extend(pixel_config.visual_tokens(*image.shape[-2:]) for told in images for image in told)
        return read(self, images, pixel_config, *rest)

    monkeypatch.setattr(TransformersBackend, "_tree_hidden", counted)
    return seen


def measured(*answers: tuple[str, ...]) -> Callable[[], tuple[str, ...]]:
    """Gives each answer once; there is none after the last."""
    left = list(answers)
    return lambda: left.pop(0)


def test_one_pass_of_the_smallest_image_once_for_the_weights(
    tiny_qwen2_5_vl: Path, tmp_path: Path, passes: list[int]
) -> None:
    first = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), device="cpu")).trie
    assert passes == [4]  # 56x56 pixels
    copy = shutil.copytree(tiny_qwen2_5_vl, tmp_path / "copy")
    assert TransformersBackend(ModelSpec(str(copy), device="cpu")).trie.spellings == first.spellings
    assert len(passes) == 1
    change_file(copy / "model.safetensors")
    assert TransformersBackend(ModelSpec(str(copy), device="cpu")).trie.spellings
    assert len(passes) == 2


def test_weights_in_memory_are_measured_each_time(tiny_qwen2_5_vl: Path, passes: list[int], cache: Path) -> None:
    spec = ModelSpec(str(tiny_qwen2_5_vl), device="cpu")
    loaded = replace(load_model(spec), identity=None)
    for count in (1, 2):
        assert TransformersBackend(spec, loaded).trie.spellings and len(passes) == count
    assert not cache.exists()


def test_another_question_or_dtype_is_measured_anew() -> None:
    other = replace(VISUALQUALITY_R1, name="other", text="Is it good?")
    for identity, question, answer in (
        (IDENTITY, VISUALQUALITY_R1, ("",)),
        (IDENTITY, other, (" ",)),
        ({**IDENTITY, "dtype": "bfloat16"}, VISUALQUALITY_R1, ("\n",)),
    ):
        for _ in range(2):
            assert spellings.used_spellings(identity, question, measured(answer)) == answer
            assert spellings.used_spellings(identity, question, measured()) == answer


@pytest.mark.parametrize("damaged", ["", "{", "[]", "[1]", '["x"]', "null", '{"": 1}'])
def test_a_damaged_memory_is_written_anew(cache: Path, damaged: str) -> None:
    spellings.used_spellings(IDENTITY, VISUALQUALITY_R1, measured(("",)))
    (file,) = cache.iterdir()
    file.write_text(damaged)
    assert spellings.used_spellings(IDENTITY, VISUALQUALITY_R1, measured((" ",))) == (" ",)
    assert json.loads(file.read_text()) == [" "]


def test_a_folder_that_cannot_be_written_costs_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQR1_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert spellings.used_spellings(IDENTITY, VISUALQUALITY_R1, measured(("",))) == ("",)


def test_many_may_write_at_once(cache: Path) -> None:
    def ask(_: int) -> tuple[str, ...]:
        return spellings.used_spellings(IDENTITY, VISUALQUALITY_R1, lambda: ("", " "))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(64))) == {("", " ")}
    assert len(list(cache.iterdir())) == 1  # and nothing half-written beside it


def test_the_table_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(CHECKPOINTS[0], weights="1", spellings=("\n",))
    monkeypatch.setattr("vqr1_metric.backends.checkpoints.CHECKPOINTS", (known,))
    assert spellings.used_spellings(IDENTITY, VISUALQUALITY_R1, measured()) == ("\n",)


def test_what_the_table_says_is_what_is_measured() -> None:
    """Of the embedded model, whose weights are here; the others were not measured."""
    for checkpoint in CHECKPOINTS:
        assert (checkpoint.weights is None) == (checkpoint.spellings is None)
    spec = ModelSpec("nano", device="cpu")
    backend = TransformersBackend(spec)
    weights = backend.identity()["weights"]
    known = [checkpoint for checkpoint in CHECKPOINTS if checkpoint.weights == weights]
    found = backend._measured_spellings(VISUALQUALITY_R1, backend.full_trie)
    assert all(checkpoint.spellings == found for checkpoint in known)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"XDG_CACHE_HOME": "/x"}, "/x/vqr1_metric"), ({"HOME": "/home/a"}, "/home/a/.cache/vqr1_metric")],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("VQR1_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert spellings.cache_folder() == Path(folder)
