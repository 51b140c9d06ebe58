"""``rank``, ``compare``, ``explain``, ``info`` and what they share."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqr1_metric import __version__, cli
from vqr1_metric.cli import explain
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def names(write_pictures, tmp_path: Path) -> list[str]:
    return [str(path) for path in write_pictures(tmp_path, ["a.png", "b.png", "c.png"])]


@pytest.fixture
def scorer(tiny_qwen2_5_vl: Path) -> QualityScorer:
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu")


def test_rank(vqr1, names: list[str], scorer: QualityScorer):
    expected = scorer.rank([*names, "gone.png"])
    lines = vqr1("rank", *names, "gone.png").out.splitlines()
    at = lines[0].index("picture")
    assert [line[at:] for line in lines[1:5]] == [
        *(place.result.name for place in expected[:3]),
        "gone.png: no such file",
    ]
    for line, place in zip(lines[1:4], expected, strict=False):
        assert line.split()[0] == f"{place.rank}{'=' if place.tied else ''}"
        assert f"{place.result.score:.2f} ± {place.result.std:.2f}" in line
    assert lines[1].split()[4] == f"{expected[0].beats_next:.0%}"
    rows = json.loads(vqr1("rank", *names, names[0], "gone.png", "--json").out)
    assert [row["rank"] for row in rows] == [place.rank for place in expected]
    assert [row["path"] for row in rows] == [place.result.name for place in expected]


def test_ties_are_marked(vqr1, names: list[str]):
    copy = Path(names[0]).with_name("copy.png")
    copy.write_bytes(Path(names[0]).read_bytes())
    lines = vqr1("rank", names[0], copy).out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1=", "1="]
    assert "50%" in lines[1]
    assert "coin toss" in lines[3]


def test_compare(vqr1, names: list[str], scorer: QualityScorer):
    a, b = names[:2]
    expected = scorer.compare(a, b)
    out = vqr1("compare", a, b).out
    shares = [float(share) for share in re.findall(r"([\d.]+)%", out)]
    assert shares == pytest.approx([100 * expected.win_probability, 100 - 100 * expected.win_probability], abs=0.06)
    answer = json.loads(vqr1("compare", a, b, "--json").out)
    assert answer["a_wins"] + answer["b_wins"] == pytest.approx(1)
    assert answer["a_wins"] == pytest.approx(expected.win_probability, abs=2e-5)
    assert answer["winner"] == expected.winner
    swapped = json.loads(vqr1("compare", b, a, "--json").out)
    assert swapped["b_wins"] == pytest.approx(answer["a_wins"], abs=2e-5)
    assert "neither: it is a coin toss" in vqr1("compare", a, a).out


def test_explain_without_readable_reasoning(vqr1, names: list[str], scorer: QualityScorer):
    out = vqr1("explain", names[0], "--num-samples", 2, "--max-new-tokens", 4).out
    expected = scorer.score(names[0])[0]
    assert out.splitlines()[0] == names[0]
    assert f"score {expected.score:.2f} ± {expected.std:.2f}, 95% of its distribution in" in out
    assert "This model gave no reasoning that could be read (the reasoning did not come to an end)" in out
    shares = [float(line.split()[-1].rstrip("%")) for line in out.splitlines()[2:19]]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_explain_shows_the_reasoning(vqr1, names: list[str], monkeypatch: pytest.MonkeyPatch):
    texts = ["<think>\nSharp and\nwell lit.\n</think>\n<answer>4.00</answer>", "<think>Some noise.</think>"]

    def replies(self, images, *args, **options):
        return [texts for _ in images]

    monkeypatch.setattr("vqr1_metric.backends.transformers.TransformersBackend.sample_replies", replies)
    out = vqr1("explain", names[0]).out
    assert re.search(r"^1\. \(\d\.\d\d\) Sharp and well lit\.$", out, re.MULTILINE)
    assert re.search(r"^2\. \(\d\.\d\d\) Some noise\.$", out, re.MULTILINE)
    assert "no reasoning" not in out
    answer = json.loads(vqr1("explain", names[0], "--json").out)
    assert [reply["reasoning"] for reply in answer["replies"]] == ["Sharp and\nwell lit.", "Some noise."]


def test_histogram():
    probabilities = torch.zeros(401)
    probabilities[0], probabilities[25], probabilities[26], probabilities[400] = 0.1, 0.2, 0.4, 0.3
    lines = [line.split() for line in explain.histogram(probabilities.tolist())]
    shown = {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
    assert shown == {
        "1.00": ("#" * 10, "10.0%"),
        "1.25": ("#" * 20, "20.0%"),
        "1.50": ("#" * 40, "40.0%"),
        "5.00": ("#" * 30, "30.0%"),
    }
    assert len(lines) == 17


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["rank", "gone.png"], "nothing was ranked"),
        (["compare", "gone.png", "gone.png"], "gone.png: no such file"),
        (["explain", "gone.png"], "nothing was explained"),
    ],
)
def test_nothing_to_do_is_an_error(vqr1, command: list[str], message: str):
    outcome = vqr1(*command)
    assert outcome.code == 1
    assert message in outcome.err.splitlines()[-1]


def test_info(vqr1, scorer: QualityScorer, capsys: pytest.CaptureFixture[str]):
    facts = json.loads(vqr1("info", "--json").out)
    assert facts["vqr1_metric"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["revision"] == scorer.backend.revision
    assert facts["type"] == "qwen2_5_vl"
    assert "12845056" in facts["pixels"]
    assert cli.main(["info"]) == 0  # loads no model
    assert "revision" not in capsys.readouterr().out


# ---------------------------------------------------------------- the program


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_needs_no_heavy_library():
    out = python(
        "import sys\n"
        "from vqr1_metric import cli\n"
        "cli.build_parser().format_help()\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    assert out.strip() == "[]"


def test_help_names_every_command_and_the_default_model(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], *([name] for name in cli.COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--help"])
        assert stop.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        if not arguments:
            assert all(f" {name} " in out for name in cli.COMMANDS)
        elif "--model" in out and arguments != ["train"]:  # whose model is the one to start from
            assert f"else {DEFAULT_MODEL}" in out


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]):
    shown = []
    for arguments in (["help"], ["--help"], ["help", "score"], ["score", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[2] == shown[3] and "--retry-errors" in shown[2]


def test_the_environment_may_name_the_model(names: list[str], tiny_qwen2_5_vl: Path, monkeypatch, capsys):
    monkeypatch.setenv("VQR1_MODEL", str(tiny_qwen2_5_vl))
    assert cli.main(["score", names[0], "--json", "--silent"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["model"] == str(tiny_qwen2_5_vl)


@pytest.mark.filterwarnings("ignore")
def test_controls_in_names_do_not_reach_the_terminal(vqr1, write_pictures, tmp_path: Path):
    path = str(write_pictures(tmp_path, ["a\x1b[31m\nb\r\u202e.png"])[0])
    for command in (["score", path], ["rank", path], ["compare", path, path], ["explain", path, "--max-new-tokens", 2]):
        outcome = vqr1(*command)
        assert outcome.code == 0
        assert "a\\u001b[31m\\nb\\r\\u202e.png" in outcome.out
        assert all(c.isprintable() or c == "\n" for c in outcome.out)


def test_version_and_wrong_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out
    for arguments in ([], ["nonsense"], ["compare", "one.png"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_a_fault_of_the_program_keeps_its_traceback(vqr1, names: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(QualityScorer, "stream", lambda self, images, in_order: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vqr1("rank", *names)


def test_memory_that_runs_out_is_one_line(vqr1, names: list[str], monkeypatch: pytest.MonkeyPatch):
    def run_out(self, images, in_order):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(QualityScorer, "stream", run_out)
    outcome = vqr1("rank", *names)
    assert outcome.code == 1
    assert "smaller --batch-tokens" in outcome.err
