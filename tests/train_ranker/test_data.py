"""Ratings in every layout, and every way they can be wrong: the message names file and line, before weights load."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.data import read_data
from vqr1_metric.train_ranker.ratings import DataError, check_pictures, check_sets, check_validation, split_validation
from vqr1_metric.train_ranker.run import prepare_data


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with eight small pictures p0.png ... p7.png, p6 and p7 in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(8):
        name = f"deep/p{i}.png" if i > 5 else f"p{i}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "group"),
    [
        ("{name} {mos}", None),
        ("{name} {mos} 0.7", None),
        ("ref{i}.png {name} {mos}", "ref{i}.png"),
        ("ref{i}.png {name} {mos} 0.7", "ref{i}.png"),
        ("{name},{mos}", None),
        ("{name}\t{mos}\t0.7", None),
    ],
)
def test_the_authors_label_files(tmp_path: Path, pictures: Path, line: str, group: str | None) -> None:
    rows = [line.format(name=f"p{i}.png", mos=1 + i / 2, i=i // 2) for i in range(8)]
    (s,) = read_data([write(tmp_path / "kadid.txt", "# a comment", *rows)], [pictures])
    assert s.name == "kadid" and s.quality == [1 + i / 2 for i in range(8)]
    assert [Path(p.name).name for p in s.pictures] == [f"p{i}.png" for i in range(8)]
    assert s.pictures[3].where.endswith("kadid.txt, line 5")
    assert group is None or s.pictures[5].group == group.format(i=2)
    assert s.pictures[7].read()[:4] == b"\x89PNG"


def test_the_authors_jsonl_holds_several_sets(tmp_path: Path, pictures: Path) -> None:
    def row(name: str, data_set: str, mos: float) -> str:
        turns = [{"from": "human", "value": "How good?"}, {"from": "gpt", "value": mos}]
        return json.dumps({"id": 1, "dataset_name": data_set, "image": [name], "conversations": turns})

    path = write(
        tmp_path / "all.jsonl", row("p0.png", "KonIQ", 4.63), row("p1.png", "SPAQ", 70), row("p2.png", "KonIQ", 2)
    )
    koniq, spaq = read_data([path], [pictures])
    assert (koniq.name, koniq.quality, spaq.name, spaq.quality) == ("KonIQ", [4.63, 2.0], "SPAQ", [70.0])
    assert spaq.pictures[0].where == f"{path}, line 2"


def test_a_table_with_a_header(tmp_path: Path, pictures: Path) -> None:
    path = write(
        tmp_path / "mine.csv", "Image Name;MOS;split;reference", "p0.png;3,5;train;a", "p7.png;1,25;validation;b"
    )
    (s,) = read_data([path], [pictures])
    assert s.quality == [3.5, 1.25] and not s.lower_is_better
    assert [(p.split, p.group) for p in s.pictures] == [("train", "a"), ("val", "b")]


def test_the_direction_of_scores_is_told(tmp_path: Path, pictures: Path) -> None:
    live = write(tmp_path / "live.csv", "image,dmos", "p0.png,10", "p1.png,60")
    kadid = write(tmp_path / "kadid.csv", "dist_img,ref_img,dmos", "p6.png,r,1.5", "p7.png,r,4.5")
    plain = write(tmp_path / "plain.txt", "p2.png 0.1", "p3.png 0.9")
    other = write(tmp_path / "other.txt", "p4.png 0.1", "p5.png 0.9")
    sets = read_data([live, kadid, plain, other], [pictures], ["live", "plain"], ["kadid"])
    assert [s.quality for s in sets] == [[-10, -60], [1.5, 4.5], [-0.1, -0.9], [0.1, 0.9]]
    with pytest.raises(
        DataError, match=r"whether the dmos of 'live' \(.*live.csv, line 2\) is better when lower or high"
    ):
        read_data([live, plain], [pictures])
    with pytest.raises(DataError, match=r"names of data sets \(plain\) in either .* but got 'koniq'"):
        read_data([plain], [pictures], lower_is_better=["koniq"])
    with pytest.raises(DataError, match="but got 'live'"):
        read_data([live], [pictures], ["live"], ["live"])


def test_preferences_with_votes(tmp_path: Path, pictures: Path) -> None:
    path = write(tmp_path / "votes.csv", "a,b,votes_a,votes_b", "p0.png,p1.png,8,2", "p1.png,p2.png,0,5")
    (s,) = read_data([path], [pictures])
    assert [(p.a, p.b, p.share) for p in s.preferences] == [(0, 1, 0.8), (1, 2, 0.0)] and len(s) == 3
    check_sets([s], 4)
    with pytest.raises(DataError, match="Expected an even images_per_comparison"):
        check_sets([s], 3)
    for row in ("p0.png,p1.png,0,0", "p0.png,p0.png,1,0", "p0.png,p1.png,-1,2"):
        with pytest.raises(DataError, match=r"at least one vote in .*bad.csv, line 2"):
            read_data([write(tmp_path / "bad.csv", "a,b,votes_a,votes_b", row)], [pictures])


def test_a_hugging_face_dataset(tmp_path: Path, pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [str(pictures / f"p{i}.png") for i in range(4)], "mos": [1.0, 2.0, 3.0, 4.0]}
    data = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    (s,) = read_data([tmp_path / "saved"])
    assert s.quality == [1, 2, 3, 4] and s.pictures[2].where == f"{tmp_path / 'saved'}, row 2"
    assert s.pictures[2].read() == (pictures / "p2.png").read_bytes()
    data.remove_columns("mos").save_to_disk(tmp_path / "unrated")
    with pytest.raises(DataError, match="Expected an image column and a score column"):
        read_data([tmp_path / "unrated"])


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.txt", ["p0.png 3", "gone.png 4"], r"a.txt, line 2: there is no gone.png in "),
        ("a.txt", ["p0.png 3", "p1.png good"], r"Expected a number as the score in .*a.txt, line 2, but got 'good'"),
        ("a.txt", ["p0.png 3", "p1.png nan"], r"line 2, but got 'nan'"),
        ("a.txt", ["p0.png 3", "p1.png 4 0.5"], r"the same in every line, but .*a.txt, line 2 is 'p1.png 4 0.5'"),
        ("a.csv", ["image,mos", "p0.png,3", "p1.png"], r"Expected 2 columns in .*a.csv, line 3, but got 1"),
        (
            "a.csv",
            ["image,mos", "p0.png,3", "p1.png,"],
            r"Expected a number as the score in .*a.csv, line 3, but got ''",
        ),
        ("a.csv", ["image,mos", ",3"], r"Expected the name of a picture in .*a.csv, line 2"),
        ("a.csv", ["picture,verdict", "p0.png,fine"], r"Expected in .*a.csv, line 1, a header"),
        ("a.csv", [""], r"Expected ratings in .*a.csv', but it is empty"),
        ("a.jsonl", ['{"image": ["p0.png"]}'], r"in .*a.jsonl, line 1, but got .*KeyError"),
        ("a.jsonl", ["", "not json"], r"a.jsonl, line 2, but got 'not json'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, pictures: Path, name: str, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_data([write(tmp_path / name, *lines)], [pictures])


def test_bad_lines_of_the_other_layouts_are_named(tmp_path: Path, pictures: Path) -> None:
    def row(name: str, mos: object) -> str:
        return json.dumps({"dataset_name": "a", "image": [name], "conversations": [{"from": "gpt", "value": mos}]})

    cases = [
        ("a.jsonl", [row("p0.png", 3), row("gone.png", 4)], r"a.jsonl, line 2: there is no gone.png"),
        ("a.jsonl", [row("p0.png", 3), row("p1.png", float("nan"))], r"a.jsonl, line 2"),
        ("a.jsonl", [row("p0.png", 3), row("p1.png", "fine")], r"a.jsonl, line 2"),
        ("a.csv", ["a,b,votes_a,votes_b", "p0.png,gone.png,1,2"], r"a.csv, line 2: there is no gone.png"),
        ("a.csv", ["a,b,votes_a,votes_b", "p0.png,p1.png,nan,2"], r"a.csv, line 2"),
        ("a.csv", ["image,dmos", "p0.png,inf"], r"a.csv, line 2"),
    ]
    for name, lines, message in cases:
        with pytest.raises(DataError, match=message):
            read_data([write(tmp_path / name, *lines)], [pictures], lower_is_better=["a"])


def test_a_hugging_face_dataset_with_a_score_that_is_none(tmp_path: Path, pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(pictures / f"p{i}.png") for i in range(4)], "mos": [1.0, float("nan"), 3.0, 4.0]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved, row 1"):
        check_sets(read_data([tmp_path / "saved"]), 2)


def test_votes_that_decide_nothing(tmp_path: Path, pictures: Path) -> None:
    path = write(tmp_path / "votes.csv", "a,b,votes_a,votes_b", "p0.png,p1.png,2,2", "p2.png,p3.png,1,1")
    with pytest.raises(DataError, match=r"Expected scores that differ in data set 'votes'.*votes.csv, line 2"):
        check_sets(read_data([path], [pictures]), 2)


def test_bad_sources(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(DataError, match="Expected at least one file of ratings"):
        read_data([])
    with pytest.raises(DataError, match=r"Expected a file of ratings, but '.*none.csv' is none"):
        read_data([tmp_path / "none.csv"])
    with pytest.raises(DataError, match=r"Expected a folder of pictures, but '.*nowhere' is none"):
        read_data([write(tmp_path / "a.txt", "p0.png 3")], [tmp_path / "nowhere"])
    (pictures / "other").mkdir()
    (pictures / "other/p7.png").write_bytes((pictures / "p0.png").read_bytes())
    with pytest.raises(DataError, match=r"line 1: p7.png could be .*deep/p7.png or .*other/p7.png"):
        read_data([write(tmp_path / "a.txt", "p7.png 3")], [pictures])
    with pytest.raises(DataError, match="holds binary data"):
        read_data([pictures / "p0.png"])


def test_sets_that_teach_nothing(tmp_path: Path, pictures: Path) -> None:
    def sets(*lines: str):
        return read_data([write(tmp_path / "a.txt", *lines)], [pictures])

    four = [f"p{i}.png 3" for i in range(4)]
    with pytest.raises(DataError, match=r"differ in data set 'a', but all 4 are 3 \(.*a.txt, line 1"):
        check_sets(sets(*four), 4)
    with pytest.raises(DataError, match=r"Expected at least 8 pictures in data set 'a' .*, but got 4"):
        check_sets(sets(*four), 8)
    with pytest.raises(DataError, match=r"a.txt, line 3: .*p0.png was rated in .*a.txt, line 1 already"):
        check_sets(sets("p0.png 3", "p1.png 4", "p0.png 5"), 2)
    with pytest.raises(DataError, match="'a' was given twice"):
        check_sets([*sets(*four), *sets(*four)], 2)


def test_unreadable_pictures_are_all_listed(tmp_path: Path, pictures: Path) -> None:
    (pictures / "p1.png").write_bytes(b"")
    (pictures / "p3.png").write_bytes((pictures / "p3.png").read_bytes()[:60])
    sets = read_data([write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(6)])], [pictures])
    with pytest.raises(DataError, match=r"a.txt, line 2: .*is empty; .*a.txt, line 4: .*damaged or truncated"):
        check_pictures(sets, [], progress=False)


def test_a_picture_in_training_and_validation(tmp_path: Path, pictures: Path) -> None:
    (pictures / "copy.png").write_bytes((pictures / "p2.png").read_bytes())
    training = read_data([write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(6)])], [pictures])
    validation = read_data([write(tmp_path / "b.txt", "p7.png 3", "copy.png 4")], [pictures])
    with pytest.raises(
        DataError, match=r"b.txt, line 2: .*copy.png is the same picture as .*p2.png \(.*a.txt, line 3\)"
    ):
        check_pictures(training, validation, progress=False)
    check_pictures(training, read_data([write(tmp_path / "b.txt", "p7.png 3")], [pictures]), progress=False)


def test_validation_keeps_references_together(tmp_path: Path, pictures: Path) -> None:
    rows = [f"ref{i // 2}.png p{i}.png {i}" for i in range(8)]
    (s,) = read_data([write(tmp_path / "a.txt", *rows)], [pictures])
    train, val = split_validation(s, 0.5, seed=1)
    assert len(train) == len(val) == 4
    assert not {p.group for p in train.pictures} & {p.group for p in val.pictures}
    assert split_validation(s, 0.5, seed=1)[1] == val
    assert len({split_validation(s, 0.5, seed=seed)[1].pictures[0].name for seed in range(20)}) > 1
    assert len(split_validation(s, 0.0)[1]) == 0


def test_the_labels_own_split_counts(tmp_path: Path, pictures: Path) -> None:
    rows = [f"p{i}.png,{i},{split}" for i, split in enumerate(["train", "val", "test", "train", "val", ""])]
    (s,) = read_data([write(tmp_path / "a.csv", "image,mos,split", *rows)], [pictures])
    train, val = split_validation(s, 0.5)
    assert [p.mos for p in train.pictures] == [0, 3, 5] and [p.mos for p in val.pictures] == [1, 4]
    with pytest.raises(DataError, match="Expected at least 4 validation pictures"):
        check_validation([val])


def test_preferences_split_by_pair(tmp_path: Path, pictures: Path) -> None:
    rows = [f"p{i}.png,p{i + 1}.png,3,1" for i in range(7)]
    (s,) = read_data([write(tmp_path / "v.csv", "a,b,votes_a,votes_b", *rows)], [pictures])
    train, val = split_validation(s, 0.4)
    for part in (train, val):
        for pair in part.preferences:
            named = {Path(part.pictures[k].name).stem for k in (pair.a, pair.b)}
            assert len(named) == 2
        assert len(part.pictures) == len({k for pair in part.preferences for k in (pair.a, pair.b)}) > 0
    assert len(train.preferences) + len(val.preferences) < 7


def test_held_out_preferences_are_whole_pairs_however_they_hang_together(tmp_path: Path, pictures: Path) -> None:
    """A picture drawn by itself would take no pair along; its missing score must not be validated on."""
    rows = [f"p{i}.png,p{i + 1}.png,3,1" for i in range(7)]
    for seed in range(8):
        (s,) = read_data([write(tmp_path / "v.csv", "a,b,votes_a,votes_b", *rows)], [pictures])
        _, val = split_validation(s, 0.2, seed)
        assert len(val.preferences) == 1 and len(val.pictures) == 2
        train, nothing = split_validation(s, 0.0, seed)
        assert len(train.preferences) == 7 and len(nothing) == 0 and nothing.preferences == ()


def test_everything_is_checked_by_prepare_data(tmp_path: Path, pictures: Path) -> None:
    path = write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(8)])
    config = RankerConfig.preset(
        "nano",
        data=[str(path)],
        images=[str(pictures)],
        output_dir=str(tmp_path / "out"),
        images_per_device=4,
        images_per_comparison=4,
        validation_fraction=0.5,
    )
    config.check()
    training, validation = prepare_data(config)
    assert len(training[0]) == len(validation[0]) == 4
    config.images_per_device = config.images_per_comparison = 6
    with pytest.raises(DataError, match="Expected at least 6 pictures in data set 'a'"):
        prepare_data(config)


def test_prepare_data_compares_training_with_validation_files(tmp_path: Path, pictures: Path) -> None:
    """A copy under another name, and a score that is the same for all, in files given by --validation."""
    (pictures / "copy.png").write_bytes((pictures / "p2.png").read_bytes())
    train = write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(4)])
    more = {"images": [str(pictures)], "output_dir": str(tmp_path / "out"), "images_per_device": 4}
    names = ["p4.png", "p5.png", "p6.png"]
    leaked = write(tmp_path / "b.txt", *[f"{name} {i}" for i, name in enumerate([*names, "copy.png"])])
    config = RankerConfig.preset("nano", data=[str(train)], validation=[str(leaked)], images_per_comparison=4, **more)
    with pytest.raises(DataError, match=r"b.txt, line 4: .*copy.png is the same picture as .*p2.png"):
        prepare_data(config)
    config.validation = [str(write(tmp_path / "c.txt", *[f"{name} 3" for name in [*names, "p7.png"]]))]
    with pytest.raises(DataError, match="Expected at least 4 validation pictures of different scores in data set 'c'"):
        prepare_data(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": []}, "Expected at least one file of ratings"),
        ({"output_dir": ""}, "Expected an output folder"),
        ({"thinking": True}, "Expected thinking=False with objective='exact'"),
        ({"images_per_comparison": 5}, "comparison sets of 5 pictures to divide the 16"),
        ({"images_per_comparison": 1}, "at least 2 pictures in a comparison set"),
        ({"rule": "exactly"}, "Expected rule to be one of"),
        ({"quantization": "4bit"}, "Expected lora_rank above 0"),
        ({"objective": "sampled", "micro_batch": 7}, "Expected micro_batch to divide .* = 96"),
        ({"objective": "sampled", "num_generations": 1}, "num_generations of at least 2"),
        ({"objective": "sampled", "num_iterations": 2, "save_steps": 5}, "save_steps to be a multiple"),
        ({"objective": "sampled", "revision": "v2"}, "Expected a folder as the model, but got revision 'v2'"),
        ({"micro_batch": 6}, "micro_batch to divide images_per_device"),
        ({"validation_fraction": 1.0}, "validation_fraction in"),
        ({"use_vllm": True}, "Expected vllm to be installed: pip install vllm"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    config = RankerConfig.preset("nano", **{"data": ["a.csv"], "output_dir": "out", **settings})
    with pytest.raises((ConfigError, DataError), match=message):
        config.check()


def test_presets() -> None:
    with pytest.raises(ConfigError, match="Expected a preset of paper, 80gb-lora, 24gb-4bit, nano, but got 'big'"):
        RankerConfig.preset("big")
    paper = RankerConfig.preset("paper")
    assert (paper.images_per_device, paper.num_generations, paper.kl_weight, paper.clip) == (8, 6, 0.04, 0.2)
    assert (paper.temperature, paper.max_new_tokens, paper.learning_rate, paper.epochs) == (1.0, 256, 1e-6, 10)
    assert paper.comparison_size(16) == 8
    globally = RankerConfig.preset("paper", comparison_scope="global", images_per_comparison=None)
    assert globally.comparison_size(16) == 128
