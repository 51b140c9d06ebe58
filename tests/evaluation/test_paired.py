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
from vqr1_metric.evaluation.methods import diff
from vqr1_metric.evaluation.paired import (
    compare_methods,
    compare_paired,
    scenes_needed,
    sign_flip_p,
    win_probabilities,
)
from vqr1_metric.evaluation.pairing import group_scenes, pair_names
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
    student = stats.t.interval(0.95, 39, gaps.mean(), stats.sem(gaps))
    assert found.interval[0] <= student[0] and found.interval[1] >= student[1]
    assert found.interval == pytest.approx(student, abs=0.005)
    assert stats.ttest_1samp(gaps, 0).pvalue <= found.p < 1e-8  # p has no floor
    assert found.win_probability == pytest.approx(0.7) and found.needed < 10
    assert compare_paired(after, before).verdict == "before"


def test_few_scenes_are_counted_out() -> None:
    gaps = np.array([0.3, 0.25, 0.4, 0.2, 0.35, 0.3])
    assert sign_flip_p(gaps) == 2 / 2**6 and sign_flip_p(np.array([1.0, -1.0])) == 1.0
    exact = stats.permutation_test((np.array([0.5, -0.1, 0.3, 0.2, 0.4]),), np.mean, permutation_type="samples")
    assert sign_flip_p(np.array([0.5, -0.1, 0.3, 0.2, 0.4])) == pytest.approx(exact.pvalue)
    assert compare_paired(np.zeros(6), gaps).verdict == "after"
    for n in range(1, 6):
        few = compare_paired(np.zeros(n), gaps[:n])
        assert few.verdict == "open" and f"too few scenes to say: {n}, " in few.reason and "fewer than 6" in few.reason
    ties = compare_paired(np.zeros(12), np.r_[gaps[:5], np.zeros(7)])
    assert ties.verdict == "open" and "5 of 12" in ties.reason
    constant = compare_paired(np.zeros(8), np.full(8, 0.1))
    assert constant.verdict == "after" and constant.interval == (0.1, 0.1) and constant.p == 2 / 2**8
    assert compare_paired(np.zeros(6), gaps, level=0.99).verdict == "open"


def test_an_open_question_says_how_many_scenes_it_needs() -> None:
    gaps = np.array([0.5, -0.45, 0.3, -0.2, 0.35, -0.3])
    found = compare_paired(np.zeros(6), gaps)
    assert found.verdict == "open" and found.needed > 6 and (found.better, found.worse) == (3, 3)
    same = compare_paired(np.ones(8), np.ones(8))
    assert same.verdict == "open" and same.equal == 8 and same.needed is None and same.p == 1.0


def test_missing_scores() -> None:
    found = compare_paired([1.0, math.nan, 2.0], [2.0, 3.0, math.nan])
    assert (found.n, found.left_out) == (1, 2) and "too few" in found.reason and math.isnan(found.p)
    assert compare_paired([math.nan], [1.0]).n == 0
    with pytest.raises(ValueError, match="Expected two vectors"):
        compare_paired([1.0], [1.0, 2.0])


def test_groups_count_once() -> None:
    """Frames of a clip go up or down together: 90 of 120 scenes rose, but only three of four clips."""
    gaps = np.repeat([0.3, 0.2, 0.25, -0.2], 30)
    groups = np.repeat(list("abcd"), 30).tolist()
    assert compare_paired(np.zeros(120), gaps).verdict == "after"
    found = compare_paired(np.zeros(120), gaps, groups=groups)
    assert found.verdict == "open" and (found.n, found.images) == (4, 120) and "too few groups" in found.reason
    unequal = compare_paired(np.zeros(10), np.r_[np.full(9, 1.0), 0.0], groups=["a"] * 9 + ["b"])
    assert unequal.mean == 0.5 and (unequal.better, unequal.equal) == (1, 1)
    assert compare_paired(np.zeros(9), np.arange(1.0, 10), groups=["a"] * 9).n == 1


@pytest.mark.parametrize("n", [2, 3, 5, 8, 14, 40])
@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy", "clips"])
def test_chance_is_seldom_called_a_winner(n: int, shape: str) -> None:
    """Of 300 nights without a difference at most 8% may have a verdict (5% and noise); the seed is fixed."""
    random = np.random.default_rng(n)
    wrong = 0
    for _ in range(300):
        groups = None
        if shape == "clips":
            gaps = np.repeat(random.standard_normal(n), 10) + 0.3 * random.standard_normal(10 * n)
            groups = [str(i // 10) for i in range(10 * n)]
        else:
            gaps = {
                "normal": random.standard_normal(n),
                "skewed": random.exponential(1, n) - 1,
                "heavy": random.standard_t(2, n),
            }[shape]
        wrong += compare_paired(np.zeros(len(gaps)), gaps, groups=groups).verdict != "open"
    assert wrong <= 24


def test_several_methods_are_ordered_with_letters() -> None:
    random = np.random.default_rng(0)
    base = random.normal(3, 1, 30)
    scores = {name: base + gain + 0.1 * random.standard_normal(30) for name, gain in
              (("low", 0.0), ("best", 0.5), ("low too", 0.02), ("middle", 0.2))}  # fmt: skip
    scores["low"][3] = math.nan
    order = compare_methods(scores)
    assert order.names[:2] == ("best", "middle") and order.left_out == 1 and len(order.pairs) == 6
    assert order.letters == ("a", "b", "c", "c")
    assert all(pair.p_holm >= pair.p for _, _, pair in order.pairs)
    overlapping = compare_methods(
        {n: base + g + 0.3 * random.standard_normal(30) for n, g in zip("xyz", (0, 0.13, 0.26), strict=True)}
    )
    assert set("".join(overlapping.letters)) <= set("ab") and overlapping.letters[0] != overlapping.letters[2]


def test_win_probabilities_are_those_of_the_library() -> None:
    a, b = (ScoreDistribution.from_samples(torch.tensor(v, dtype=torch.float64)) for v in ([3.0, 4.0, 2.0], [3.0, 2.5]))
    rows = [{"probabilities": d.probabilities.tolist()} for d in (a, b)]
    assert win_probabilities([rows[0]], [rows[1]])[0] == pytest.approx(float(win_probability(b, a)))
    assert math.isnan(win_probabilities([rows[0]], [{"probabilities": None}])[0])


@pytest.mark.parametrize(
    ("methods", "strip", "pairs", "rule"),
    [
        ({"a": ["x/1.png", "2.png"], "b": ["x/1.jpg", "2.PNG"]}, [], {"x/1": ("x/1.png", "x/1.jpg")}, "by path"),
        ({"a": ["1.png", "2.png"], "b": ["x/1.png", "y/2.png"]}, [], {"2": ("2.png", "y/2.png")}, "by file name"),
        (
            {"a": ["old/c1/1.png", "old/c2/1.png"], "b": ["/n/c1/1.png", "/n/c2/1.png"]},
            [],
            {"old/c2/1": ("old/c2/1.png", "/n/c2/1.png")},
            "by path below their folders",
        ),
        (
            {"a": ["1_out.png", "2_out.png"], "b": ["1.png", "2.png"]},
            [],
            {"2_out": ("2_out.png", "2.png")},
            "'_out' taken off the names of a",
        ),
        (
            {"a": ["1.png", "2.png"], "b": ["1_out.png", "2_out.png"]},
            ["_out"],
            {"1": ("1.png", "1_out.png")},
            "without",
        ),
        ({"a": ["1.png", "2.png"], "b": ["1_out.png", "2_out.png"]}, [], {"1": ("1.png", "1_out.png")}, "'_out' taken"),
        (
            {
                "a": ["01.png", "02.png"],
                "b": ["s/01_SwinIR_x2.png", "s/02_SwinIR_x2.png"],
                "c": ["01_out.png", "02_out.png"],
            },
            [],
            {"02": ("02.png", "s/02_SwinIR_x2.png", "02_out.png")},
            "'_swinir_x2' taken off the names of b, '_out' taken off the names of c",
        ),
        (
            {"a": ["1_x2.png", "2_x2.png"], "b": ["1_x4.png", "2_x4.png"]},
            ["_x[24]"],
            {"1_x2": ("1_x2.png", "1_x4.png")},
            "without",
        ),
    ],
)
def test_names_are_paired(methods: dict, strip: list[str], pairs: dict, rule: str) -> None:
    found = pair_names(methods, strip)
    together = dict(zip(found.scenes, zip(*found.files.values(), strict=True), strict=True))
    assert len(together) == 2 and rule in found.rule and not found.problems
    assert all(together[scene] == names for scene, names in pairs.items())


def test_what_has_no_partner_is_listed_and_nothing_in_common_says_how() -> None:
    found = pair_names({"a": ["1.png", "1.jpg", "2.png", "3.png"], "b": ["1.png", "2.png", "4.png"]})
    assert found.scenes == ("2",)
    assert {problem.subject for problem in found.problems} == {"a/1.png", "a/1.jpg", "a/3.png", "b/1.png", "b/4.png"}
    with pytest.raises(RatingError, match=r"no name is in all of them .*--strip _out"):
        pair_names({"a": ["1.png"], "b": ["9.png"]})
    with pytest.raises(RatingError, match="Expected regular expressions"):
        pair_names({"a": ["1.png"], "b": ["1.png"]}, ["("])


def test_scenes_are_grouped(tmp_path: Path) -> None:
    scenes = ["clip1/a_frame1", "clip1/a_frame2", "clip2/b_frame1"]
    assert group_scenes(scenes, "folder") == ["clip1", "clip1", "clip2"]
    assert group_scenes(scenes, "/([a-z]+)_frame") == ["a", "a", "b"]
    (tmp_path / "l.csv").write_text("image,clip\na_frame1.png,x\na_frame2.png,x\nclip2/b_frame1.png,y\n")
    assert group_scenes(scenes, f"{tmp_path / 'l.csv'}:clip") == ["x", "x", "y"]
    with pytest.raises(RatingError, match="'clip2/b_frame1' has none"):
        group_scenes(scenes, "^clip1")
    with pytest.raises(RatingError, match="Expected columns image and scene"):
        group_scenes(scenes, f"{tmp_path / 'l.csv'}:scene")


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
    assert main([*arguments, "-o", str(tmp_path / "scenes.csv")]) == 1 and "--overwrite it" in capsys.readouterr().err
    assert main([*arguments, "-o", str(tmp_path / "scores.txt")]) == 2
    assert main([*arguments, "--overwrite", "-o", str(tmp_path / "scenes.csv")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0 and backend.pictures == scored
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "after" and answer["identity"]["revision"] == "1" and len(answer["scenes"]) == 10
    assert answer["scenes"][3]["files"] == ["3.png", "3.png"] and answer["pairing"]["rule"] == "by path"


def test_finished_files_of_scores_instead_of_folders(tmp_path: Path, backend, capsys) -> None:
    before, after = folders(tmp_path, 0.1)
    for name, folder in (("a.csv", before), ("b.jsonl", after)):
        lines = [(f"{folder}/{i}.png", 2 + i / 10 + (name == "b.jsonl") * (0.3 + i / 100)) for i in range(10)]
        text = "\n".join(["path,score", *(f"{p},{s}" for p, s in lines)]) if name == "a.csv" else "\n".join(
            json.dumps({"path": p, "score": s}) for p, s in lines)  # fmt: skip
        (tmp_path / name).write_text(text + "\n")
    assert main(["diff", str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"), "--silent"]) == 0
    assert "b.jsonl is better" in capsys.readouterr().out and backend.pictures == 0
    third = folders(tmp_path / "more", 0.0)[1]
    assert main(["diff", str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"), third, "--json", "--silent"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["order"]["names"]) == 3 and len(answer["order"]["pairs"]) == 3 and backend.pictures == 10


def test_files_made_with_other_settings_are_not_compared(tmp_path: Path) -> None:
    for name, dtype in (("a.csv", "float32"), ("b.csv", "bfloat16")):
        (tmp_path / name).write_text("path,score\n1.png,2\n2.png,3\n")
        (tmp_path / f"{name}.meta.json").write_text(json.dumps({"model": "nano", "identity": {"dtype": dtype}}))
    with pytest.raises(RatingError, match=r"dtype is 'float32' in .*a.csv and 'bfloat16'"):
        diff([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_command_leaves_open_what_is_open(tmp_path: Path, backend, capsys) -> None:
    places = folders(tmp_path, -0.01)
    (tmp_path / "after" / "3.png").write_bytes(b"no picture")
    assert main(["diff", *places, "--silent"]) == 0
    text = capsys.readouterr().out
    assert (
        "verdict: open" in text
        and "scenes to settle a difference of this size" in text
        and "there are 9" in text
        and "3.png: is not a picture" in text
    )


def test_command_without_scenes_fails_in_one_line(tmp_path: Path, backend, capsys) -> None:
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(b"no picture")
    assert main(["diff", str(tmp_path / "before"), str(tmp_path / "after"), "--silent"]) == 1
    error = capsys.readouterr().err
    assert "no scene has a score of every method" in error and error.count("\n") == 1
    assert main(["diff", str(tmp_path / "nowhere"), str(tmp_path / "after")]) == 1
    places = [str(tmp_path / side) for side in ("before", "after")]
    assert main(["diff", *places, "-o", str(tmp_path / "nowhere" / "d.csv")]) == 1
    assert "no folder" in capsys.readouterr().err and backend.pictures == 0
