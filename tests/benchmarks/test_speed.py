"""The speed benchmark runs, on the tiny model: every lane, every measure, as CSV."""

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scoring(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.speed import scoring

    monkeypatch.setattr(sys, "argv", ["scoring"])
    return scoring


def test_every_lane_is_measured(scoring, tmp_path, monkeypatch):
    from benchmarks.speed import scoring_pictures

    monkeypatch.setattr(scoring_pictures, "MIXED", ("64", "96x64"))
    out = tmp_path / "scoring.csv"
    sizes = "--sizes 64 96x64 mixed --kinds tensor pil file --batches 1 3 --pictures 4 --repeats 1"
    scoring.main(["--model", "tiny", "--device", "cpu", *sizes.split(), "-o", str(out)])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    lanes = {row["lane"] for row in rows}
    for label in ("64 tensor", "96x64 tensor", "64 pil", "64 file"):
        assert {f"one pass, {label}", f"authors, {label}"} <= lanes
    assert {"one pass, mixed tensor", "packed, mixed tensor"} <= lanes
    measures = {(row["lane"], row["measure"]): float(row["value"]) for row in rows}
    assert measures["machine", "matrix products"] > 1e8 and measures["machine", "memory bandwidth"] > 1e7
    of_files = {name: value for (lane, name), value in measures.items() if lane == "one pass, 64 file"}
    stages = ("decoding", "preprocessing", "vision tower", "language model", "readout", "everything else")
    assert sum(of_files[f"share of {stage}"] for stage in stages) == pytest.approx(1, abs=1e-3)
    assert all(of_files[f"share of {stage}"] > 0 for stage in stages)
    for lane in lanes - {"machine"}:
        assert measures[lane, "speed"] > 0 and measures[lane, "time to first score"] > 0
        if lane.startswith("one pass"):
            assert 0 < measures[lane, "floor"] <= 1 / measures[lane, "speed"]
        else:
            assert measures[lane, "time against one pass"] > 0 < measures[lane, "processor time against one pass"]
    assert all(row["commit"] and row["machine"] and row["command"] and row["revision"] for row in rows)


def test_everything_in_one_run_and_its_tables(scoring, tmp_path, monkeypatch):
    from benchmarks.speed import scoring_table

    monkeypatch.setattr(scoring, "BATCH_MATES", ("56", "84x56"))
    out, page = tmp_path / "scoring.csv", tmp_path / "speed.md"
    out.write_text("what was there before\n")
    some = "--growth 130 --sizes 64 --kinds tensor --batches 1 --pictures 2 --repeats 1"
    rows = scoring.main(["--model", "tiny", "--device", "cpu", "--all", *some.split(), "-o", str(out)])
    grown = [(lane, measure) for lane, measure, _, _ in rows if "in a stream" in lane]
    assert grown == [
        ("one pass, 64 tensor, 130 pictures in a stream", "seconds so far"),
        ("one pass, 64 tensor, 130 pictures in a stream", "processor seconds so far"),
        ("one pass, 64 tensor, 130 pictures in a stream", "most memory so far beyond what was held"),
    ]
    moved = [(lane, difference) for lane, _, difference, unit in rows if unit == "score"]
    for lane, difference in moved:
        assert difference == 0 if "deterministic" in lane else difference < 0.02
    assert len(moved) == 8
    assert len(list(csv.DictReader(out.read_text().splitlines()))) == len(rows)

    page.write_text(f"before\n{scoring_table.BEGIN}old\n{scoring_table.END}after\n")
    scoring_table.main([str(out), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for start in (
        "| one pass, 64 tensor | ",
        "| authors, 64 tensor | ",
        "| 130 | ",
        "| 56 and 84x56 tensor, float32 | ",
    ):
        assert start in text
    speed = next(value for lane, measure, value, _ in rows if (lane, measure) == ("one pass, 64 tensor", "speed"))
    assert f"| one pass, 64 tensor | {speed:.1f} | " in text
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="Expected the lines"):
        scoring_table.main([str(out), "--write", str(page)])


def test_the_page_shows_what_the_file_holds(scoring):
    from benchmarks.speed import scoring_table

    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    shown = page.partition(scoring_table.BEGIN)[2].partition(scoring_table.END)[0]
    assert shown == scoring_table.tables(ROOT / "benchmarks" / "results" / "scoring.csv")


def test_the_authors_lanes_run_on_the_stock_tower(scoring, monkeypatch):
    from benchmarks.speed.scoring_models import make_backend, packed_prompts, stock_tower
    from vqr1_metric.backends import packing, windows

    backend = make_backend("tiny", "cpu", "float32")
    pictures = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
    calls = {"tower": 0, "packed": 0}

    def counted(lane, function):
        def call(*args, **kwargs):
            calls[lane] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(windows, "windowed_attention", counted("tower", windows.windowed_attention))
    monkeypatch.setattr(packing, "windowed_attention", counted("packed", packing.windowed_attention))

    def scores():
        calls.update(tower=0, packed=0)
        return backend.distributions(pictures, backend.pixel_config).mean

    backend.trie  # noqa: B018  its own pass, on the calibration picture
    expected = scores()
    assert calls == {"tower": 2, "packed": 0}
    for lane, made in ((stock_tower, {"tower": 0, "packed": 0}), (packed_prompts, {"tower": 2, "packed": 2})):
        with lane(backend.model):
            torch.testing.assert_close(scores(), expected, atol=1e-4, rtol=0)
        assert calls == made
        scores()
        assert calls == {"tower": 2, "packed": 0}
