"""``vqr1 score``: rows, summary, exit codes."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from vqr1_metric import __version__, score_files
from vqr1_metric.results import ImageScore
from vqr1_metric.score_runs import Tally
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_a_folder_into_a_csv(vqr1, photos: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    output = tmp_path / "scores.csv"
    outcome = vqr1("score", photos, "-o", output)
    assert outcome.code == 0
    rows = rows_of(output)
    assert [Path(row["path"]).name for row in rows] == ["a.jpg", "b.png", "c.PNG"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert rows[1]["error"].startswith("is damaged or truncated")
    assert rows[1]["score"] == "nan"
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu")
    for row in (rows[0], rows[2]):
        expected = scorer.score(row["path"])[0]
        assert float(row["score"]) == pytest.approx(expected.score, abs=2e-5)
        assert float(row["std"]) == pytest.approx(expected.std, abs=2e-5)
        assert [float(row["low"]), float(row["high"])] == pytest.approx(expected.interval(), abs=0.011)
    meta = json.loads((tmp_path / "scores.csv.meta.json").read_text())
    assert meta["revision"] == scorer.backend.revision
    assert meta["identity"] == scorer.identity()
    assert (meta["identity"]["mode"], meta["identity"]["dtype"]) == ("score", "float32")
    assert (meta["model"], meta["package"]) == (str(tiny_qwen2_5_vl), __version__)
    mean = sum(float(row["score"]) for row in (rows[0], rows[2])) / 2
    assert f"mean {mean:.3f}, 95% interval" in outcome.out
    assert "without a score: 1" in outcome.out
    assert scorer.backend.revision in outcome.out
    assert "3/3" in outcome.err  # the progress bar


def test_subfolders(vqr1, photos: Path, tmp_path: Path):
    assert vqr1("score", photos, "-r", "-o", tmp_path / "s.csv").code == 0
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "s.csv")][3:] == ["d.png", "e.png"]


def test_without_output_a_table(vqr1, photos: Path):
    outcome = vqr1("score", photos, photos / "gone.png")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["score", "std", "95%", "range", "coverage", "picture"]
    at = lines[0].index("picture")
    assert [line[at:].split(":")[0] for line in lines[1:5]] == [
        str(photos / name) for name in ("a.jpg", "b.png", "c.PNG", "gone.png")
    ]
    assert lines[4].endswith("gone.png: no such file")
    assert lines[4].split()[0] == "nan"
    assert lines[5].startswith("mean ")


def test_json_with_and_without_output(vqr1, photos: Path, tmp_path: Path):
    summary = json.loads(vqr1("score", photos, "-o", tmp_path / "s.csv", "--json").out)
    assert (summary["pictures"], summary["scored"], summary["failed"]) == (3, 2, 1)
    assert summary["interval"][0] <= summary["mean"] <= summary["interval"][1]
    assert summary["output"] == str(tmp_path / "s.csv")
    whole = json.loads(vqr1("score", photos, "--json", "--silent").out)
    assert [row["score"] is None for row in whole["rows"]] == [False, True, False]
    assert whole["summary"] == {**summary, "output": None}


def test_jsonl_output(vqr1, photos: Path, tmp_path: Path):
    assert vqr1("score", photos, "-o", tmp_path / "s.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sum(rows[0]["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert rows[1]["probabilities"] is None


def test_silent(vqr1, photos: Path, tmp_path: Path):
    outcome = vqr1("score", photos, "-o", tmp_path / "s.csv", "--silent")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert len(rows_of(tmp_path / "s.csv")) == 3


def test_a_picture_named_twice_is_scored_once(vqr1, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(photos)
    (photos / "list.csv").write_text("image\na.jpg\n./a.jpg\n")
    assert vqr1("score", "a.jpg", ".", "*.jpg", "list.csv", "-o", tmp_path / "s.csv").code == 0
    assert [row["path"] for row in rows_of(tmp_path / "s.csv")] == ["a.jpg", os.path.join(".", "b.png"), "./c.PNG"]


def test_other_modes_are_recorded_and_reproducible(vqr1, photos: Path, tmp_path: Path):
    options = ("--mode", "sample", "--num-samples", 2, "--max-new-tokens", 4, "--json")
    first = vqr1("score", photos / "a.jpg", "-o", tmp_path / "s.jsonl", *options)
    assert first.code == 1  # this model writes no score
    row = json.loads((tmp_path / "s.jsonl").read_text())
    assert "none of 2 sampled replies held a score" in row["error"]
    assert len(row["replies"]) == 2
    meta = score_files.read_meta(tmp_path / "s.jsonl")
    sampling = meta["identity"]["sampling"]
    assert (meta["identity"]["mode"], sampling["num_samples"], sampling["seed"]) == ("sample", 2, 0)
    vqr1("score", photos / "a.jpg", "-o", tmp_path / "t.jsonl", *options)
    assert json.loads((tmp_path / "t.jsonl").read_text()) == row


# ---------------------------------------------------------------- what goes wrong


def test_exit_code_when_nothing_is_scored(vqr1, photos: Path, tmp_path: Path):
    outcome = vqr1("score", photos / "b.png", "gone.png", "-o", tmp_path / "s.csv")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("vqr1: nothing was scored")
    assert [row["error"] != "" for row in rows_of(tmp_path / "s.csv")] == [True, True]


def test_a_folder_without_pictures(vqr1, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    outcome = vqr1("score", tmp_path / "empty")
    assert outcome.code == 1
    assert "empty: holds no images; -r searches its subfolders too" in outcome.out


def test_every_bad_file_has_its_row_and_nothing_else_is_lost(vqr1, write_pictures, tmp_path: Path):
    folder = tmp_path / "photos"
    good = write_pictures(folder, ["good1.png", "good2.png"])
    alone = [row["score"] for row in json.loads(vqr1("score", *good, "--json").out)["rows"]]
    data = good[0].read_bytes()
    (folder / "cut.png").write_bytes(data[:200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (5000, 1)).save(folder / "thin.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (20_000, 120), "navy").save(folder / "wide.png")
    Image.new("CMYK", (60, 60), "navy").save(folder / "cmyk.jpg")
    (folder / "folder.png").mkdir()
    outcome = vqr1("score", folder, folder / "folder.png", "-o", tmp_path / "s.csv")
    assert outcome.code == 0
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "s.csv")}
    reasons = {name: row["error"].split(" (")[0].split(", but ")[0] for name, row in rows.items() if row["error"]}
    assert reasons == {
        "cut.png": "is damaged or truncated",
        "empty.png": "is empty",
        "text.png": "is not a picture that Pillow can read",
        "thin.png": "5000x1 pixels is too thin to judge",
        "folder.png": "holds no images; -r searches its subfolders too",
    }
    assert {name for name in rows if name not in reasons} == {
        "good1.png",
        "good2.png",
        "tiny.png",
        "wide.png",
        "cmyk.jpg",
    }
    # Their tiny, huge and damaged neighbours changed nothing.
    assert [float(rows[name]["score"]) for name in ("good1.png", "good2.png")] == pytest.approx(alone, abs=2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are any bytes")
def test_odd_file_names(vqr1, write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    source = write_pictures(tmp_path, ["a.png"])[0]
    os.rename(os.fsencode(source), os.fsencode(folder) + b"/caf\xe9.png")
    write_pictures(folder, ["=1+1.png", "line\nbreak.png", "größe 写真.png"])
    output = tmp_path / "s.csv"
    assert vqr1("score", folder).code == 0
    assert vqr1("score", folder, "-o", output).code == 0
    names = [row["path"].removeprefix(f"{folder}/") for row in rows_of(output)]
    assert names == ["=1+1.png", "caf\\udce9.png", "größe 写真.png", "line\\nbreak.png"]
    assert not any(row["error"] for row in rows_of(output))
    before = output.read_bytes()
    assert vqr1("score", folder, "-o", output, "--resume").code == 0
    assert output.read_bytes() == before
    # As names that a spreadsheet would take for a formula.
    monkeypatch.chdir(folder)
    bare = tmp_path / "bare.csv"
    assert vqr1("score", "=1+1.png", "-o", bare).code == 0
    assert [row["path"] for row in rows_of(bare)] == ["'=1+1.png"]
    before = bare.read_bytes()
    assert vqr1("score", "=1+1.png", "-o", bare, "--resume").code == 0
    assert bare.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "s.txt"], "ends in .csv or .jsonl"),
        (["-o", "no/such/s.csv"], "no folder 'no/such'"),
        (["--resume"], "name it with -o"),
        (["-o", "s.csv", "--resume", "--overwrite"], "exclude each other"),
        (["--device", "toaster"], "Expected a device such as"),
        (["--dtype", "int3"], "Expected dtype to be one of"),
        (["--thinking"], "--thinking is about --mode sample"),
        (["--max-pixels", "1"], "max_pixels of at least 784 (one visual token"),
    ],
)
def test_bad_settings_are_one_line(vqr1, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments, message):
    monkeypatch.chdir(photos)
    outcome = vqr1("score", "a.jpg", "--silent", *arguments)
    assert outcome.code == (1 if "no folder" in message or "one visual token" in message else 2)
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_unknown_and_damaged_models_are_one_line(vqr1, photos: Path, tmp_path: Path, tiny_qwen2_5_vl: Path):
    damaged = {name: tmp_path / name for name in ("cut", "pickled", "missing", "other")}
    for folder in damaged.values():
        shutil.copytree(tiny_qwen2_5_vl, folder)
    weights = damaged["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (damaged["pickled"] / "model.safetensors").rename(damaged["pickled"] / "pytorch_model.bin")
    tensors = load_file(damaged["missing"] / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, damaged["missing"] / "model.safetensors", {"format": "pt"})
    (damaged["other"] / "config.json").write_text('{"model_type": "llama"}')
    expected = {
        "nobody/nothing": "--model nano",
        "/no/such/folder": "No model folder at '/no/such/folder'",
        str(damaged["cut"]): "the weights are damaged",
        str(damaged["pickled"]): "expected safetensors weights",
        str(damaged["missing"]): "1 tensors are missing",
        str(damaged["other"]): "but got 'llama'",
    }
    output = tmp_path / "s.csv"
    for model, message in expected.items():
        outcome = vqr1("score", photos / "a.jpg", "--silent", "-o", output, model=model)
        assert outcome.code == 1
        assert message in outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
        assert not output.exists()


def test_wrong_usage(vqr1, capsys: pytest.CaptureFixture[str]):
    assert vqr1("score").code == 2
    for arguments in (["--mode", "guess"], ["--batch-tokens", "0"], ["--seed", "9" * 20], ["--seed", "-1"]):
        arguments = ["score", "a.png", *arguments]
        with pytest.raises(SystemExit) as stop:
            vqr1(*arguments)
        assert stop.value.code == 2


def test_a_closed_pipe_is_no_crash(photos: Path, tiny_qwen2_5_vl: Path):
    command = [sys.executable, "-m", "vqr1_metric.cli", "score", photos, "--model", tiny_qwen2_5_vl, "--silent"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


# ---------------------------------------------------------------- memory and the interval


def test_no_result_is_kept(vqr1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many pictures there are, at most one window of results is alive."""
    references, alive = [], []
    write = score_files.RecordWriter.write

    def counting(self: score_files.RecordWriter, result: ImageScore) -> None:
        references.append(weakref.ref(result))
        alive.append(sum(reference() is not None for reference in references))
        write(self, result)

    monkeypatch.setattr(score_files.RecordWriter, "write", counting)
    (tmp_path / "list.csv").write_text("image\n" + "".join(f"{i}.png\n" for i in range(1000)))
    assert vqr1("score", tmp_path / "list.csv", "-o", tmp_path / "s.csv", "--silent").code == 1
    assert len(alive) == 1000
    assert 0 < max(alive) <= 65


def test_tally():
    tally = Tally()
    assert (tally.summary()["mean"], tally.summary()["interval"]) == (None, None)
    tally.add(3.0)
    tally.add(math.nan)
    summary = tally.summary()
    assert (summary["images"], summary["scored"], summary["failed"]) == (2, 1, 1)
    assert (summary["mean"], summary["interval"]) == (3.0, None)
    scores = np.random.default_rng(3).normal(3, 0.5, 400)
    for score in scores[1:]:
        tally.add(score)
    scores[0] = 3.0
    summary = tally.summary()
    margin = 1.96 * np.std(scores, ddof=1) / 20
    assert summary["mean"] == pytest.approx(scores.mean())
    assert summary["interval"] == pytest.approx([scores.mean() - margin, scores.mean() + margin], abs=0.01)
    assert summary == tally.summary()
