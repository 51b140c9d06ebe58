"""Reasoning that names distortions: its sentences, its measure, and the warm-up over cached visual tokens."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.nano import naming
from vqr1_metric.backends.loading import ModelSpec, load_model
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
