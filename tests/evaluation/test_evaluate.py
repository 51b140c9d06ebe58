"""`vqr1 evaluate` from label file to tables."""

import csv
import json
import os
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from evaluation_files import run_processes, save_picture
from stub_scorer import LinearBackend

from vqr1_metric.cli import main
from vqr1_metric.scorer import QualityScorer


def evaluate(folder: Path, *options: str, output: str = "out") -> dict:
    arguments = ["evaluate", "--labels", str(folder / "labels.csv"), "--images", str(folder / "pictures")]
    assert main([*arguments, "-o", str(folder / output), "--resamples", "50", "--silent", *options]) == 0
    return json.loads((folder / output / "results.json").read_text())


def scorers(results: dict) -> dict[str, dict]:
    return {row["name"]: row for row in results["sets"][0]["scorers"]}


def test_tables_hold_what_was_measured(labelled: Path, backend) -> None:
    results = evaluate(labelled)
    found = scorers(results)
    assert list(found) == ["linear", "log Laplacian variance", "contrast"]
    assert found["linear"]["n"] == 24 and 0.9 < found["linear"]["values"]["srcc"] < 1
    assert found["linear"]["values"]["scene_srcc"] > 0 and found["linear"]["resampled"] == "scenes"
    low, high = found["linear"]["intervals"]["srcc"]
    assert low < found["linear"]["values"]["srcc"] <= high
    assert found["linear"]["calibration"]["intervals"] == "distribution"
    assert [row["other"] for row in results["sets"][0]["differences"]] == ["log Laplacian variance", "contrast"]
    assert results["made_with"]["model"]["revision"] == "1" and results["made_with"]["seed"] == 0
    text = (labelled / "out" / "table.md").read_text()
    assert "## labels (24 pictures)" in text and "| linear | 24 | ." in text and "SRCC in scenes" in text
    with (labelled / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["srcc"]) == found["linear"]["values"]["srcc"] and rows[0]["kind"] == "model"
    made = (rows[0]["model"], rows[0]["revision"], rows[0]["mode"], rows[0]["seed"])
    assert made == ("folder/linear", "1", "score", "0") and rows[1]["model"] == ""
    assert rows[1]["command"] == results["made_with"]["command"]
    assert (labelled / "out" / "labels.linear.svg").read_text().count("h0") == 24
    with (labelled / "out" / "labels.scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and float(rows[12]["linear"]) == pytest.approx(1 + 4 * 13 / 26, abs=0.02)


def test_same_inputs_same_bytes_and_nothing_scored_twice(labelled: Path, backend) -> None:
    evaluate(labelled)
    first = {path.name: path.read_bytes() for path in sorted((labelled / "out").glob("*.*"))}
    assert backend.pictures == 24
    evaluate(labelled)
    assert backend.pictures == 24  # all from the cache
    assert first == {path.name: path.read_bytes() for path in sorted((labelled / "out").glob("*.*"))}


def test_scores_of_others_stand_beside(labelled: Path, backend) -> None:
    names = [line.split(",")[0] for line in (labelled / "labels.csv").read_text().splitlines()[1:]]
    rows = [f"elsewhere/{name},{24 - i}" for i, name in enumerate(names)]
    (labelled / "niqe.csv").write_text("\n".join(["path,score", *rows[:-1], f"{names[-1]},"]) + "\n")
    options = ["--against", f"NIQE={labelled / 'niqe.csv'}", "--lower-better", "NIQE", "--no-baselines"]
    results = evaluate(labelled, *options)
    found = scorers(results)["NIQE"]
    assert (found["n"], found["left_out"], found["kind"]) == (23, 1, "scores")
    assert found["values"]["srcc"] > 0.9  # turned round
    assert results["sets"][0]["dataset"]["problem_counts"] == {"no score": 1}
    alone = evaluate(labelled, "--scores", str(labelled / "niqe.csv"), "--no-baselines", output="alone")
    assert scorers(alone)["niqe"]["values"]["srcc"] < -0.9 and backend.pictures == 24


def test_scores_of_a_file_are_found_by_the_pictures_name_and_keep_their_reasons(labelled: Path, backend) -> None:
    lines = (labelled / "labels.csv").read_text().splitlines()
    names = [line.split(",")[0] for line in lines[1:]]
    (labelled / "labels.csv").write_text("\n".join(lines).replace(".png", ".bmp"))  # published as BMP, stored as PNG
    rows = [f"elsewhere/{name},{i},," for i, name in enumerate(names)]
    rows[3] = f"elsewhere/{names[3]},nan,is damaged"  # as vqr1 score writes it
    rows.append(f"elsewhere/{names[5]},99,")
    (labelled / "o.csv").write_text("\n".join(["path,score,error", *rows, rows[7]]) + "\n")
    results = evaluate(labelled, "--scores", str(labelled / "o.csv"), "--no-baselines")
    assert scorers(results)["o"]["n"] == 22 and scorers(results)["o"]["left_out"] == 2
    problems = {row["subject"]: row["detail"] for row in results["sets"][0]["dataset"]["problems"]}
    assert problems == {
        names[3].replace("png", "bmp"): "o: is damaged",
        names[5].replace("png", "bmp"): "o: occurs more than once in the file of scores, with different scores",
    }


def test_bad_labels_do_not_stop_the_run(labelled: Path, backend) -> None:
    with (labelled / "labels.csv").open("a") as file:
        file.write("gone.png,3\n0_0.png,9\nbroken.png,2\nword.png,good\n")
    (labelled / "pictures" / "broken.png").write_bytes(b"not a picture")
    save_picture(labelled / "pictures" / "unlabelled.png", 0.5)
    results = evaluate(labelled)
    counts = results["sets"][0]["dataset"]["problem_counts"]
    # broken.png has no score from any of the three scorers; 0_0.png has labels, though they contradict each other
    assert counts == {"missing picture": 1, "missing label": 1, "duplicate": 1, "bad row": 1, "no score": 3}
    assert scorers(results)["linear"]["n"] == 23 and scorers(results)["linear"]["left_out"] == 1
    problems = results["sets"][0]["dataset"]["problems"]
    assert any("linear: is not a picture" in row["detail"] for row in problems if row["subject"] == "broken.png")
    text = (labelled / "out" / "table.md").read_text()
    assert "label rows without a picture: 1; pictures without a label: 1;" in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_loses_no_result(labelled: Path, backend) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    save_picture(labelled / "pictures" / "x.png", 0.5).rename(labelled / "pictures" / name)
    save_picture(labelled / "pictures" / "y.png", 0.5)
    problems = {row["subject"] for row in evaluate(labelled)["sets"][0]["dataset"]["problems"]}
    assert problems == {name, "y.png"} and "caf\\udce9.png" in (labelled / "out" / "index.html").read_text()


def test_no_cell_is_a_formula(labelled: Path, backend) -> None:
    save_picture(labelled / "pictures" / "=1+1.png", 0.5)
    with (labelled / "labels.csv").open("a") as file:
        file.write("=1+1.png,3,0.4,=s,@m\n")
    names = [line.split(",")[0] for line in (labelled / "labels.csv").read_text().splitlines()[1:]]
    (labelled / "o.csv").write_text("image,score\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
    evaluate(labelled, "--against", f"+other={labelled / 'o.csv'}", "--no-baselines")
    with (labelled / "out" / "labels.scores.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][-1] == "'+other" and rows[-1][0] == "'=1+1.png" and rows[-1][3:5] == ["'=s", "'@m"]
    with (labelled / "out" / "table.csv").open() as file:
        assert [row[2] for row in csv.reader(file)] == ["scorer", "linear", "'+other"]


def test_constant_predictions_and_few_rows_give_a_reason(labelled: Path, backend) -> None:
    names = [line.split(",")[0] for line in (labelled / "labels.csv").read_text().splitlines()[1:]]
    (labelled / "same.csv").write_text("image,score\n" + "".join(f"{name},3\n" for name in names))
    results = evaluate(labelled, "--against", str(labelled / "same.csv"), "--no-baselines")
    found = scorers(results)["same"]
    assert found["values"]["srcc"] is None and "same score, 3" in found["reasons"]["srcc"]
    assert "every picture has the same score" in results["sets"][0]["differences"][0]["reason"]
    (labelled / "labels.csv").write_text("image,mos\n0_0.png,1\n0_1.png,2\n0_2.png,3\n")
    results = evaluate(labelled, output="few")
    assert results["sets"][0]["scorers"][0]["values"]["srcc"] is None
    assert "3 pictures with a score are too few" in (labelled / "few" / "table.md").read_text()


def test_labels_without_any_picture_are_an_error(labelled: Path, backend, capsys) -> None:
    (labelled / "labels.csv").write_text("image,mos\nx.png,1\ny.png,2\n")
    arguments = ["evaluate", "--labels", str(labelled / "labels.csv"), "--images", str(labelled / "pictures")]
    assert main([*arguments, "-o", str(labelled / "out")]) == 1
    assert "Expected pictures of 'labels', but none of them was found" in capsys.readouterr().err


def test_dmos_turns_the_labels_round(labelled: Path, backend) -> None:
    results = evaluate(labelled, "--lower-is-better")
    assert scorers(results)["linear"]["values"]["srcc"] < -0.9
    assert results["sets"][0]["dataset"]["lower_is_better"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate on what"),
        (["--labels", "l.csv"], "where do the results go"),
        (["--labels", "none.csv", "-o", "out"], "Expected a file"),
        (["--suite", "paper", "-o", "out"], "where are the data sets"),
        (["--suite", "none", "--root", ".", "-o", "out"], "Expected a suite"),
        (["--dataset", "none", "--root", ".", "-o", "out"], "Expected a data set"),
        (["--labels", "ok.csv", "-o", "out", "--scores", "s.csv", "--model", "nano"], "takes the model's place"),
        (["--labels", "ok.csv", "-o", "out", "--against", "none.csv"], "a file of ratings, but 'none.csv' is none"),
        (["--labels", "ok.csv", "-o", "out", "--against", "s.csv", "--against", "x/s.csv"], "are called 's'"),
        (["--labels", "ok.csv", "-o", "out", "--against", "linear=s.csv"], "two scorers are called 'linear'"),
        (["--labels", "ok.csv", "-o", "out", "--against", "s.csv", "--lower-better", "S"], "none is called 'S'"),
        (["--labels", "ok.csv", "-o", "s.csv"], "-o names a folder, but 's.csv' is a file"),
        (["--dataset", "koniq", "--root", "no", "-o", "out"], "no folder 'no'. KonIQ: get it from https://database"),
        (["--ladder", ".", "-o", "out", "--against", "s.csv"], "leave out --against and --pyiqa"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capsys, tmp_path: Path, monkeypatch, backend: LinearBackend
) -> None:
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "a.png", 0.5)
    Path("ok.csv").write_text("image,mos\na.png,1\n")
    Path("s.csv").write_text("image,score\na.png,1\n")
    assert main(["evaluate", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert backend.pictures == 0  # found before anything was scored


def test_level_is_a_probability(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--labels", "l.csv", "-o", "out", "--level", "2"])
    assert "expected a number between 0 and 1, but got 2" in capsys.readouterr().err


def test_list_says_where_to_get_each_set(capsys) -> None:
    assert main(["evaluate", "--list"]) == 0
    text = capsys.readouterr().out
    for name in ["koniq", "spaq", "kadid10k", "agiqa3k", "tid2013", "biq2021", "bid", "clive", "liu13", "sriqa"]:
        assert f"\n{name} " in f"\n{text}"
    assert "https://database.mmsp-kn.de/koniq-10k-database.html" in text and "short edge of 768" in text


@pytest.mark.filterwarnings("ignore:.*was this model trained for the question")
def test_with_a_real_model(labelled: Path, tiny_qwen2_5_vl: Path) -> None:
    results = evaluate(labelled, "--model", str(tiny_qwen2_5_vl), "--max-pixels", "3136")
    found = results["sets"][0]["scorers"][0]
    assert found["n"] == 24 and found["kind"] == "model"
    assert found["identity"]["revision"].startswith("sha256:") and found["identity"]["max_pixels"] == 3136


def test_suite_takes_what_is_there(tmp_path: Path, backend, capsys) -> None:
    folder = tmp_path / "KonIQ-10k"
    lines = ["image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set"]
    for i in range(12):
        save_picture(folder / "1024x768" / f"{i}.jpg", (i + 1) / 14)
        lines.append(f"{i}.jpg,0,0,0,0,0,100,{20 + 5 * i + (-1) ** i * 4},0.5,{'test' if i % 4 else 'training'}")
    (folder / "koniq10k_distributions_sets.csv").write_text("\n".join(lines))
    save_picture(tmp_path / "spaq" / "1.jpg", 0.5, (900, 800))
    (tmp_path / "spaq" / "labels.txt").write_text("1.jpg 50\n")
    arguments = ["evaluate", "--suite", "paper", "--root", str(tmp_path), "-o", str(tmp_path / "out"), "--silent"]
    assert main([*arguments, "--resamples", "20"]) == 0
    assert "not there, left out: BID: get it from https://" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    koniq, spaq = (entry["dataset"] for entry in results["sets"])
    assert (koniq["name"], koniq["split"], koniq["labelled"]) == ("KonIQ", "test", 9)
    assert (spaq["name"], spaq["short_edge"]) == ("SPAQ", 768) and (768, 864) in backend.sizes
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| *VisualQuality-R1 (published)* |  | *.830* | *.840* |" in text and "## Mean over the data sets" in text
    assert "1 pictures of 11125: this is not the complete set" in text
    page = (tmp_path / "out" / "index.html").read_text()
    assert "VisualQuality-R1 (published)" in page
    one = ["evaluate", "--dataset", "koniq", "--root", str(folder), "--split", "all", "-o", str(tmp_path / "one")]
    assert main([*one, "--silent", "--resamples", "20"]) == 0
    assert json.loads((tmp_path / "one" / "results.json").read_text())["sets"][0]["dataset"]["labelled"] == 12


def test_metrics_of_pyiqa_by_name(labelled: Path, backend, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What is done with pyiqa's answers; tests/integrations/test_pyiqa.py runs the real one where it is installed."""

    class Metric:
        lower_better = True

        def __call__(self, picture: torch.Tensor) -> torch.Tensor:
            assert picture.shape == (1, 3, 32, 40) and picture.max() <= 1
            if picture[0, 0].mean() > 0.9:
                raise ValueError("too red")
            return -picture[:, :1].mean(dim=(2, 3))

    def create_metric(name: str, **options) -> Metric:
        if name == "offline":
            raise OSError("no network")
        return Metric()

    module = types.ModuleType("pyiqa")
    module.list_models = lambda metric_mode=None: ["niqe", "offline"] + ["psnr"] * (metric_mode is None)
    module.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    results = evaluate(labelled, "--pyiqa", "niqe", "--no-baselines")
    found = scorers(results)["niqe"]
    assert found["kind"] == "pyiqa" and found["values"]["srcc"] > 0.9 and found["left_out"] == 1
    assert results["sets"][0]["dataset"]["problems"][-1]["detail"] == "niqe: ValueError: too red"
    arguments = ["evaluate", "--labels", str(labelled / "labels.csv"), "--images", str(labelled / "pictures")]
    faults = {
        "none": "Expected a metric that pyiqa knows",
        "psnr": "needs no reference, but 'psnr' does",
        "offline": "Expected pyiqa to make its metric offline, but it cannot (OSError: no network)",
    }
    scored = backend.pictures
    for name, message in faults.items():
        assert main([*arguments, "-o", str(labelled / "o"), "--pyiqa", name]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    assert main([*arguments, "-o", str(labelled / "o"), "--pyiqa", "niqe"]) == 1
    assert "pip install pyiqa" in capsys.readouterr().err and backend.pictures == scored


def test_two_processes_write_the_bytes_of_one(tmp_path: Path, tiny_qwen2_5_vl: Path) -> None:
    """The whole command on a real model, as torchrun starts it and alone; 40 pictures are two chunks."""
    for i in range(40):
        save_picture(tmp_path / "pictures" / f"{i}.png", (i + 1) / 42, (40 + i % 3, 32))
    lines = [f"{i}.png,{(i * 7) % 40}\n" for i in range(40)]
    (tmp_path / "labels.csv").write_text("image,mos\n" + "".join(lines))
    command = [sys.executable, "-m", "vqr1_metric.cli", "evaluate", "--labels", "../labels.csv", "-o", "out"]
    command += ["--images", "../pictures", "--model", str(tiny_qwen2_5_vl), "--max-pixels", "3136"]
    run_processes([*command, "--resamples", "50", "--silent"], [tmp_path / name for name in ("one", "two", "two")])
    written = [{p.name: p.read_bytes() for p in (tmp_path / name / "out").glob("*.*")} for name in ("one", "two")]
    assert written[0] == written[1] and {"results.json", "table.csv", "index.html"} <= set(written[0])
    shares = sorted((tmp_path / "two" / "out" / "cache").glob("*/scores-*.jsonl"))
    assert [len(share.read_bytes().splitlines()) for share in shares] == [32, 8]


def test_example_measures_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    lines = []
    for i in range(8):
        save_picture(tmp_path / "BID" / f"{i}.png", (i + 1) / 10)
        lines.append(f"{i}.png {i + 1}")
    (tmp_path / "BID" / "labels.txt").write_text("\n".join(lines))
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "reproduce_paper.py"))
    seen = []

    def scorer(model: str, **options) -> QualityScorer:
        seen.append(options)
        return QualityScorer(backend=LinearBackend(), mode=options["mode"])

    monkeypatch.setitem(example["main"].__globals__, "QualityScorer", scorer)
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--root", str(tmp_path), "-o", str(tmp_path / "out")])
    example["main"]()
    text = capsys.readouterr().out
    assert "| as the authors sample | 8 |" in text and "| one forward pass | 8 | 1.000" in text
    assert "*VisualQuality-R1 (published)* |  | *.790* | *.806*" in text
    assert seen[0]["add_vision_id"] and seen[0]["num_samples"] == 1 and seen[1]["mode"] == "score"
