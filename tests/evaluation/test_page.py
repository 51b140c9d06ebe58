"""Pages: what they hold, that nothing leaks out of its place, and how they behave in a real browser."""

import base64
import io
import json
import math
import os
import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium, needs_chromium
from evaluation_files import save_picture
from PIL import Image

from vqr1_metric import score_files
from vqr1_metric.cli import main
from vqr1_metric.evaluation.baselines import baseline_scores
from vqr1_metric.evaluation.page import script_json
from vqr1_metric.evaluation.plots import Plot, histogram, ticks
from vqr1_metric.evaluation.scoring import picture_hash
from vqr1_metric.evaluation.thumbnails import thumbnail
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import ParsedReply
from vqr1_metric.results import ImageScore

EVIL = "</script><img src=x onerror=alert(1)>&\u2028"


def result(name: str, score: float, reasoning: str = "") -> ImageScore:
    distribution = ScoreDistribution.from_samples(torch.tensor([score - 0.5, score + 0.5], dtype=torch.float64))
    return ImageScore.of(name, distribution, [ParsedReply(score, None, reasoning)] if reasoning else [])


def write_scores(folder: Path, results: list[ImageScore], suffix: str = ".jsonl") -> Path:
    path = folder / f"scores{suffix}"
    with score_files.RecordWriter(path) as writer:
        for entry in results:
            writer.write(entry)
    score_files.write_meta(path, {"model": "nano", "revision": "abc", "mode": "think", "prompt": "p/1"})
    return path


def rows_of(page: Path) -> list[dict]:
    return json.loads(re.search(r'<script id="rows" type="application/json">(.*?)</script>', page.read_text(), re.S)[1])


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page of five pictures: scores 2, 4, 3, none, and 1.5 with a name that tries to escape."""
    for name in ("a.png", "b.png", "c.png"):
        save_picture(tmp_path / name, 0.5, (300, 200))
    results = [result("a.png", 2.0, "It is blurred."), result("b.png", 4.0, f"Sharp. {EVIL}"), result("c.png", 3.0)]
    results += [ImageScore.failed("gone.png", "gone.png: no such file"), result(EVIL, 1.5)]
    assert main(["report", str(write_scores(tmp_path, results)), "-o", str(tmp_path / "r.html"), "--silent"]) == 0
    return tmp_path / "r.html"


def test_report_holds_every_picture(report: Path) -> None:
    rows = rows_of(report)
    assert [row["s"] for row in rows] == [2.0, 4.0, 3.0, None, 1.5]
    assert rows[0]["t"].startswith("data:image/webp;base64,") and rows[3]["t"] is None and rows[4]["t"] is None
    assert rows[3]["e"] == "no such file" and rows[0]["f"] == "a.png"
    # half of the mass at 1.5, in (1.4, 1.5], half at 2.5
    assert [i for i, height in enumerate(rows[0]["p"]) if height] == [4, 14]
    assert rows[0]["r"] == [{"s": 2.0, "t": "It is blurred.", "e": None}]
    text = report.read_text()
    assert "5 pictures, mean score 2.625" in text and "1 without a score" in text
    assert "<dt>model</dt><dd>nano</dd>" in text and "<dt>revision</dt><dd>abc</dd>" in text


def test_report_fetches_nothing_and_texts_stay_texts(report: Path) -> None:
    text = report.read_text()
    assert EVIL not in text and rows_of(report)[4]["n"] == EVIL
    assert text.count("</script>") == 3 and "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_report_of_a_table_and_of_a_plain_list(tmp_path: Path) -> None:
    save_picture(tmp_path / "pictures" / "a.png", 0.5)
    failed = ImageScore.failed("gone.png", "gone.png: no such file")
    scores = write_scores(tmp_path, [result("a.png", 2.0), failed], ".csv")
    arguments = ["report", str(scores), "-o", str(tmp_path / "r.html"), "--images", str(tmp_path / "pictures")]
    assert main([*arguments, "--silent", "--title", "A & B"]) == 0
    row, failed = rows_of(tmp_path / "r.html")
    assert failed["s"] is None and failed["e"] == "no such file"
    assert (row["s"], row["d"], row["l"], row["h"], row["p"]) == (2.0, 0.5, 1.5, 2.5, None) and row["t"]
    assert "<h1>A &amp; B</h1>" in (tmp_path / "r.html").read_text()
    (tmp_path / "plain.csv").write_text("image,score\na.png,3.5\n")
    assert main(["report", str(tmp_path / "plain.csv"), "-o", str(tmp_path / "p.html"), "--silent"]) == 0
    assert rows_of(tmp_path / "p.html")[0]["s"] == 3.5 and "not stated" in (tmp_path / "p.html").read_text()


def test_same_scores_same_bytes_and_thumbnails_made_once(report: Path) -> None:
    first = report.read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in (report.parent / "r.thumbnails").iterdir()}
    assert len(kept) == 3
    again = ["report", str(report.parent / "scores.jsonl"), "-o", str(report), "--silent"]
    assert main(again) == 1  # an existing page is not replaced in silence
    assert main([*again, "--overwrite"]) == 0
    assert report.read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in (report.parent / "r.thumbnails").iterdir()} == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv", "-o", "r.html"], "Expected a file"),
        (["empty.csv", "-o", "r.html"], "it is empty"),
        (["word.jsonl", "-o", "r.html"], "Expected JSON objects with path and score"),
        (["bytes.jsonl", "-o", "r.html"], "line 2 is none ('utf-8' codec can't decode"),
        (["std.jsonl", "-o", "r.html"], "line 1 is none (could not convert string to float: '<b>')"),
        (["short.jsonl", "-o", "r.html"], "line 1 is none (2 probabilities instead of 401)"),
        (["other.csv", "-o", "other.csv"], "-o writes .html or .htm: -o other.html"),
        (["none.jsonl", "-o", "r.html"], "Expected a file, but 'none.jsonl' is none"),
        (["none.csv", "-o", "nowhere/r.html"], "no folder 'nowhere'"),
        (["other.csv", "-o", "r.html"], "Expected columns image and score"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("")
    Path("word.jsonl").write_text("hello\n")
    Path("bytes.jsonl").write_bytes(b'\n{"path": "\xff", "score": 2}\n')
    Path("std.jsonl").write_text('{"path": "a.png", "score": 2, "std": "<b>"}\n')
    Path("short.jsonl").write_text('{"path": "a.png", "score": 2, "probabilities": [0.5, 0.5]}\n')
    Path("other.csv").write_text("colour,size\nred,big\n")
    assert main(["report", *arguments, "--silent"]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_thumbnails(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png", 0.5, (400, 100))
    first = thumbnail(path, tmp_path / "cache", 64)
    assert first.startswith("data:image/webp;base64,") and thumbnail(path, tmp_path / "cache", 64) == first
    assert thumbnail(path, tmp_path / "cache", 32) != first
    save_picture(path, 0.9, (400, 101))
    assert thumbnail(path, tmp_path / "cache", 64) != first
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 30), 25_700, np.uint16)).save(deep)
    shown = Image.open(io.BytesIO(base64.b64decode(thumbnail(deep, tmp_path / "cache").partition(",")[2])))
    assert shown.size == (30, 40) and abs(np.asarray(shown).mean() - 100) < 2  # 16 bits are scaled, not clipped
    path.write_bytes(b"damaged")
    assert thumbnail(path, tmp_path / "cache") is None and thumbnail(tmp_path / "none", tmp_path / "cache") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_among_the_pictures_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    assert thumbnail(tmp_path / "pipe.png", tmp_path / "cache") is None
    assert picture_hash(tmp_path / "pipe.png").startswith("unreadable:")
    assert math.isnan(baseline_scores(tmp_path / "pipe.png")["contrast"])


def test_a_thumbnail_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, marker = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\n: > {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(program))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", "EPS")
    assert thumbnail(tmp_path / "a.png", tmp_path / "cache") is None and not marker.exists()


def test_plots() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and ticks(-3, 97) == [0, 20, 40, 60, 80]
    assert histogram([1, 1.05, 5, 3], 1, 5, 4) == ([1, 2, 3, 4, 5], [2, 0, 1, 1])
    text = str(Plot((1, 5), (0, 0), "<x>", "y", "a & b").dots([(1, 0), (5, 0)]))
    assert "&lt;x&gt;" in text and "<title>a &amp; b</title>" in text and text.count("h0") == 2
    assert script_json({"a": float("nan"), "b": "</script>"}) == '{"a":null,"b":"\\u003c/script>"}'


def test_page_of_an_evaluation(labelled: Path, backend) -> None:
    arguments = ["evaluate", "--labels", str(labelled / "labels.csv"), "--images", str(labelled / "pictures")]
    assert main([*arguments, "-o", str(labelled / "out"), "--resamples", "30", "--silent"]) == 0
    text = (labelled / "out" / "index.html").read_text()
    assert text.count("<svg") == 3 + 3  # a scatter plot for each scorer, three plots of the model's uncertainty
    assert text.count('<img loading="lazy" src="data:image/webp') == 12 and "worst disagreements" in text
    assert "Is the difference real?" in text and not re.findall(r"""(?:src|href)=["'](?!data:)""", text)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_report_of_a_name_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    save_picture(tmp_path / "a.png", 0.5).rename(name)
    assert main(["report", str(write_scores(tmp_path, [result(name, 2.0)])), "-o", "r.html", "--silent"]) == 0
    (row,) = rows_of(tmp_path / "r.html")
    assert row["n"] == name and row["f"] == "caf%E9.png" and row["t"]


def browse(page: Path, script: str) -> dict:
    """What a script finds out in a page, opened in Chromium without a network."""
    copy = page.with_name("probe.html")
    probe = f"<script>{script}\ndocument.body.dataset.found = JSON.stringify(found);</script></body>"
    copy.write_text(page.read_text().replace("</body>", probe))
    output = chromium(copy.as_uri(), page.parent / "profile", "--virtual-time-budget=2000", "--dump-dom")
    return json.loads(unescape(re.search(r'data-found="([^"]*)"', output)[1]))


@needs_chromium
def test_report_in_a_browser(report: Path) -> None:
    script = """
    const found = {}, names = () => [...document.querySelectorAll(".card .name")].map(e => e.textContent);
    const set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
    found.start = names();
    set("sort", "s"); found.sorted = names();
    byId("turn").click(); found.turned = names();
    set("low", "2.5"); found.from = names(); set("low", "");
    set("show", "failed"); found.failed = names(); set("show", "all");
    set("search", "blurred"); found.search = names(); found.count = byId("count").textContent; set("search", "");
    found.images = document.querySelectorAll(".card img").length;
    found.bars = document.querySelectorAll(".card svg .bar").length;
    found.reasoning = document.querySelector(".card details p").textContent;
    found.injected = document.querySelectorAll("img[src=x]").length;
    found.light = getComputedStyle(document.body).backgroundColor;
    byId("theme").click(); found.dark = getComputedStyle(document.body).backgroundColor;
    """
    found = browse(report, script)
    evil = rows_of(report)[4]["n"]
    assert found["start"] == ["a.png", "b.png", "c.png", "gone.png", evil]
    assert found["sorted"] == [evil, "a.png", "c.png", "b.png", "gone.png"]
    assert found["turned"] == ["b.png", "c.png", "a.png", evil, "gone.png"]
    assert found["from"] == ["b.png", "c.png"] and found["failed"] == ["gone.png"]
    assert found["search"] == ["a.png"] and found["count"] == "1 of 5"
    assert (found["images"], found["bars"], found["injected"]) == (3, 8, 0)
    assert found["reasoning"] == "4.00: Sharp. " + EVIL
    assert {found["light"], found["dark"]} == {"rgb(255, 255, 255)", "rgb(13, 17, 23)"}


@needs_chromium
def test_five_thousand_pictures_stay_usable(tmp_path: Path) -> None:
    for i in range(4):
        save_picture(tmp_path / f"{i}.png", 0.2 * i + 0.1)
    kinds = [score_files.as_json(result("x.png", 2.0 + i)) for i in range(3)]
    rows = [{**kinds[i % 3], "path": f"{i}.png"} for i in range(5000)]
    for i in range(4, 5000):
        (tmp_path / f"{i}.png").hardlink_to(tmp_path / f"{i % 4}.png")
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "scores.jsonl"), "-o", str(page), "--silent"]) == 0
    script = """
    const start = performance.now(); byId("sort").value = "s"; byId("sort").dispatchEvent(new Event("input"));
    const found = {sort: performance.now() - start, count: byId("count").textContent};
    found.cards = document.querySelectorAll(".card").length; found.rows = rows.length;
    """
    found = browse(page, script)
    assert found["rows"] == 5000 and found["count"] == "5000 of 5000"
    assert found["cards"] == 60  # the rest is drawn when it is scrolled to
    assert found["sort"] < 2000
