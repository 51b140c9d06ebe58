"""Two methods on the same scenes: statistics by hand and golden values, and `vqr1 diff`."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_files import save_picture
from scipy import stats

from vqr1_metric.cli import main
from vqr1_metric.evaluation.paired import compare_paired, match_folders, scenes_needed, win_probabilities
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.functional.thurstone import win_probability
from vqr1_metric.ratings import RatingError


def test_sample_sizes_are_those_of_the_textbooks() -> None:
    # G*Power 3.1, t test of two dependent means, two-sided, alpha 0.05, power 0.8: 199, 34 and 15 for d = .2, .5, .8
    assert [scenes_needed(effect) for effect in (0.2, 0.5, -0.5, 0.8)] == [199, 34, 34, 15]
    assert scenes_needed(0.0) is None and scenes_needed(math.nan) is None and scenes_needed(1e-9) is None
    assert scenes_needed(0.01) == pytest.approx(78_489, abs=3)
    assert scenes_needed(50.0) == 2


def test_a_clear_difference() -> None:
    random = np.random.default_rng(0)
    before = random.normal(3, 1, 40)
    after = before + 0.2 + 0.1 * random.standard_normal(40)
    found = compare_paired(before, after, np.full(40, 0.7))
    gaps = after - before
    assert found.mean == pytest.approx(gaps.mean()) and found.verdict == "after" and found.n == 40
    assert found.interval[0] < gaps.mean() < found.interval[1] and found.interval[0] > 0.1
    wanted = stats.bootstrap((gaps,), np.mean, method="percentile").confidence_interval
    assert found.interval == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert found.p_wilcoxon == stats.wilcoxon(gaps).pvalue and found.p_bootstrap < 0.01
    assert found.win_probability == pytest.approx(0.7) and found.needed < 10
    assert compare_paired(after, before).verdict == "before"


def test_an_open_question_says_how_many_scenes_it_needs() -> None:
    gaps = np.array([0.5, -0.45, 0.3, -0.2, 0.35, -0.3])
    found = compare_paired(np.zeros(6), gaps)
    assert found.verdict == "open" and found.needed > 6 and (found.better, found.worse) == (3, 3)
    same = compare_paired(np.ones(5), np.ones(5))
    assert same.verdict == "open" and same.equal == 5 and same.needed is None and math.isnan(same.p_wilcoxon)


def test_missing_scores() -> None:
    found = compare_paired([1.0, math.nan, 2.0], [2.0, 3.0, math.nan])
    assert (found.n, found.left_out) == (1, 2) and "at least 2" in found.reason and math.isnan(found.p_bootstrap)
    with pytest.raises(ValueError, match="Expected two vectors"):
        compare_paired([1.0], [1.0, 2.0])


def test_win_probabilities_are_those_of_the_library() -> None:
    a, b = (ScoreDistribution.from_samples(torch.tensor(v, dtype=torch.float64)) for v in ([3.0, 4.0, 2.0], [3.0, 2.5]))
    rows = [{"probabilities": d.probabilities.tolist()} for d in (a, b)]
    assert win_probabilities([rows[0]], [rows[1]])[0] == pytest.approx(float(win_probability(b, a)))
    assert math.isnan(win_probabilities([rows[0]], [{"probabilities": None}])[0])


def test_folders_are_matched_by_name(tmp_path: Path) -> None:
    for name in ("before/x/1.png", "before/2.png", "before/3.png", "after/x/1.jpg", "after/2.PNG", "after/4.png"):
        save_picture(tmp_path / name, 0.5)
    scenes, problems = match_folders(tmp_path / "before", tmp_path / "after")
    found = [(name, before.name, after.name) for name, before, after in scenes]
    assert found == [("2.png", "2.png", "2.PNG"), ("x/1.png", "1.png", "1.jpg")]
    assert sorted(Path(problem.subject).name for problem in problems) == ["3.png", "4.png"]
    save_picture(tmp_path / "other" / "9.png", 0.5)
    with pytest.raises(RatingError, match="no name is in both"):
        match_folders(tmp_path / "before", tmp_path / "other")
    with pytest.raises(RatingError, match="Expected a folder"):
        match_folders(tmp_path / "none", tmp_path / "other")


def folders(root: Path, gain: float) -> list[str]:
    for i in range(10):
        red = 0.2 + 0.04 * i
        save_picture(root / "before" / f"{i}.png", red)
        save_picture(root / "after" / f"{i}.png", red + gain + 0.01 * (i % 3))
    return [str(root / "before"), str(root / "after")]


def test_command_settles_a_difference(tmp_path: Path, backend, capsys) -> None:
    arguments = ["diff", *folders(tmp_path, 0.1), "--silent", "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "-o", str(tmp_path / "scenes.csv")]) == 0
    text = capsys.readouterr().out
    assert "10 scenes: after is better in 10, worse in 0, equal in 0" in text
    assert f"verdict: {tmp_path / 'after'} is better" in text and "mean difference +0.4" in text
    with (tmp_path / "scenes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and all(float(row["after_wins"]) > 0.7 for row in rows)
    scored = backend.pictures
    assert main([*arguments, "--json"]) == 0 and backend.pictures == scored
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "after" and answer["identity"]["revision"] == "1" and len(answer["scenes"]) == 10


def test_command_leaves_open_what_is_open(tmp_path: Path, backend, capsys) -> None:
    places = folders(tmp_path, -0.01)
    (tmp_path / "after" / "3.png").write_bytes(b"no picture")
    assert main(["diff", *places, "--silent"]) == 0
    text = capsys.readouterr().out
    assert "verdict: open" in text and "scenes would; there are 9" in text and "3.png: is not a picture" in text


def test_command_without_scenes_fails_in_one_line(tmp_path: Path, backend, capsys) -> None:
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(b"no picture")
    assert main(["diff", str(tmp_path / "before"), str(tmp_path / "after"), "--silent"]) == 1
    error = capsys.readouterr().err
    assert "no scene has two scores" in error and error.count("\n") == 1
    assert main(["diff", str(tmp_path / "nowhere"), str(tmp_path / "after")]) == 1
    places = [str(tmp_path / side) for side in ("before", "after")]
    assert main(["diff", *places, "-o", str(tmp_path / "nowhere" / "d.csv")]) == 1
    assert "no folder" in capsys.readouterr().err and backend.pictures == 0
