"""A rehearsal's folder is a checkpoint in the published layout with Qwen's real vocabulary; the readout works on it."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.rehearse.__main__ import main
from benchmarks.rehearse.folder import SHAPES, config_of, write_folder
from benchmarks.rehearse.vocabulary import qwen_tokenizer, vocabulary_file
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.readout import build_answer_trie

try:
    vocabulary_file()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rehearse")
    write_folder("tiny", place)
    return place


def test_the_vocabulary_is_qwens() -> None:
    tokenizer = qwen_tokenizer()

    def tokens(text: str) -> list[str]:
        return tokenizer.encode(text, add_special_tokens=False).tokens

    assert tokenizer.encode("Hello world").ids == [9707, 1879]  # as the published tokenizer says
    assert tokenizer.token_to_id("<|image_pad|>") == 151655
    assert tokens("<answer>3.42</answer>") == ["<", "answer", ">", "3", ".", "4", "2", "</", "answer", ">"]
    assert tokens("</think>\n<answer>")[:3] == ["</", "think", ">Ċ"]  # the tag's end and the line break are one token
    assert tokens("</think>\n\n")[-1] == ">ĊĊ"
    assert tokens(" </answer>")[0] == "Ġ</"
    assert qwen_tokenizer(qwen3=True).encode("</think>").tokens == ["</think>"]


def test_the_folder_has_the_published_layout(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "visual.patch_embed.proj.weight" in index and "model.layers.1.mlp.up_proj.weight" in index
    with safe_open(folder / index["lm_head.weight"], "pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [152064, 64]
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"


def test_the_trie_over_the_real_vocabulary(folder: Path) -> None:
    loaded = load_model(ModelSpec(str(folder), device="cpu"))
    plain, both = (build_answer_trie(loaded.tokenizer, spellings) for spellings in (("",), ("", "\n")))
    # A digit, a point and ten decimals under each of five digits but the last: <answer>, 3, ., 4.
    assert len(plain) == 54 and len(both) > len(plain)


@pytest.mark.parametrize(("size", "parameters"), [("7b", 8.29e9), ("3b", 3.75e9), ("qwen3-vl-8b", 8.77e9)])
def test_sizes_are_those_of_the_published_models(size: str, parameters: float, tmp_path: Path) -> None:
    from benchmarks.rehearse.folder import _tensor_shapes, _write_json

    _write_json(tmp_path / "config.json", config_of(SHAPES[size], qwen_tokenizer()))
    numbers = [math.prod(shape) for _, shape in _tensor_shapes(tmp_path)]
    assert sum(numbers) == pytest.approx(parameters, rel=0.01)
    assert size != "7b" or len(numbers) == 729


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "3b"])
def test_every_step_of_a_rehearsal(size: str, tmp_path: Path) -> None:
    rows = main(["--size", size, "-o", str(tmp_path / "model"), "--csv", str(tmp_path / "rows.csv")])
    assert [row["step"] for row in rows][:3] == ["write", "load", "first_score"] and len(rows) == 11
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0.1 for row in rows)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 12
