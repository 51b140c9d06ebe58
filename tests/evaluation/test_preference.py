"""Votes: by hand, with the ceiling that the voters' own disagreement sets."""

import json
import math
from pathlib import Path

import pytest
from evaluation_files import save_picture

from vqr1_metric.cli import main
from vqr1_metric.evaluation.preference import preference_agreement
from vqr1_metric.ratings import Preference, RatingError, RatingSet, read_ratings


def write(folder: Path, text: str) -> Path:
    path = folder / "votes.csv"
    path.write_text(text)
    return path


def read_preferences(path: Path) -> RatingSet:
    return read_ratings(path, strict=False, find=False)


def test_pairs_by_hand(tmp_path: Path) -> None:
    votes = read_preferences(write(tmp_path, "a,b,votes_a,votes_b,scene\np,q,8,2,s\nq,r,3,7,s\np,r,5,5,t\n"))
    assert votes.preferences[0] == Preference("p", "q", 8.0, 2.0, "s") and [image.name for image in votes.images] == [
        "p",
        "q",
        "r",
    ]
    found = preference_agreement(votes, {"p": 3.0, "q": 2.0, "r": 1.0}, resamples=100)
    assert (found["pairs"], found["scenes"], found["votes"]) == (3, 2, 30.0)
    assert found["votes_met"][0] == pytest.approx((8 + 3 + 5) / 30)
    assert found["ceiling"][0] == pytest.approx((8 + 7 + 5) / 30)
    assert found["of_reach"][0] == pytest.approx((16 / 30 - 0.5) / (20 / 30 - 0.5))
    assert found["majority"][0] == 0.5  # two pairs have a majority
    assert found["best_met"] is None
    best = preference_agreement(votes, {"p": 3.0, "q": 1.0, "r": 2.0}, resamples=100)
    assert best["votes_met"] == best["ceiling"] and best["of_reach"][0] == 1.0 and best["majority"][0] == 1.0
    tied = preference_agreement(votes, dict.fromkeys("pqr", 1.0), resamples=100)
    assert tied["votes_met"][0] == 0.5 and tied["majority"][0] == 0.5 and tied["of_reach"][0] == 0


def test_single_votes(tmp_path: Path) -> None:
    votes = read_preferences(write(tmp_path, "image_a;image_b\np;q\nq;r\n"))
    found = preference_agreement(votes, {"p": 3.0, "q": 2.0, "r": 1.0}, resamples=50)
    assert found["votes_met"][0] == 1.0 and found["scenes"] == 2
    assert math.isnan(found["votes_met"][1])  # two scenes say nothing of others


def test_best_of_several_by_hand(tmp_path: Path) -> None:
    text = "image,scene,method,best_votes\na,s,m,6\nb,s,n,3\nc,s,o,1\nd,t,m,0\ne,t,n,4\nf,t,o,0\n"
    votes = read_preferences(write(tmp_path, text))
    assert len(votes.preferences) == 5  # d against f got no vote
    found = preference_agreement(votes, {"a": 1.0, "b": 3.0, "c": 2.0, "d": 1.0, "e": 3.0, "f": 2.0}, resamples=50)
    assert found["best_met"][0] == pytest.approx((3 + 4) / 14)
    assert found["best_ceiling"][0] == pytest.approx((6 + 4) / 14)
    assert found["best_chance"][0] == pytest.approx(1 / 3)
    assert found["ceiling"][0] == pytest.approx((6 + 6 + 3 + 4 + 4) / (9 + 7 + 4 + 4 + 4))
    assert found["votes_met"][0] == pytest.approx((3 + 1 + 3 + 4 + 4) / 28)


def test_missing_scores_are_left_out_and_counted(tmp_path: Path) -> None:
    votes = read_preferences(write(tmp_path, "a,b,votes_a,votes_b\np,q,8,2\nq,r,3,7\n"))
    found = preference_agreement(votes, {"p": 3.0, "q": 2.0, "r": math.nan})
    assert (found["pairs"], found["left_out"]) == (1, 1) and math.isnan(found["votes_met"][1])
    assert preference_agreement(votes, {})["reason"] == "no pair has two scores"


def test_bad_rows_and_files(tmp_path: Path) -> None:
    bad = "p,p,1,1\nq,,1,1\nq,r,x,1\nq,r,0,0\nr,s,-1,2\n"
    votes = read_preferences(write(tmp_path, f"a,b,votes_a,votes_b\np,q,8,2\n{bad}"))
    assert len(votes.preferences) == 1 and len(votes.problems) == 5
    with pytest.raises(RatingError, match="one with a, b, votes_a, votes_b"):
        read_preferences(write(tmp_path, "image,place\na,1\n"))
    with pytest.raises(RatingError, match="at least one pair"):
        read_preferences(write(tmp_path, "image,scene,best_votes\na,s,0\nb,s,0\n"))


def test_command(tmp_path: Path, backend, capsys) -> None:
    lines = ["image,scene,method,best_votes"]
    for scene in range(3):
        for method, red in enumerate((0.2, 0.4, 0.6, 0.8)):
            save_picture(tmp_path / "images" / f"{scene}_{method}.png", red + scene / 100)
            lines.append(f"images/{scene}_{method}.png,s{scene},m{method},{method * 5}")
    lines.append("images/0_0.png,,m0,5")
    write(tmp_path, "\n".join(lines))
    arguments = ["evaluate", "--preferences", str(tmp_path / "votes.csv"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--silent", "--resamples", "50"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["scorers"]["linear"]
    assert found["of_reach"][0] == 1.0 and found["best_met"][0] == found["best_ceiling"][0] == 0.5
    text = (tmp_path / "out" / "table.md").read_text()
    assert "(listed in results.json): rows without a usable score: 1." in text
    assert "| linear | 18 |" in text and "always with the majority" in text and "they are no result" in text
