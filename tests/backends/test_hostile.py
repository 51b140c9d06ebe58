"""Model folders from strangers: whatever they hold, one sentence or a right score, and nothing outside is read."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.files import file_in
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
PICTURE = torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny_qwen2_5_vl: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_qwen2_5_vl, tmp_path / "model")


def score(folder: Path) -> float:
    scorer = QualityScorer(str(folder), device="cpu")
    try:
        return scorer.score(PICTURE)[0].score
    finally:
        scorer.unload()


def settings(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other entries in a JSON file of the folder, in ``text_config`` or ``vision_config`` with a prefix."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for key, value in changes.items():
            part, _, entry = key.partition("__") if "__" in key else ("", "", key)
            (values[part] if part else values)[entry] = value
        (folder / name).write_text(json.dumps(values))

    return change


def content(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def template(text: str) -> Callable[[Path], None]:
    return content("chat_template.jinja", text.encode())


def weights(value: float, part: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        next(tensor for name, tensor in tensors.items() if part in name).view(-1)[0] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shards(name: str) -> Callable[[Path], None]:
    """Weights outside the folder that an index names."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / "model.safetensors", outside)
        named = {key: name.replace("OUTSIDE", str(outside)) for key in load_file(outside)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return change


CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "config: not JSON": (content(CONFIG, b"model_type: qwen"), "expected JSON"),
    "config: empty": (content(CONFIG, b""), "expected JSON"),
    "config: a list": (content(CONFIG, b"[1, 2]"), "expected a JSON object"),
    "config: binary": (content(CONFIG, bytes(range(256))), "expected JSON"),
    "config: deep": (content(CONFIG, b'{"a":' * 100_000), "expected JSON"),
    "config: a long number": (content(CONFIG, b'{"a": ' + b"9" * 10_000 + b"}"), "expected JSON"),
    "config: no type": (settings(CONFIG, model_type=None), "expected a model of type"),
    "config: a type in a list": (settings(CONFIG, model_type=["qwen2_5_vl"]), "expected a model of type"),
    "config: no heads": (settings(CONFIG, text_config__num_attention_heads=0), "could not be loaded|configuration"),
    "config: a width in words": (settings(CONFIG, text_config__hidden_size="wide"), "could not be|configuration"),
    "config: another width": (settings(CONFIG, text_config__hidden_size=32), "could not be|mismatched|configuration"),
    "config: no layers": (settings(CONFIG, text_config__num_hidden_layers=0), "unexpected|could not be|configuration"),
    "config: a million layers": (settings(CONFIG, text_config__num_hidden_layers=10**6), "hold 2 layers|configuration"),
    "config: a million blocks": (settings(CONFIG, vision_config__depth=10**6), "the weights hold 2 layers"),
    "config: a text as text": (settings(CONFIG, text_config="small"), "expected the configuration|could not be"),
    "config: no vision": (settings(CONFIG, vision_config=None), "expected|could not be|hold 2 layers"),
    "weights: NaN": (weights(float("nan"), "norm"), "expected finite weights"),
    "weights: infinity": (weights(float("inf"), "lm_head"), "expected finite weights"),
    "weights: no safetensors": (content("model.safetensors", b"PK\3\4 a pickle"), "the weights are damaged"),
    "weights: a header without end": (content("model.safetensors", b"\xff" * 64), "the weights are damaged"),
    "weights: a folder": (lambda f: (gone("model.safetensors")(f), (f / "model.safetensors").mkdir()), "is none"),
    "index: above": (shards("../outside.safetensors"), "in its own folder"),
    "index: absolute": (shards("OUTSIDE"), "in its own folder"),
    "index: above from within": (shards("a/../../outside.safetensors"), "in its own folder"),
    "index: a pickle": (shards("weights.bin"), "in its own folder"),
    "index: not there": (shards("part-1.safetensors"), "is not there"),
    "index: no map": (
        lambda f: (gone("model.safetensors")(f), content("model.safetensors.index.json", b"{}")(f)),
        "weight_map",
    ),
    "link: weights": (linked("model.safetensors"), "is a link to"),
    "link: tokenizer": (linked(TOKENIZER), "is a link to"),
    "link: template": (linked("chat_template.jinja"), "is a link to"),
    "preprocessor: no std": (
        settings(PREPROCESSOR, image_std=[0, 0.2, 0.2]),
        "image_std must be three numbers above 0",
    ),
    "preprocessor: std NaN": (settings(PREPROCESSOR, image_std=[float("nan")] * 3), "image_std must be three numbers"),
    "preprocessor: mean in words": (settings(PREPROCESSOR, image_mean="grey"), "image_mean must be three numbers"),
    "preprocessor: one channel": (settings(PREPROCESSOR, image_mean=[0.5]), "image_mean must be three numbers"),
    "preprocessor: patch 0": (settings(PREPROCESSOR, patch_size=0), "whole numbers above 0"),
    "preprocessor: patch in words": (settings(PREPROCESSOR, patch_size="14"), "whole numbers above 0"),
    "preprocessor: another patch": (settings(PREPROCESSOR, patch_size=16), "expected the preprocessor of this model"),
    "preprocessor: limits crossed": (settings(PREPROCESSOR, min_pixels=10**6, max_pixels=10**5), "min_pixels <= max"),
    "preprocessor: not normalised": (settings(PREPROCESSOR, do_normalize=False), "do_normalize must be True"),
    "preprocessor: another scale": (settings(PREPROCESSOR, rescale_factor=1.0), "rescale_factor must be"),
    "preprocessor: a size in words": (
        settings(PREPROCESSOR, size="large", min_pixels=None, max_pixels=None),
        "expected the image processor",
    ),
    "preprocessor: garbage": (content(PREPROCESSOR, b"\0" * 100), "expected JSON"),
    "tokenizer: none": (gone(TOKENIZER), r"expected a tokenizer \(tokenizer.json\)"),
    "tokenizer: garbage": (content(TOKENIZER, b"garbage"), "its tokenizer cannot be read"),
    "tokenizer: empty": (content(TOKENIZER, b"{}"), "its tokenizer cannot be read"),
    "tokenizer: of another model": (settings(CONFIG, image_token_id=10**6), "expected this model's tokenizer|could"),
    "tokenizer: too many tokens": (settings(CONFIG, text_config__vocab_size=100), "expected this model's tokenizer"),
    "tokenizer config: a list": (content("tokenizer_config.json", b"[]"), "expected a JSON object"),
    "generation: garbage": (content("generation_config.json", b"{{"), "expected JSON"),
    "generation: ends in words": (settings("generation_config.json", eos_token_id="stop"), "expected token numbers"),
    "template: syntax": (template("{% for %}"), "its chat template fails"),
    "template: sandbox": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "its chat template fails"),
    "template: a file": (template("{% include '/etc/passwd' %}"), "its chat template fails"),
    "template: division": (template("{{ 1 / 0 }}"), "its chat template fails"),
    "template: nothing": (template("{% set a = 1 %}"), "writes nothing"),
    "template: no image": (template("Hello"), "one placeholder|image placeholder"),
    "template: blank": (template(" \n"), "expected a chat template"),
    "template: not UTF-8": (content("chat_template.jinja", b"\xff\xfe\xff"), "expected a text|cannot be read"),
    "template: endless": (
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"),
        "does not come to an end",
    ),
    "template: a list that grows": (
        template("{% set x = [1] %}{% for a in x %}{% if x.append(a) %}{% endif %}{% endfor %}"),
        "chat template",
    ),
    "template: a text that doubles": (
        template("{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"),
        "does not come to an end",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_sentence(folder: Path, name: str) -> None:
    spoil, message = HOSTILE[name]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        score(folder)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_what_a_config_chooses_is_not_taken(folder: Path) -> None:
    """Attention kernels, code, files: they are the user's to choose."""
    expected = score(folder)
    settings(
        CONFIG,
        _attn_implementation="flash_attention_2",
        attn_implementation="kernels-community/flash-attn",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
        transformers_weights="../other.safetensors",
        text_config___attn_implementation="flex_attention",
        vision_config___attn_implementation="flash_attention_3",
    )(folder)
    settings("tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd")(folder)
    assert score(folder) == expected


def test_links_of_the_hubs_cache_are_followed(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(tiny_qwen2_5_vl.iterdir())):
        shutil.copy(file, tmp_path / "models--a--b" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(i))
    assert score(snapshot) == score(tiny_qwen2_5_vl)
    (tmp_path / "secret").write_text("{}")
    (snapshot / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="is a link to"):
        score(snapshot)


def test_links_within_a_folder_are_followed(folder: Path) -> None:
    (folder / "v1").mkdir()
    shutil.move(folder / "model.safetensors", folder / "v1" / "model.safetensors")
    (folder / "model.safetensors").symlink_to(Path("v1") / "model.safetensors")
    assert file_in(folder, "model.safetensors") == folder / "model.safetensors"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("gone.json")
    with pytest.raises(ModelError, match="a link to a file that is not there"):
        score(folder)


@pytest.mark.slow
def test_fuzzed_folders(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    """Bytes, values and entries of every small file at random: a sentence or a finite score, nothing else."""
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    names = sorted(file.name for file in tiny_qwen2_5_vl.iterdir() if file.suffix in (".json", ".jinja"))
    for number in range(20 * len(names)):
        name = names[number % len(names)]
        folder = shutil.copytree(tiny_qwen2_5_vl, tmp_path / str(number))
        data = bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(data))
            action = rng.randrange(4)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                del data[at : at + rng.randrange(1, 40)]
            elif action == 2:
                data[at:at] = rng.choice((b"0", b"-", b"null", b"[]", b"{}", b'"', b"1e999", b"9" * 20))
            else:
                del data[at:]
            data = data or bytearray(b" ")
        (folder / name).write_bytes(data)
        try:
            outcomes["scored" if score(folder) == score(folder) else "without a score"] += 1
        except ModelError as error:
            outcomes["refused" if len(str(error).splitlines()) == 1 else "refused at length"] += 1
        shutil.rmtree(folder)
    print(dict(outcomes))
    assert set(outcomes) <= {"scored", "refused", "without a score"} and outcomes["refused"] > len(names)
