"""Small label files of every layout, each with its one right reading, whoever asks: evaluation (lenient) or training.

A row of the table: what the file is called, what it holds, and what must come out. ``ANY`` stands where a cell of the
file says nothing.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from evaluation_files import save_picture, write_xlsx

from vqr1_metric.ratings import RatingError, RatingSet, read_ratings
from vqr1_metric.train_ranker.data import read_sets


@dataclass
class Golden:
    """One label file.

    Args:
        file: its name.
        text: its text; a list of rows for a spreadsheet.
        scores: name -> score of the images that must come out.
        lower: direction that must come out.
        more: name -> what else is known of it (scene, std, method, split, question, dataset, columns).
        votes: ``(a, b, votes_a, votes_b, scene)``.
        problems: ``(kind, subject)`` of what must be listed, and raised with ``strict``.
        told: options of the reader.
        encoding: of the text.
    """

    file: str
    text: str | list[list[object]]
    scores: dict[str, float] = field(default_factory=dict)
    lower: bool | None = False
    more: dict[str, dict[str, object]] = field(default_factory=dict)
    votes: list[tuple[object, ...]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    told: dict[str, object] = field(default_factory=dict)
    encoding: str = "utf-8"


def chat(answer: object, question: str = "<image>How good?", **more: object) -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"image": ["a.png"], "conversations": turns, **more})


def messages(image: str, answer: str) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "<image>Rate it."}, {"role": "assistant", "content": answer}],
        "images": [image],
    }


AB = {"a.png": 3.5, "b.png": 2.0}
FILES = [
    Golden("comma.csv", "image,mos,std,scene,method,split\na.png,3.5,.5,s1,m1,train\nb.png,2,,s1,m2,test\n", AB,
           more={"a.png": {"std": 0.5, "scene": "s1", "method": "m1", "split": "train"}, "b.png": {"split": "test"}}),
    Golden("semicolon.csv", "image;mos\na.png;3,5\nb.png;2,0\n", AB),
    Golden("tab.tsv", "filename\tMOS\tref_img\na.png\t3.5\tr\nb.png\t2\tr\n", AB, more={"b.png": {"scene": "r"}}),
    Golden("utf16.csv", "Image Name,MOS\r\na.png,3.5\r\nb.png,2\r\n", AB, encoding="utf-16"),
    Golden("book.xlsx", [["Image name", "MOS", "Brightness"], ["a.png", 3.5, 60], ["b.png", 2, 61]], AB,
           more={"a.png": {"columns": {"Brightness": "60"}}}),
    Golden("image_mos.txt", "# a comment\n\na.png 3.5\nb.png 2\n", AB),
    Golden("image_mos_std.txt", "a.png\t3.5\t0.5\nb.png\t2\t1\n", AB, more={"b.png": {"std": 1.0}}),
    Golden("reference_image_mos.txt", "r.png a.png 3.5\nr.png b.png 2\n", AB, more={"a.png": {"scene": "r.png"}}),
    Golden("reference_image_mos_std.txt", "r.png a.png 3.5 0.5\nr.png b.png 2 1\n", AB,
           more={"a.png": {"scene": "r.png", "std": 0.5}}),
    Golden("blanks.txt", "ss01 (7).png 0.4\na.png 3.5\nb.png 2\n", {"ss01 (7).png": 0.4, **AB}),
    Golden("decimal_comma.txt", "a.png 3,5\nb.png 2,0\n", AB),
    Golden("authors.jsonl", chat(3.5, dataset_name="KonIQ") + "\n" + chat(70, "Beautiful?", dataset_name="SPAQ"),
           {"KonIQ/a.png": 3.5, "SPAQ/a.png": 70.0},
           more={"KonIQ/a.png": {"question": "How good?"}, "SPAQ/a.png": {"question": "Beautiful?"}}),
    Golden("vlm_r1.jsonl", chat("<think>fine</think><answer> 63.5 </answer>"), {"a.png": 63.5}),
    Golden("swift.jsonl", json.dumps(messages("a.png", "3.5")) + "\n" + json.dumps(messages("b.png", "2")), AB,
           more={"a.png": {"question": "Rate it."}}),
    Golden("both.jsonl", chat("It is sharp.", mos=3.5), {"a.png": 3.5}),
    Golden("solution.jsonl", '{"image": "a.png", "solution": "<answer>3.5</answer>"}', {"a.png": 3.5}),
    Golden("llama_factory.json", json.dumps([messages("a.png", "3.5"), messages("b.png", "2.0")]), AB),
    Golden("plain.jsonl", '{"path": "a.png", "score": 3.5}\n{"path": "b.png", "score": 2, "x": "1"}', AB),
    Golden("agiqa.csv", 'name,prompt,mos_quality,std_quality\na.png,"a man,\nold",3.5,0.5\nb.png,x,2,1\n', AB,
           more={"a.png": {"std": 0.5, "columns": {"prompt": "a man,\nold"}}}),
    Golden("avt.csv", "image,generator,prompt,quality_mos,quality_std,appeal_mos\na.png,g,p,3.5,.5,1\nb.png,h,q,2,.4,5",
           AB, more={"a.png": {"std": 0.5, "method": "g", "columns": {"prompt": "p", "appeal_mos": "1"}}}),
    Golden("named.csv", "datei;note;art\na.png;3,5;s\nb.png;2;t\n", AB, more={"a.png": {"scene": "s"}},
           told={"columns": {"image": "datei", "mos": "note", "scene": "art"}}),
    Golden("numbered.txt", "3.5 a.png\n2 b.png\n", AB, told={"columns": {"mos": 0, "image": 1}}),
    Golden("live.csv", "image,dmos\na.png,3.5\nb.png,2\n", AB, lower=None),
    Golden("live.csv", "image,dmos\na.png,3.5\nb.png,2\n", AB, lower=True, told={"lower_is_better": True}),
    Golden("kadid.csv", "dist_img,ref_img,dmos,var\na.png,r,3.5,1\nb.png,r,2,1\n", AB, lower=None,
           more={"a.png": {"scene": "r"}}),
    Golden("sets.csv", "image,mos,set\na.png,3.5,Set5\nb.png,2,Set14\n", AB,
           more={"a.png": {"split": None, "columns": {"set": "Set5"}}}),
    Golden("hash.csv", "image,mos\n#1.png,3\na.png,3.5\nb.png,2\n", {"#1.png": 3.0, **AB}),
    Golden("votes.csv", "a,b,votes_a,votes_b,scene\na.png,b.png,8,2,s\n", votes=[("a.png", "b.png", 8.0, 2.0, "s")]),
    Golden("twoafc.csv", "image_a,image_b,a_preferred,b_preferred\na.png,b.png,25,6\n",
           votes=[("a.png", "b.png", 25.0, 6.0, None)]),
    Golden("single.csv", "image_a;image_b\na.png;b.png\n", votes=[("a.png", "b.png", 1.0, 0.0, None)]),
    Golden("chosen.jsonl", '{"chosen": "a.png", "rejected": "b.png", "scene": "s"}',
           votes=[("a.png", "b.png", 1.0, 0.0, "s")]),
    Golden("best.csv", "image,scene,method,best_votes\na.png,s,m,6\nb.png,s,n,3\n",
           votes=[("a.png", "b.png", 6.0, 3.0, "s")], more={"a.png": {"method": "m", "scene": "s"}}),
    Golden("bad.csv", "image,mos\na.png,3.5\nb.png,2\n#1.png,good\nss01 (7).png,\nd.png,3,75\n,4\n", AB,
           problems=[("bad row", "#1.png"), ("bad row", "ss01 (7).png"), ("bad row", "d.png")]),
    Golden("gone.csv", "image,mos\na.png,3.5\nb.png,2\ngone.png,1\n", AB, problems=[("missing picture", "gone.png")]),
    Golden("twice.csv", "image,mos\na.png,3.5\nb.png,2\n#1.png,1\n#1.png,2\n", AB, problems=[("duplicate", "#1.png")]),
    Golden("same_file.csv", "image,mos\nA.PNG,3.5\na.png,3.5\nb.png,2\n", {"A.PNG": 3.5, "b.png": 2.0},
           problems=[("duplicate", "A.PNG")]),
    Golden("mixed.txt", "a.png 3.5\nb.png 2\n#1.png 1 4\n", AB, problems=[("bad row", "#1.png")]),
    Golden("broken.jsonl", '{"image": "a.png", "mos": 3.5}\nnot json\n{"image": "b.png", "mos": 2}', AB,
           problems=[("bad row", "{path}, line 2")]),
    Golden("odd.jsonl", '{"image": "a.png", "mos": 3.5}\n{"image": "b.png", "mos": 2}\n{"image": "c.png", "mos": NaN}',
           AB, problems=[("bad row", "c.png")]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "#1.png", "ss01 (7).png"):
        save_picture(tmp_path / "pictures" / name, 0.5)
    return tmp_path


def write(golden: Golden, folder: Path) -> Path:
    path = folder / golden.file
    if isinstance(golden.text, str):
        path.write_bytes(golden.text.encode(golden.encoding))
        return path
    return write_xlsx(path, golden.text)


def check(golden: Golden, found: RatingSet, path: Path) -> None:
    if golden.votes:
        votes = [(p.a, p.b, p.votes_a, p.votes_b) for p in found.preferences]
        assert votes == [vote[:4] for vote in golden.votes]
        assert all(p.scene == vote[4] for p, vote in zip(found.preferences, golden.votes, strict=True) if vote[4])
        assert sorted(image.name for image in found.images) == sorted({n for vote in golden.votes for n in vote[:2]})
    else:
        by_name = {
            image.name if not image.dataset else f"{image.dataset}/{image.name}": image for image in found.images
        }
        assert {name: image.mos for name, image in by_name.items()} == golden.scores
        for name, known in golden.more.items():
            assert {key: getattr(by_name[name], key) for key in known} == known
        assert all(math.isnan(i.std) for n, i in by_name.items() if "std" not in golden.more.get(n, {"std": 0}))
    assert found.lower_is_better is golden.lower
    assert all(image.path is not None and image.read()[:4] == b"\x89PNG" for image in found.images)
    assert all(image.where.startswith(str(path)) for image in found.images)


@pytest.mark.parametrize("golden", FILES, ids=lambda golden: golden.file)
def test_one_reading_whoever_asks(folder: Path, golden: Golden) -> None:
    path = write(golden, folder)
    lenient = read_ratings(path, folder / "pictures", strict=False, **golden.told)
    check(golden, lenient, path)
    listed = {(p.kind, p.subject) for p in lenient.problems if p.kind != "missing label"}
    assert listed >= {(kind, subject.format(path=path)) for kind, subject in golden.problems}
    assert bool(listed) == bool(golden.problems)
    if golden.problems:
        with pytest.raises(RatingError, match=rf"{golden.file}, line \d+"):
            read_ratings(path, folder / "pictures", strict=True, **golden.told)
        return
    check(golden, read_ratings(path, folder / "pictures", strict=True, **golden.told), path)
    if not golden.told:  # what `vqr1 train` reads is the same, parted by data set
        parts = read_sets([path], [folder / "pictures"])
        assert [part.images for part in parts] == [part.images for part in lenient.by_dataset()]
        assert [part.preferences for part in parts] == [part.preferences for part in lenient.by_dataset()]


@pytest.mark.parametrize("word", ["dev", "testing", "eval", "holdout", "val1", "0"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_unknown_word_in_a_split_column_is_refused(folder: Path, word: str, strict: bool) -> None:
    path = folder / "l.csv"
    path.write_text(f"image,mos,split\na.png,3.5,train\nb.png,2,{word}\n")
    with pytest.raises(RatingError, match=rf"train, val or test .* in .*l.csv, line 3, but got '{word}'"):
        read_ratings(path, folder / "pictures", strict=strict)
    assert len(read_ratings(path, folder / "pictures", strict=strict, columns={"split": None})) == 2


@pytest.mark.parametrize(
    ("text", "told", "message"),
    [
        ("picture,verdict\na.png,3\n", {}, "a header with a picture and a score column"),
        ("image,mos\na.png,3\n", {"columns": {"mos": "MOS_z"}}, "Expected a column 'MOS_z' for mos"),
        ("image,mos\na.png,3\n", {"columns": {"picture": "image"}}, "Expected columns of image, mos"),
        ("image_a,image_b,first_wins,x\na.png,b.png,25,y\n", {}, "votes_a and votes_b, or neither.*first_wins"),
        ("image_a,image_b,votes_a\na.png,b.png,25\n", {}, "votes_a and votes_b, or neither.*votes_a"),
        ("image,scene,best_votes\na.png,s,0\nb.png,s,0\n", {}, "at least one pair"),
        ("image,mos\n", {}, "found none"),
        ("", {}, "it is empty"),
    ],
)
def test_files_that_say_nothing(folder: Path, text: str, told: dict[str, object], message: str) -> None:
    path = folder / "l.csv"
    path.write_text(text)
    for strict in (True, False):
        with pytest.raises(RatingError, match=message):
            read_ratings(path, folder / "pictures", strict=strict, **told)


def test_a_direction_that_is_not_settled_is_asked_for(folder: Path) -> None:
    path = folder / "l.csv"
    path.write_text("image,dmos\na.png,3.5\nb.png,2\n")
    with pytest.raises(
        RatingError, match=r"whether the dmos of 'l' \(.*l.csv, line 2\) is better when lower or higher"
    ):
        _ = read_ratings(path, folder / "pictures", strict=True).quality
    for lower, quality in ((True, [-3.5, -2.0]), (False, [3.5, 2.0])):
        assert read_ratings(path, folder / "pictures", strict=True, lower_is_better=lower).quality == quality


def test_several_data_sets_in_one_file_are_parted(folder: Path) -> None:
    path = folder / "all.csv"
    path.write_text("dataset,image,mos\nkoniq,a.png,3.5\nspaq,b.png,70\nkoniq,b.png,2\n")
    sets = read_ratings(path, folder / "pictures", strict=True).by_dataset()
    assert [(s.name, s.quality) for s in sets] == [("koniq", [3.5, 2.0]), ("spaq", [70.0])]


def test_a_saved_hugging_face_dataset(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [str(folder / "pictures" / n) for n in ("a.png", "b.png")], "mos": [3.5, 2.0], "ref": ["r", "r"]}
    data = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    data.save_to_disk(folder / "saved")
    found = read_ratings(folder / "saved", strict=True)
    assert found.quality == [3.5, 2.0] and found.images[1].where == f"{folder / 'saved'}, row 1"
    assert found.images[1].read() == (folder / "pictures" / "b.png").read_bytes() and found.has_scenes
    data.remove_columns("mos").save_to_disk(folder / "unrated")
    with pytest.raises(RatingError, match="an image column and a score column"):
        read_ratings(folder / "unrated", strict=True)
    rows["mos"][1] = math.nan
    datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image()).save_to_disk(folder / "nan")
    with pytest.raises(RatingError, match="nan, row 1"):
        read_ratings(folder / "nan", strict=True)
