"""Reasoning that names distortions: its sentences, its measure, and the warm-up over cached visual tokens."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from recipes.nano import naming, reasoning
from vqr1_metric import QualityScorer
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.pixels import to_patches
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.images import load_image
from vqr1_metric.images.distortions import DISTORTIONS, LEVELS
from vqr1_metric.protocol import parse_reply


@pytest.mark.parametrize("name", DISTORTIONS)
def test_every_sentence_names_its_distortion_alone(name: str) -> None:
    for level in range(1, LEVELS + 1):
        reply = naming.thought(naming.remark(name, level), 2.5) + "<answer>2.50</answer>"
        parsed = parse_reply(reply)
        assert naming.named(parsed.reasoning) == name and parsed.score == 2.5
    assert naming.named(naming.thought(naming.remark(name, 0), 5.0)) == "clean"


def test_nano_says_each_word_with_one_token() -> None:
    tokenizer = load_model(ModelSpec("nano", device="cpu")).tokenizer
    for said in [naming.CLEAN, *(f"{naming.DEGREES[0]} {phrase}" for phrase in naming.PHRASES.values())]:
        assert len(tokenizer.encode(" " + said)) == len(said.split()), said
    assert len(tokenizer.encode(naming.thought("strong motion blur", 1.2))) < 24


def test_what_a_reasoning_names() -> None:
    assert naming.named("The picture shows strong motion blur. The overall quality is poor.") == "motion_blur"
    assert naming.named("I like it.") is None
    assert naming.named("slight blur and severe banding") is None  # two at once
    assert naming.thought("x", 1.0).endswith("bad.</think>\n") and "excellent" in naming.thought("x", 5.0)
    assert naming.alike("jpeg", "webp") and naming.alike("noise", "noise") and not naming.alike("noise", "blur")


def test_shares_and_table() -> None:
    counts = Counter({("blur", "blur"): 3, ("blur", "rescale"): 1, ("noise", None): 2, ("clean", "clean"): 5})
    found = naming.Naming(counts, {})
    assert found.share("blur") == 0.75 and found.share() == 0.5 and found.share(family=True) == pytest.approx(4 / 6)
    assert found.table().splitlines()[1:3] == [
        "blur              75%  rescale 1",
        "noise              0%  nothing 2",
    ]


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    """Three textured pictures of two shapes, rated in ``ratings.csv``."""
    folder = tmp_path / "pristine"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i, size in enumerate([(96, 64), (64, 96), (96, 64), (96, 64)]):
        small = Image.fromarray(random.integers(0, 255, (8, 12, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "ratings.csv").write_text("image,mos\n0.png,.9\n1.png,.5\n2.png,.7\n3.png,.2\n")
    return folder


def test_the_measure_counts_every_reply(pristine: Path, tmp_path: Path, tiny_qwen2_5_vl: Path) -> None:
    """A tiny random model names nothing and gives no score."""
    command = ["--model", str(tiny_qwen2_5_vl), "--pictures", str(pristine), "--count", "2", "--levels", "5"]
    found = naming.main([*command, "--names", "blur", "jpeg", "--csv", str(tmp_path / "a/b.csv"), "--threads", "1"])
    assert found.counts == {("clean", None): 2, ("blur", None): 2, ("jpeg", None): 2} and found.share() == 0
    assert math.isnan(found.scores["blur", 5])
    assert (tmp_path / "a/b.csv").read_text().splitlines()[:2] == ["shown,named,pictures", "clean,,2"]


def test_cached_tokens_give_the_scores_of_the_backend(pristine: Path) -> None:
    loaded = load_model(ModelSpec("nano", device="cpu"))
    reader, backend = reasoning.TokenReader(loaded), TransformersBackend(ModelSpec("nano"), loaded)
    pictures = [Image.open(pristine / f"{i}.png") for i in (0, 2)]
    shown = reasoning.see(loaded, iter([(picture, None) for picture in pictures]), reader)
    expected = backend.distributions([load_image(picture) for picture in pictures], loaded.pixel_config)
    found = torch.stack([one.scores for one in shown])
    torch.testing.assert_close(found, expected.probabilities.detach(), atol=2e-3, rtol=0)  # tokens are kept in 16 bits
    assert {one.grid for one in shown} == {(2, 3)} and shown[0].tokens.dtype == torch.float16


def test_replies_go_on_as_the_model_would_write_them(pristine: Path, tiny_qwen2_5_vl: Path) -> None:
    loaded = load_model(ModelSpec(str(tiny_qwen2_5_vl), device="cpu"))
    reader = reasoning.TokenReader(loaded)
    picture = Image.open(pristine / "1.png")
    patches, grid = to_patches(load_image(picture), loaded.pixel_config)
    with torch.no_grad():
        tokens = loaded.model.model.get_image_features(patches, torch.tensor([grid])).pooler_output[0]
    backend = TransformersBackend(ModelSpec("tiny"), loaded)
    inputs = backend._inputs([load_image(picture)], loaded.pixel_config, True, ["<think> The"], False)
    written = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    merge = loaded.pixel_config.merge_size
    (found,) = reader.continue_text(tokens[None], (grid[1] // merge, grid[2] // merge), "<think> The", "\0", 4)
    assert found == loaded.tokenizer.decode(written.tolist()).strip()


def test_the_warm_up_writes_a_model_of_both_modes(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A few steps from nano: its own files and the blocks of its tower stay, the rest moves, the answers hardly do."""
    nano = ModelSpec("nano").folder
    command = [
        "--pristine",
        str(pristine),
        "--data",
        str(pristine / "ratings.csv"),
        "--images",
        str(pristine),
        "-o",
        str(tmp_path / "out"),
        "--best",
        "1",
        "--versions",
        "2",
        "--rated",
        "4",
        "--steps",
        "4",
        "--batch",
        "4",
        "--rate",
        "1e-4",
        "--every",
        "2",
        "--cache",
        str(tmp_path / "cache.pt"),
    ]
    reasoning.main(command)
    printed = capsys.readouterr().out
    assert "10 named and 4 rated pictures" in printed and "rated pictures show: " in printed and "step 4 " in printed
    before, after = load_file(nano / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and {w.dtype for w in after.values()} == {w.dtype for w in before.values()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name and "merger" not in name for name in moved)
    assert {p.name for p in nano.glob("*.json")} <= {p.name for p in (tmp_path / "out").iterdir()}
    picture = pristine / "0.png"
    (old,), (new,) = (QualityScorer(str(m)).score([picture]) for m in (nano, tmp_path / "out"))
    assert new.score == pytest.approx(old.score, abs=0.3) and new.reliable
    again = reasoning.main([*command[:7], str(tmp_path / "again"), *command[8:]])
    weights = load_file(again / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in after)
