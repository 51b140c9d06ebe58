"""Ratings in every layout, and every way they can be wrong: the message names file and line, before weights load."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.protocol import QUESTION
from vqr1_metric.train_ranker.base import TrainingRows
from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.data import (
    DataError,
    check_copies,
    check_questions,
    check_sets,
    check_validation,
    look,
    read_data,
    split_validation,
)
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


def chat(name: str, data_set: str, mos: float, question: str = "") -> str:
    """A line of the authors' JSONL."""
    turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": mos}]
    return json.dumps({"id": 1, "dataset_name": data_set, "image": [name], "conversations": turns})


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_authors_jsonl_holds_several_sets(tmp_path: Path, pictures: Path) -> None:
    path = write(
        tmp_path / "all.jsonl", chat("p0.png", "KonIQ", 4.63), chat("p1.png", "SPAQ", 70), chat("p2.png", "KonIQ", 2)
    )
    koniq, spaq = read_data([path], [pictures])
    assert (koniq.name, koniq.quality, spaq.name, spaq.quality) == ("KonIQ", [4.63, 2.0], "SPAQ", [70.0])
    assert spaq.images[0].where == f"{path}, line 2"


def test_the_question_of_a_file_is_asked(tmp_path: Path, pictures: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[chat(f"p{i}.png", "a", i, "Rate the beauty from 1 to 5.") for i in range(4)])
    sets = read_data([path], [pictures])
    training = TrainingRows.of(sets)
    (turn,) = training.prompt(training.rows[0], thinking=True)
    assert turn["content"].startswith("Rate the beauty from 1 to 5. First output the thinking process in")
    check_questions(sets, "sampled")
    with pytest.raises(DataError, match=r"built-in question with objective='exact'.*a.jsonl, line 1 asks 'Rate the b"):
        check_questions(sets, "exact")
    same = write(tmp_path / "b.jsonl", *[chat(f"p{i}.png", "a", i, QUESTION) for i in range(4)])
    check_questions(read_data([same], [pictures]), "exact")


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
    training = TrainingRows.of([s])
    assert training.units == [[(0, 1), (2, 3)]] and [row["image"] for row in training.rows] == ["0", "1", "1", "2"]
    assert [row["share"] for row in training.rows] == [0.8, pytest.approx(0.2), 0, 1] and len(s) == 3
    check_sets([s], 4)
    with pytest.raises(DataError, match="Expected an even images_per_comparison"):
        check_sets([s], 3)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.txt", ["p0.png 3", "gone.png 4"], r"a.txt, line 2: gone.png is not in "),
        ("a.txt", ["p0.png 3", "p1.png good", "p2.png 4"], r"a.txt, line 2: p1.png has the score 'good'"),
        ("a.csv", ["image,mos", "p0.png,3", "p1.png,"], r"a.csv, line 3: p1.png has no score"),
        ("a.csv", ["image,mos,split", "p0.png,3,train", "p1.png,4,dev"], r"a.csv, line 3, but got 'dev'"),
        ("a.csv", [""], r"Expected ratings in .*a.csv', but it is empty"),
    ],
)
def test_what_evaluation_would_leave_out_is_refused(
    tmp_path: Path, pictures: Path, name: str, lines: list[str], message: str
) -> None:
    """The reader's own tests are in tests/ratings; here only that training is strict."""
    with pytest.raises(DataError, match=message):
        read_data([write(tmp_path / name, *lines)], [pictures])


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


def test_sets_that_teach_nothing(tmp_path: Path, pictures: Path) -> None:
    def sets(*lines: str):
        return read_data([write(tmp_path / "a.txt", *lines)], [pictures])

    four = [f"p{i}.png 3" for i in range(4)]
    with pytest.raises(DataError, match=r"differ in data set 'a', but all 4 are 3 \(.*a.txt, line 1"):
        check_sets(sets(*four), 4)
    with pytest.raises(DataError, match=r"Expected at least 8 pictures in data set 'a' .*, but got 4"):
        check_sets(sets(*four), 8)
    with pytest.raises(DataError, match=r"a.txt, line 3: p0.png has contradicting scores \(3, 5\)"):
        sets("p0.png 3", "p1.png 4", "p0.png 5")
    with pytest.raises(DataError, match="'a' was given twice"):
        check_sets([*sets(*four), *sets(*four)], 2)


def test_unreadable_pictures_are_all_listed(tmp_path: Path, pictures: Path) -> None:
    (pictures / "p1.png").write_bytes(b"")
    (pictures / "p3.png").write_bytes((pictures / "p3.png").read_bytes()[:60])
    sets = read_data([write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(6)])], [pictures])
    with pytest.raises(DataError, match=r"a.txt, line 2: .*is empty; .*a.txt, line 4: .*damaged or truncated"):
        look(sets, progress=False)


def test_a_picture_in_training_and_validation(tmp_path: Path, pictures: Path) -> None:
    (pictures / "copy.png").write_bytes((pictures / "p2.png").read_bytes())
    training = read_data([write(tmp_path / "a.txt", *[f"p{i}.png {i}" for i in range(6)])], [pictures])
    validation = read_data([write(tmp_path / "b.txt", "p7.png 3", "copy.png 4")], [pictures])
    looked = look([*training, *validation], progress=False)
    with pytest.raises(
        DataError, match=r"b.txt, line 2: .*copy.png is the same picture as .*p2.png \(.*a.txt, line 3\)"
    ):
        check_copies(training, validation, looked)


def test_validation_keeps_references_together(tmp_path: Path, pictures: Path) -> None:
    rows = [f"ref{i // 2}.png p{i}.png {i}" for i in range(8)]
    (s,) = read_data([write(tmp_path / "a.txt", *rows)], [pictures])
    train, val = split_validation(s, 0.5, seed=1)
    assert len(train) == len(val) == 4
    assert not {p.scene for p in train.images} & {p.scene for p in val.images}
    assert split_validation(s, 0.5, seed=1)[1] == val
    assert len({split_validation(s, 0.5, seed=seed)[1].images[0].name for seed in range(20)}) > 1
    assert len(split_validation(s, 0.0)[1]) == 0


def test_the_labels_own_split_counts(tmp_path: Path, pictures: Path) -> None:
    rows = [f"p{i}.png,{i},{split}" for i, split in enumerate(["train", "val", "test", "train", "val", ""])]
    (s,) = read_data([write(tmp_path / "a.csv", "image,mos,split", *rows)], [pictures])
    train, val = split_validation(s, 0.5)
    assert [p.mos for p in train.images] == [0, 3, 5] and [p.mos for p in val.images] == [1, 4]
    with pytest.raises(DataError, match="Expected at least 4 validation pictures"):
        check_validation([val])


def test_preferences_split_by_pair(tmp_path: Path, pictures: Path) -> None:
    rows = [f"p{i}.png,p{i + 1}.png,3,1" for i in range(7)]
    (s,) = read_data([write(tmp_path / "v.csv", "a,b,votes_a,votes_b", *rows)], [pictures])
    train, val = split_validation(s, 0.4)
    for part in (train, val):
        for pair in part.preferences:
            assert {pair.a, pair.b} <= {image.name for image in part.images}
        assert len(part.images) == len({k for pair in part.preferences for k in (pair.a, pair.b)}) > 0
    assert len(train.preferences) + len(val.preferences) < 7


def test_held_out_preferences_are_whole_pairs_however_they_hang_together(tmp_path: Path, pictures: Path) -> None:
    """A picture drawn by itself would take no pair along; its missing score must not be validated on."""
    rows = [f"p{i}.png,p{i + 1}.png,3,1" for i in range(7)]
    for seed in range(8):
        (s,) = read_data([write(tmp_path / "v.csv", "a,b,votes_a,votes_b", *rows)], [pictures])
        _, val = split_validation(s, 0.2, seed)
        assert len(val.preferences) == 1 and len(val.images) == 2
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
        ({"validation_fraction": 1.0}, "validation_fraction of at least 0, at most 0.9"),
        ({"objective": "sampled", "use_vllm": True}, "Expected vllm to be installed: pip install 'vqr1-metric"),
        ({"use_vllm": True}, "use_vllm=False with objective='exact'"),
        ({"kl_direction": "reverse", "objective": "sampled"}, "kl_direction='forward' with objective='sampled'"),
        ({"rewards": ["a:b"]}, "no further rewards with objective='exact'"),
        ({"objective": "sampled", "rewards": ["a:b"], "reward_weights": [1, 2]}, "a weight for each of the 1 rewards"),
        ({"temperature": 0}, "temperature of above 0"),
        ({"max_steps": 0}, "max_steps of at least 1, or -1"),
        ({"min_pixels": 9, "max_pixels": 4}, "min_pixels up to max_pixels"),
        ({"objective": "distill"}, "Expected a teacher"),
        ({"teacher": ["a.jsonl"]}, "a teacher only with objective='distill'"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        RankerConfig.preset("nano", **{"data": ["a.csv"], "output_dir": "out", **settings}).check()


def test_presets() -> None:
    with pytest.raises(ConfigError, match="Expected a preset of paper, 80gb-lora, 24gb-4bit, nano, but got 'big'"):
        RankerConfig.preset("big")
    paper = RankerConfig.preset("paper")
    assert (paper.images_per_device, paper.num_generations, paper.kl_weight, paper.clip) == (8, 6, 0.04, 0.2)
    assert (paper.top_k, paper.validation_fraction, paper.seed, paper.mixing) == (50, 0, 42, "authors")
    assert (paper.temperature, paper.max_new_tokens, paper.learning_rate, paper.epochs) == (1.0, 256, 1e-6, 10)
    assert paper.comparison_size(16) == 8
    globally = RankerConfig.preset("paper", comparison_scope="global", images_per_comparison=None)
    assert globally.comparison_size(16) == 128


def scene(seed: int, noise: float = 0.0) -> np.ndarray:
    """A picture of large random shapes, and versions of it."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    whole = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
    return (whole + noise * np.random.default_rng(seed + 100).normal(size=whole.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "name",
    ["I{s:02}_01_0{v}.png", "i{s:02}_02_{v}.bmp", "A{s:04}_00_0{v}.bmp", "b{s}.AWGN.{v}.png", "{s}x{v}.png"],
)
def test_versions_of_a_scene_stay_on_one_side(tmp_path: Path, name: str) -> None:
    """By the naming of known data sets, and, the last, by what the pictures show."""
    lines = []
    for s in range(8):
        for v in range(1, 5):
            file = name.format(s=s, v=v)
            Image.fromarray(scene(s, 6.0 * v)).save(tmp_path / file)
            lines.append(f"{file} {s + v}")
    path = write(tmp_path / "a.txt", *lines)
    config = RankerConfig.preset(
        "nano",
        data=[str(path)],
        output_dir="out",
        images_per_device=4,
        images_per_comparison=4,
        validation_fraction=0.3,
    )
    (train,), (val,) = prepare_data(config)
    of = {name.format(s=s, v=v): s for s in range(8) for v in range(1, 5)}
    assert {of[i.name] for i in train.images}.isdisjoint(of[i.name] for i in val.images) and len(val) in (12, 16)


def test_a_scene_on_both_sides_of_a_split_is_refused(tmp_path: Path) -> None:
    """Certain by a column; a guess by content is a warning."""
    for s in range(4):
        for v in range(4):
            Image.fromarray(scene(s, 6.0 * v)).save(tmp_path / f"{s}x{v}.png")
    rows = [(s, v, "val" if v == 3 else "train") for s in range(4) for v in range(4)]
    known = write(
        tmp_path / "a.csv",
        "image,mos,reference,split",
        *[f"{s}x{v}.png,{s + v},ref{s},{split}" for s, v, split in rows],
    )
    more = {"output_dir": "out", "images_per_device": 4, "images_per_comparison": 4}
    with pytest.raises(DataError, match=r"no scene in both .*a.csv, line 5: 0x3.png shows ref0, as 0x0.png does"):
        prepare_data(RankerConfig.preset("nano", data=[str(known)], **more))
    unknown = write(tmp_path / "b.csv", "image,mos,split", *[f"{s}x{v}.png,{s + v},{split}" for s, v, split in rows])
    with pytest.warns(UserWarning, match="4 validation pictures look like training pictures"):
        prepare_data(RankerConfig.preset("nano", data=[str(unknown)], **more))
    two = [write(tmp_path / f"{n}.txt", *[f"{s}x{v}.png {s + v}" for s in part for v in range(4)]) for n, part in
           (("one", (0, 1)), ("two", (1, 2)))]  # fmt: skip
    with pytest.raises(DataError, match="is the same picture as"):
        prepare_data(RankerConfig.preset("nano", data=[str(two[0])], validation=[str(two[1])], **more))
