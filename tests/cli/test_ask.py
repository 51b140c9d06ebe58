"""``vqr1 ask`` and ``vqr1 score --question``, with the embedded model."""

import json

import pytest
import torch
from PIL import Image

from vqr1_metric.cli import main
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        pixels = torch.randint(0, 256, (48, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    return tmp_path


def vqr1(capsys, *arguments):
    code = main([*map(str, arguments), "--device", "cpu", "--model", "nano"])
    return code, capsys.readouterr()


def test_a_question_of_ones_own(images, capsys):
    code, said = vqr1(capsys, "ask", images / "a.png", "--question", "Is it sharp?", "--answers", "yes,no", "--json")
    assert code == 0
    answer = json.loads(said.out)["answers"]["Is it sharp?"]
    assert set(answer["probabilities"]) == {"yes", "no"} and sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["mean"] == pytest.approx(answer["probabilities"]["yes"], abs=1e-5)


def test_default_questions_and_a_file_that_cannot_be_read(images, capsys):
    (images / "c.png").write_bytes(b"not a picture")
    code, said = vqr1(capsys, "ask", images)
    assert code == 0 and said.out.count("sharpness: ") == 3 and said.out.count("coverage") == 16
    assert "c.png" in said.out and "not a picture" in said.out
    code, said = vqr1(capsys, "ask", images / "c.png", "--json")
    assert code == 1 and "nothing was answered" in said.err


def test_score_with_another_question(images, capsys):
    output = images / "scores.jsonl"
    code, _ = vqr1(capsys, "score", images / "a.png", "--question", "levels", "-o", output)
    expected = QualityScorer("nano", device="cpu", question="levels").score(images / "a.png")[0].score
    assert code == 0 and json.loads(output.read_text())["score"] == pytest.approx(expected, abs=1e-4)
    code, said = vqr1(capsys, "score", images, "-o", output, "--resume")  # the file is of another question
    assert code != 0 and "question" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "Is it sharp?"], "needs --answers"),
        (["--answers", "yes,no"], "those of a --question"),
        (["--question", "alignment"], "needs --prompt"),
        (["--question", "pairwise"], "two pictures"),
        (["--question", "Sharp?", "--answers", "yes"], "at least two answers"),
    ],
)
def test_wrong_usage(images, capsys, arguments, said):
    code, streams = vqr1(capsys, "ask", images / "a.png", *arguments)
    assert code != 0 and said in streams.err
