"""A run that is killed at any moment goes on without losing or repeating a row, and never with other settings."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_folders import CHANGES, change_file

from vqr1_metric import score_files
from vqr1_metric.cli import main

from .conftest import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


def rows_of(path: Path) -> list[tuple[str, float]]:
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text().splitlines())
    else:
        rows = csv.DictReader(path.read_text().splitlines())
    return [(Path(row["path"]).name, float(row["score"])) for row in rows]


@pytest.fixture
def folder(write_pictures, tmp_path: Path) -> Path:
    write_pictures(tmp_path / "photos", [f"{i:03}.png" for i in range(5)])
    return tmp_path / "photos"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_cut_anywhere_is_completed(vqr1, folder: Path, tmp_path: Path, suffix: str):
    output = tmp_path / f"scores{suffix}"
    assert vqr1("score", folder, "-o", output).code == 0
    whole, expected = output.read_bytes(), rows_of(output)
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    for size in sorted({0, 1, 30, *ends, *(end - 1 for end in ends[1:]), *(end + 1 for end in ends[:-1])}):
        output.write_bytes(whole[:size])
        assert vqr1("score", folder, "-o", output, "--resume", "--silent").code == 0
        assert [name for name, _ in rows_of(output)] == [name for name, _ in expected]
        assert [s for _, s in rows_of(output)] == pytest.approx([s for _, s in expected], abs=2e-5)


def test_the_summary_is_of_all_rows_and_a_finished_file_loads_no_model(vqr1, folder: Path, tmp_path: Path, monkeypatch):
    output = tmp_path / "scores.csv"
    first = json.loads(vqr1("score", folder, "-o", output, "--json").out)
    monkeypatch.setattr("vqr1_metric.scorer.QualityScorer.backend", property(lambda self: pytest.fail("loaded")))
    again = vqr1("score", folder, "-o", output, "--resume")
    assert "5, 0 of them new" in again.out
    summary = json.loads(vqr1("score", folder, "-o", output, "--resume", "--json").out)
    assert {**summary, "mean": None, "interval": None} == {**first, "mean": None, "interval": None}
    assert [summary["mean"], *summary["interval"]] == pytest.approx([first["mean"], *first["interval"]], abs=1e-6)


def test_new_pictures_are_added(vqr1, write_pictures, folder: Path, tmp_path: Path):
    output = tmp_path / "scores.csv"
    vqr1("score", folder, "-o", output)
    before = output.read_bytes()
    write_pictures(folder, ["000b.png"])
    assert "6, 1 of them new" in vqr1("score", folder, "-o", output, "--resume").out
    assert output.read_bytes().startswith(before)
    assert rows_of(output)[-1][0] == "000b.png"


def test_resume_without_a_file_starts_one(vqr1, folder: Path, tmp_path: Path):
    assert vqr1("score", folder, "-o", tmp_path / "scores.csv", "--resume").code == 0
    assert len(rows_of(tmp_path / "scores.csv")) == 5


def test_a_file_in_the_way_is_kept_unless_overwritten(vqr1, folder: Path, tmp_path: Path):
    output = tmp_path / "scores.csv"
    output.write_text("mine\n")
    outcome = vqr1("score", folder, "-o", output)
    assert outcome.code == 1
    assert "exists: --resume continues it, --overwrite replaces it" in outcome.err
    assert vqr1("score", folder, "-o", output, "--resume").code == 1  # nothing says what made it
    assert output.read_text() == "mine\n"
    assert vqr1("score", folder, "-o", output, "--overwrite").code == 0
    assert len(rows_of(output)) == 5


OTHER_SETTINGS = {
    "mode": ("--mode", "think"),
    "dtype": ("--dtype", "bfloat16"),
    "quantization": ("--quantization", "8bit"),
    "max_pixels": ("--max-pixels", 5000),
    "min_pixels": ("--min-pixels", 5000),
    "deterministic": ("--deterministic",),
}


@pytest.mark.parametrize("more", [False, True])
def test_other_settings_are_refused(vqr1, folder: Path, tmp_path: Path, tiny_qwen2_vl: Path, more: bool):
    """Also by a run with nothing left to do, which would otherwise hand out the old scores as its own."""
    output = tmp_path / "scores.csv"
    vqr1("score", folder / "000.png" if more else folder, "-o", output)
    before = output.read_bytes()
    resume = ("score", folder, "-o", output, "--resume")
    outcomes = {setting: vqr1(*resume, *options) for setting, options in OTHER_SETTINGS.items()}
    outcomes["weights"] = vqr1(*resume, model=tiny_qwen2_vl)
    for setting, outcome in outcomes.items():
        assert outcome.code == 1
        assert f"was made with {setting} " in outcome.err
        assert outcome.err.splitlines()[-1].endswith("Use the same model and settings, or another output file.")
        assert output.read_bytes() == before
    assert vqr1(*resume).code == 0


def test_the_same_model_elsewhere_is_the_same(vqr1, folder: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    output = tmp_path / "scores.csv"
    vqr1("score", folder / "000.png", "-o", output)
    copy = shutil.copytree(tiny_qwen2_5_vl, tmp_path / "elsewhere")
    same = ("--dtype", "float32", "--max-pixels", 12845056)
    outcome = vqr1("score", folder, "-o", output, "--resume", *same, model=f"{copy}/")
    assert outcome.code == 0 and "5, 4 of them new" in outcome.out


def test_a_folder_that_changed_is_another_model(vqr1, folder: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    """Whatever file of it: old scores are never handed out for it, in the same process neither."""
    model = shutil.copytree(tiny_qwen2_5_vl, tmp_path / "model")
    output = tmp_path / "scores.csv"
    assert vqr1("score", folder, "-o", output, model=model).code == 0
    for name, part in CHANGES.items():
        kept = (model / name).read_bytes()
        change_file(model / name)
        outcome = vqr1("score", folder, "-o", output, "--resume", model=model)
        assert outcome.code == 1 and f"was made with {part} " in outcome.err
        (model / name).write_bytes(kept)
        assert vqr1("score", folder, "-o", output, "--resume", model=model).code == 0


def test_interrupted(vqr1, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "scores.csv"
    write = score_files.RecordWriter.write

    def interrupted_at_the_fourth(self: score_files.RecordWriter, result) -> None:
        if result.name.endswith("003.png"):
            raise KeyboardInterrupt
        write(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(score_files.RecordWriter, "write", interrupted_at_the_fourth)
        outcome = vqr1("score", folder, "-o", output)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == f"vqr1: interrupted: 3 rows are in {output}, --resume continues there"
    assert len(rows_of(output)) == 3
    assert "5, 2 of them new" in vqr1("score", folder, "-o", output, "--resume").out


KILLED_WHILE_WRITING = """
import os, signal, sys
from vqr1_metric import cli, score_files

write = score_files.RecordWriter.write

def half(self, result):
    if result.name.endswith("003.png"):
        whole = self._file
        class Half:
            fileno = whole.fileno
            def write(self, line):
                whole.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        self._file = Half()
    write(self, result)

score_files.RecordWriter.write = half
cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_while_writing_a_row(vqr1, folder: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    output = tmp_path / "scores.csv"
    arguments = ["score", folder, "-o", output, "--model", tiny_qwen2_5_vl, "--device", "cpu", "--silent"]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *arguments], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not output.read_bytes().endswith(b"\n")
    assert "5, 2 of them new" in vqr1("score", folder, "-o", output, "--resume").out
    assert [name for name, _ in rows_of(output)] == [f"{i:03}.png" for i in range(5)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_at_an_arbitrary_moment(vqr1, write_pictures, tmp_path: Path, tiny_qwen2_5_vl: Path):
    folder, output = tmp_path / "many", tmp_path / "scores.csv"
    names = [path.name for path in write_pictures(folder, [f"{i:03}.png" for i in range(160)], side=28)]
    command = [sys.executable, "-m", "vqr1_metric.cli", "score", folder, "-o", output, "--silent"]
    process = subprocess.Popen([*command, "--model", tiny_qwen2_5_vl, "--device", "cpu"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size > 1000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    written = output.read_bytes().count(b"\n") - 1
    assert 0 < written < 160
    outcome = vqr1("score", folder, "-o", output, "--resume")
    assert f"160, {160 - written} of them new" in outcome.out
    assert sorted(name for name, _ in rows_of(output)) == names  # within 64 images those of like size come together


# ---------------------------------------------------------------- two runs, other folders, errors tried again


def start(arguments: list[str | Path], cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "vqr1_metric.cli", "score", *arguments]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("resuming", [False, True], ids=["new", "resume"])
def test_two_runs_into_one_file(
    vqr1, write_pictures, tmp_path: Path, tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch, resuming: bool
):
    """One gets the file and loses nothing; the other says so, at once or when it finds the file there."""
    for name in "ab":
        write_pictures(tmp_path / name, [f"{name}{i:02}.png" for i in range(20)], side=28)
    output = tmp_path / "scores.csv"
    options = ["-o", output, "--model", tiny_qwen2_5_vl, "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    if resuming:
        vqr1("score", "a/a00.png", "-o", output)
        options.append("--resume")
    runs = [start([tmp_path / name, *options], tmp_path) for name in "ab"]
    outcomes = [(run.communicate(timeout=120), run.returncode) for run in runs]
    names = [name for name, _ in rows_of(output)]
    assert len(set(names)) == len(names)
    for folder, ((out, err), code) in zip("ab", outcomes, strict=True):
        if code:
            assert "another run is writing this file" in err or "exists: --resume continues it" in err, (out, err)
        else:
            assert sum(name.startswith(folder) for name in names) == 20
    assert 0 in [code for _, code in outcomes]


def test_another_working_directory_repeats_nothing(vqr1, folder: Path, tmp_path: Path, monkeypatch):
    output = tmp_path / "scores.csv"
    monkeypatch.chdir(tmp_path)
    vqr1("score", "photos/000.png", "-o", "scores.csv")
    monkeypatch.chdir(folder)
    assert "5, 4 of them new" in vqr1("score", ".", "-o", "../scores.csv", "--resume").out
    monkeypatch.chdir(tmp_path.parent)
    for argument in (folder, os.path.relpath(folder)):
        assert "5, 0 of them new" in vqr1("score", argument, "-o", output, "--resume").out
    paths = [name for name, _ in score_files.read_rows(output)]
    assert sorted(paths) == [f"photos/{i:03}.png" for i in range(5)]  # all as seen from where the file was begun
    tmp_path.rename(tmp_path.parent / "moved")  # a file moves together with its images
    monkeypatch.chdir(tmp_path.parent)
    assert "5, 0 of them new" in vqr1("score", "moved/photos", "-o", "moved/scores.csv", "--resume").out
    (tmp_path.parent / "moved").rename(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_errors_are_tried_again_when_told(vqr1, folder: Path, tmp_path: Path, suffix: str):
    output, bad = tmp_path / f"scores{suffix}", folder / "002.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    outcome = vqr1("score", folder, "gone.png", "-o", output, "--strict")
    assert outcome.code == 1 and "2 pictures have no score (--strict)" in outcome.err
    bad.write_bytes(whole)
    assert "6, 0 of them new" in vqr1("score", folder, "gone.png", "-o", output, "--resume").out
    assert "6, 2 of them new" in vqr1("score", folder, "gone.png", "-o", output, "--retry-errors").out
    assert len(rows := list(score_files.read_rows(output))) == 6
    assert [name for name, score in rows if score != score] == ["gone.png"]


def test_every_row_is_written_when_its_batch_is_done(write_pictures, tmp_path: Path):
    """Between two batches the rows of the first are in the file, whatever their sizes and places."""
    from stub_scorer import FormulaBackend

    from vqr1_metric.scorer import QualityScorer

    output, found = tmp_path / "scores.csv", []

    class Watching(FormulaBackend):
        def distributions(self, images, pixel_config, *, replies=None):
            found.append((self.pictures, output.read_bytes().count(b"\n") - 1 if output.exists() else 0))
            return super().distributions(images, pixel_config)

    paths = [write_pictures(tmp_path / str(i), ["x.png"], side=56 + 56 * (i % 3))[0] for i in range(12)]
    scorer = QualityScorer(backend=Watching(), batch_tokens=30)
    with score_files.RecordWriter(output) as writer:
        for result in scorer.stream(paths, in_order=False):
            writer.write(result)
    assert len(found) >= 3
    assert all(written == max(scored, 0) for scored, written in found[1:])
    assert [result.name for result in scorer.stream(paths)] == [str(path) for path in paths]


# ---------------------------------------------------------------- parts and their merging


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]):
    """Run ``vqr1 merge``: code, out, err."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main(["merge", *map(str, arguments)])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_parts_are_the_whole(vqr1, merge, write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    names = [f"{i:02}.png" for i in range(12)]
    write_pictures(tmp_path / "photos", names, side=28)
    (tmp_path / "photos" / "05.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    whole, out = f"whole{suffix}", f"s{suffix}"
    vqr1("score", "photos", "-o", whole)
    for part in range(1, 4):
        assert vqr1("score", "photos", "-o", out, "--shard", f"{part}/3").code == 0
    parts = [f"s.{part}-of-3{suffix}" for part in range(1, 4)]
    assert merge(*parts, "-o", out).out == f"rows in s{suffix}: 12\n"
    merged = dict(score_files.read_rows(Path(out)))
    assert merged == pytest.approx(dict(score_files.read_rows(Path(whole))), abs=2e-5, nan_ok=True)
    assert vqr1("score", "photos", "-o", out, "--resume").out.count("12, 0 of them new") == 1
    for arguments, message in (
        ([*parts, "-o", out], "exists: --overwrite replaces it"),
        ([*parts[:2], "-o", f"t{suffix}"], "3 of 3 is missing"),
        ([*parts, whole, "-o", f"t{suffix}"], "or of none"),
        ([parts[0], "-o", parts[0], "--overwrite"], "is one of the parts"),
    ):
        outcome = merge(*arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.err
    write_pictures(tmp_path / "photos", ["new.png"], side=28)
    assert vqr1("score", "photos", "-o", out, "--shard", "1/3", "--resume").code == 0
    assert "all parts have to get the same arguments" in merge(*parts, "-o", f"t{suffix}").err
    assert not (tmp_path / f"t{suffix}").exists()


def test_merging_takes_the_row_with_a_score(vqr1, merge, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(whole[:99])
    vqr1("score", folder, "-o", tmp_path / "a.csv")
    (folder / "002.png").write_bytes(whole)
    monkeypatch.chdir(folder)
    vqr1("score", "002.png", "003.png", "-o", tmp_path / "b.csv")
    monkeypatch.chdir(tmp_path)
    outcome = merge("a.csv", "b.csv", "-o", "all.csv")
    assert outcome.out == "rows in all.csv: 5 (2 more were of images that have one)\n"
    rows = dict(score_files.read_rows(tmp_path / "all.csv"))
    assert not any(score != score for score in rows.values())
    assert sorted(Path(name).name for name in rows) == [f"{i:03}.png" for i in range(5)]


def test_an_unfinished_part_is_not_merged(vqr1, merge, folder: Path, tmp_path: Path):
    for part in (1, 2):
        vqr1("score", folder, "-o", tmp_path / "s.csv", "--shard", f"{part}/2")
    first = tmp_path / "s.1-of-2.csv"
    meta = score_files.read_meta(first)
    meta.pop("of")
    score_files.write_meta(first, meta)
    outcome = merge(first, tmp_path / "s.2-of-2.csv", "-o", tmp_path / "s.csv")
    assert outcome.code == 1 and "this part is not finished; --resume completes it" in outcome.err


def test_from_python(folder: Path, tmp_path: Path):
    from stub_scorer import formula_scorer

    from vqr1_metric.score_runs import score_to_file

    summary = score_to_file(formula_scorer(), [folder], tmp_path / "s.csv")
    assert (summary["images"], summary["scored"]) == (5, 5)
    with pytest.raises(score_files.RecordError, match="exists: --resume"):
        score_to_file(formula_scorer(), [folder], tmp_path / "s.csv")
    scorer = formula_scorer()
    assert score_to_file(scorer, [folder], tmp_path / "s.csv", resume=True)["mean"] == pytest.approx(summary["mean"])
    assert scorer.backend.pictures == 0
    results = list(scorer.score_folder(folder))
    assert [Path(result.name).name for result in results] == [f"{i:03}.png" for i in range(5)]


# ---------------------------------------------------------------- standard streams


@pytest.mark.skipif(os.name == "nt", reason="no /dev/full there")
def test_closed_and_full_streams(folder: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    code = "import sys; from vqr1_metric import cli; sys.exit(cli.main(sys.argv[1:]))"
    program = f'"{sys.executable}" -c "{code}" score {folder} --model {tiny_qwen2_5_vl} --device cpu'
    for number, (redirection, expected) in enumerate(
        [(">&-", 0), ("2>&- >&- <&-", 0), ("2>/dev/full", 0), (">/dev/full", 1)]
    ):
        output = f"-o {tmp_path}/{number}.csv" if expected == 0 else ""
        done = subprocess.run(f"{program} {output} {redirection}", shell=True, capture_output=True, text=True)
        assert done.returncode == expected, (redirection, done)
        assert "Traceback" not in done.stderr
        if output:
            assert len(rows_of(tmp_path / f"{number}.csv")) == 5
        else:
            assert "No space left" in done.stderr and done.stderr.count("vqr1:") == 1
