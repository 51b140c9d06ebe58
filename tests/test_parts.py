"""Tiles of large images and frames of videos: what is scored, where the worst part is, what a row says."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stub_scorer import LinearBackend

from vqr1_metric.cli import main
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.parts import TiledScorer, VideoScorer, tile_places
from vqr1_metric.score_runs import score_to_file
from vqr1_metric.scorer import QualityScorer


def scorer() -> QualityScorer:
    return QualityScorer(backend=LinearBackend())


@pytest.mark.parametrize(("height", "width", "size"), [(100, 100, 100), (101, 100, 100), (2160, 3840, 1024), (1, 5, 2)])
def test_tiles_cover_the_image_once(height: int, width: int, size: int):
    places = tile_places(height, width, size)
    counts = np.zeros((height, width), int)
    for y, x, h, w in places:
        assert 0 < h <= size and 0 < w <= size
        counts[y : y + h, x : x + w] += 1
    assert (counts == 1).all()
    sides = {h for _, _, h, _ in places}
    assert max(sides) - min(sides) <= 1  # no narrow rest


def test_the_mixture_and_the_worst_tile():
    image = torch.full((3, 300, 400), 200, dtype=torch.uint8)
    image[:, 150:, 200:] = 20  # one of four tiles is bad
    (result,) = TiledScorer(scorer(), 200).stream([image])
    singles = scorer().score([image[:, y : y + h, x : x + w] for y, x, h, w in tile_places(300, 400, 200)])
    mixture = ScoreDistribution.stack([single.distribution for single in singles]).mixture()
    assert torch.equal(result.distribution.probabilities, mixture.probabilities)
    assert result.score == pytest.approx(sum(single.score for single in singles) / 4, abs=1e-5)
    assert result.worst.place == {"x": 200, "y": 150, "width": 200, "height": 150}
    assert result.worst.result.score == min(single.score for single in singles)
    assert result.std > 1 > singles[0].std  # the tiles disagree


def test_a_small_image_is_one_tile_with_its_usual_score():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    (result,) = TiledScorer(scorer(), 120).stream([image])
    assert result.score == scorer().score(image)[0].score
    assert len(result.parts) == 1


def test_tiles_into_files(tmp_path: Path):
    for i in range(3):
        pixels = np.full((80, 120, 3), 60 + 40 * i, np.uint8)
        pixels[:40, :60] = 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    tiled = TiledScorer(scorer(), 60)
    summary = score_to_file(tiled, [tmp_path], tmp_path / "s.csv")
    assert (summary["images"], summary["scored"]) == (4, 3)
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "s.csv").read_text().splitlines())}
    place = {name: rows["1.png"][f"worst_{name}"] for name in ("x", "y", "width", "height")}
    assert place == {"x": "0", "y": "0", "width": "60", "height": "40"}
    assert rows["1.png"]["parts"] == "4" and float(rows["1.png"]["worst_score"]) == pytest.approx(1, abs=0.3)
    assert rows["bad.png"]["error"] and rows["bad.png"]["worst_x"] == ""
    assert score_to_file(tiled, [tmp_path], tmp_path / "s.csv", resume=True)["mean"] == pytest.approx(summary["mean"])
    with pytest.raises(ValueError, match="was made with tiles 60, but this run has 50"):
        score_to_file(TiledScorer(scorer(), 50), [tmp_path], tmp_path / "s.csv", resume=True)
    score_to_file(tiled, [tmp_path], tmp_path / "s.jsonl")
    row = next(
        row for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines()) if row["path"].endswith("0.png")
    )
    assert [part["x"] for part in row["each_part"]] == [0, 60, 0, 60] and all("score" in p for p in row["each_part"])


# ---------------------------------------------------------------- videos


def write_video(path: Path, reds: list[int], rate: int = 10) -> None:
    """Plain frames of these reds, lossless enough to be told apart."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'vqr1-metric[video]'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for red in reds:
            pixels = np.full((48, 64, 3), red, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_frames_are_one_group(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    write_video(path, [200, 200, 200, 200, 40, 200, 200, 200])
    (result,) = VideoScorer(scorer(), 2).stream([str(path)])
    assert [part.place["frame"] for part in result.parts] == [0, 2, 4, 6]
    assert [part.place["time"] for part in result.parts] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert result.worst.place == {"frame": 4, "time": 0.4}
    reds = [1 + 4 * red / 255 for red in (200, 200, 40, 200)]
    assert result.score == pytest.approx(np.mean(reds), abs=0.1)
    assert result.worst.result.score == pytest.approx(min(reds), abs=0.15)


def test_videos_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_video(tmp_path / "a.mp4", [100] * 6)
    write_video(tmp_path / "b.mkv", [150, 60, 150])
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:500])
    (tmp_path / "words.mp4").write_text("no video")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "notes.png").write_bytes(b"")
    monkeypatch.setattr("vqr1_metric.cli.score.build_scorer", lambda args: scorer())
    assert main(["score", str(tmp_path), "--every", "3", "-o", str(tmp_path / "s.csv"), "--silent"]) == 0
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "s.csv").read_text().splitlines())}
    assert rows.keys() == {"a.mp4", "b.mkv", "cut.mp4", "words.mp4", "list.mp4"}
    assert rows["a.mp4"]["parts"] == "2" and rows["b.mkv"]["worst_frame"] == "0"
    for name in ("cut.mp4", "words.mp4", "list.mp4"):
        assert "is no video that can be read, or is damaged" in rows[name]["error"], rows[name]
    assert main(["score", str(tmp_path / "a.mp4"), "--every", "3", "--tiles", "9"]) == 2


def test_the_table_names_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write_video(tmp_path / "a.mp4", [200, 60, 200])
    monkeypatch.setattr("vqr1_metric.cli.score.build_scorer", lambda args: scorer())
    assert main(["score", str(tmp_path / "a.mp4"), "--every", "1"]) == 0
    assert "a.mp4 (worst of 3: 1.9" in (out := capsys.readouterr().out) and ", 0.100 s)" in out


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="tiles of at least 1"):
        TiledScorer(scorer(), 0)
