"""Score files: what a row looks like, and that a cut at any byte loses no whole row and invents none."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from vqr1_metric import score_files
from vqr1_metric.functional import ScoreDistribution
from vqr1_metric.protocol import parse_reply
from vqr1_metric.results import ImageScore


def result(name: str, score: float = 3.25) -> ImageScore:
    distribution = ScoreDistribution.from_samples(torch.tensor([score, score + 0.5]))
    return ImageScore.of(name, distribution, [parse_reply("<think>Sharp.</think><answer>4</answer>")])


def write(path: Path, results: list[ImageScore]) -> None:
    with score_files.RecordWriter(path) as writer:
        for item in results:
            writer.write(item)


NAMES = ["a.png", "b, c.png", 'say "cheese".png', "=SUM(A1).png", "new\nline.png", "caf\udce9.png", "größe.png"]
NAMES += ["new\\nline.png", "caf\\udce9.png", "nel\x85.png", "line\u2028.png", "#1.png", "tab\t.png", "\ud800.png"]
RESULTS = [*map(result, NAMES), ImageScore.failed("x.png", "x.png: is empty")]


def test_csv_row(tmp_path: Path):
    path = tmp_path / "scores.csv"
    write(path, [result("a.png"), ImageScore.failed("x.png", "x.png: is empty")])
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == {
        "path": "a.png",
        "score": "3.500000",
        "std": "0.250000",
        "coverage": "1.000000",
        "error": "",
        "low": "3.250000",
        "high": "3.750000",
        "tag_probability": "1.000000",
    }
    assert rows[1]["error"] == "is empty"
    assert all(rows[1][name] == "nan" for name in ("score", "std", "coverage", "low", "high", "tag_probability"))
    assert list(rows[0])[:5] == ["path", "score", "std", "coverage", "error"]


def test_json_row(tmp_path: Path):
    path = tmp_path / "scores.jsonl"
    write(path, [result("a.png"), ImageScore.failed("x.png", "x.png: is empty")])
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["path"], first["score"], first["error"]) == ("a.png", 3.5, "")
    assert len(first["probabilities"]) == 401
    assert first["probabilities"][225] == first["probabilities"][275] == 0.5
    assert first["replies"] == [{"score": 4.0, "reason": None, "reasoning": "Sharp."}]
    assert (second["score"], second["probabilities"], second["error"]) == (None, None, "is empty")
    assert "NaN" not in path.read_text()  # which is no JSON


@pytest.mark.parametrize("start", list("=+-@'\t"))
def test_no_cell_is_a_formula(tmp_path: Path, start: str):
    name = f"{start}cmd|' /C calc'!A0.png"
    assert score_files.cell(name) == ("'" + name if start != "\t" else r"\t" + name[1:])
    assert score_files.uncell(score_files.cell(name)) == name
    path = tmp_path / "scores.csv"
    write(path, [ImageScore.failed(name, f"{name}: no such file"), ImageScore.failed("a.png", f"{start}1 is bad")])
    for row in list(csv.reader(path.read_text().splitlines()))[1:]:
        assert all(not cell.startswith(tuple("=+-@\t")) for cell in row)


def test_cells_tell_names_apart():
    assert len({score_files.cell(name) for name in ("=a", "'=a", "''=a", "a", "a\n", "a\\", "a\r")}) == 7


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_come_back(tmp_path: Path, suffix: str):
    path = tmp_path / f"scores{suffix}"
    write(path, RESULTS)
    assert path.read_text(encoding="utf-8").count("\n") == len(RESULTS) + (suffix == ".csv")  # one line each
    rows = list(score_files.read_rows(path))
    assert [name for name, _ in rows] == [item.name for item in RESULTS]
    assert [score for _, score in rows[:-1]] == [3.5] * len(NAMES)
    assert math.isnan(rows[-1][1])


@pytest.mark.filterwarnings("ignore")  # of pandas and datasets
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_other_libraries_open_them(tmp_path: Path, suffix: str):
    """The first error comes after more rows than any of them looks at to find out the columns' types."""
    path = tmp_path / f"scores{suffix}"
    write(path, [result("a.png")] * (4000 if suffix == ".jsonl" else 50))
    write(path, RESULTS)
    expected = [score_files.escape_name(item.name) for item in RESULTS]
    pandas = pytest.importorskip("pandas")
    table = pandas.read_json(path, lines=True) if suffix == ".jsonl" else pandas.read_csv(path)
    paths = [list(table["path"])]
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.csv
    import pyarrow.json

    table = pyarrow.json.read_json(path) if suffix == ".jsonl" else pyarrow.csv.read_csv(path)
    assert table.schema.field("score").type == arrow.float64()
    paths.append(table["path"].to_pylist())
    datasets = pytest.importorskip("datasets")
    kind = "json" if suffix == ".jsonl" else "csv"
    rows = datasets.load_dataset(kind, data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    paths.append(list(rows["path"]))
    for names in paths:
        assert [name.removeprefix("'") for name in names[-len(RESULTS) :]] == expected
        assert score_files.unescape_name(names[-2]) == "\ud800.png"


def test_one_writer_at_a_time(tmp_path: Path):
    path = tmp_path / "scores.csv"
    with score_files.RecordWriter(path) as writer:
        with pytest.raises(score_files.RecordError, match="another run is writing this file"):
            score_files.RecordWriter(path)
        writer.write(result("a.png"))
    with score_files.RecordWriter(path) as writer:
        assert not writer.empty
    assert [name for name, _ in score_files.read_rows(path)] == ["a.png"]
    with score_files.RecordWriter(path, overwrite=True) as writer:
        assert writer.empty and path.stat().st_size  # what is there stays until there is something else
        writer.write(result("b.png"))
    assert [name for name, _ in score_files.read_rows(path)] == ["b.png"]
    with score_files.RecordWriter(tmp_path / "none.csv"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]  # nothing was written, nothing is left


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_without_a_score_are_taken_out(tmp_path: Path, suffix: str):
    path = tmp_path / f"scores{suffix}"
    write(path, [RESULTS[-1], *RESULTS])
    with score_files.RecordWriter(path) as writer:
        writer.drop_errors()
        with pytest.raises(score_files.RecordError, match="another run"):  # still locked, though it is a new file
            score_files.RecordWriter(path)
        writer.write(result("x.png"))
    assert [name for name, _ in score_files.read_rows(path)] == [*NAMES, "x.png"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_cut_at_every_byte(tmp_path: Path, suffix: str):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write(whole, RESULTS)
    data = whole.read_bytes()
    if suffix == ".jsonl":  # long lines: the last two are enough
        data = b"".join(data.splitlines(keepends=True)[-2:])
    names = [name for name, _ in score_files.read_rows(whole)]
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        score_files.repair(cut)
        lines = data[:size].count(b"\n")
        assert cut.read_bytes() == b"".join(data.splitlines(keepends=True)[:lines])
        if suffix == ".csv":
            assert [name for name, _ in score_files.read_rows(cut)] == names[: max(0, lines - 1)]


def test_repair_of_a_long_piece_of_a_line(tmp_path: Path):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    score_files.repair(path)
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"x" * 200_000)
    score_files.repair(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", "image,mos\nx.png,3\n", 1),
        ("b.csv", ",".join(score_files.COLUMNS) + "\nx.png,3\n", 2),
        ("c.csv", ",".join(score_files.COLUMNS) + "\nx.png,three,,,,,,\n", 2),
        ("d.jsonl", '{"path": "x.png", "score": 3}\n{}\n', 2),
        ("e.jsonl", "not JSON\n", 1),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, line: int):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(
        score_files.RecordError, match=rf"{name}: expected a file that vqr1 score wrote, but line {line}"
    ):
        list(score_files.read_rows(path))


def test_suffix_decides():
    with pytest.raises(score_files.RecordError, match=r"ends in \.csv or \.jsonl, but got 'scores\.txt'"):
        score_files.file_format(Path("scores.txt"))


def test_meta(tmp_path: Path):
    path = tmp_path / "scores.csv"
    meta = {"model": "nano", "revision": "1", "identity": {"weights": "1", "mode": "score", "sampling": [1, 2]}}
    score_files.write_meta(path, meta)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv.meta.json"]
    assert score_files.read_meta(path) == meta
    score_files.check_same(path, meta, {**meta, "package": "9", "model": "a copy of it"})
    score_files.check_same(path, meta, {"identity": {"weights": "1", "mode": "score", "sampling": (1, 2)}})
    changed = {"identity": {**meta["identity"], "weights": "2"}}
    with pytest.raises(score_files.RecordError, match="was made with weights '1', but this run has '2'; scores"):
        score_files.check_same(path, meta, changed)
    changed["identity"] |= {"deterministic": True}  # the old file does not state it: it was not compared, it differs
    with pytest.raises(score_files.RecordError, match=r"has '2' \(and other deterministic\)"):
        score_files.check_same(path, meta, changed)
    with pytest.raises(score_files.RecordError, match="does not say all that its scores were made with"):
        score_files.check_same(path, {"model": "nano", "revision": "1"}, meta)
    score_files.meta_path(path).write_text("{")
    with pytest.raises(score_files.RecordError, match=r"scores\.csv\.meta\.json beside it is missing or damaged"):
        score_files.read_meta(path)
