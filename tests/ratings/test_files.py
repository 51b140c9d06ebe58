"""Label files: every form, separator, encoding and fault."""

import math
from pathlib import Path

import pytest
from evaluation_files import write_xlsx
from PIL import Image

from vqr1_metric.ratings import RatedImage, RatingError, RatingSet, read_ratings
from vqr1_metric.ratings.lookup import find_images
from vqr1_metric.ratings.sets import count_problems


def write(folder: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def picture(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value, 0, 0)).save(path)
    return path


def read_labels(path: Path, **told: object) -> RatingSet:
    return read_ratings(path, strict=False, find=False, **told)


def told(labels: RatingSet) -> list[tuple[str, float]]:
    return [(item.name, item.mos) for item in labels.images]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", ", "\t "])
def test_header_and_separators(tmp_path: Path, separator: str) -> None:
    rows = [["image", "mos", "std", "scene", "method", "split"], ["a b.png", "3.5", "0.5", "s", "m", "test"]]
    rows += [["c.png", "2", "0.1", "s", "n", "Training"], ["d.png", "-1e-1", "", "", "", ""]]
    labels = read_labels(write(tmp_path, "\n".join(separator.join(row) for row in rows)))
    assert told(labels) == [("a b.png", 3.5), ("c.png", 2.0), ("d.png", -0.1)]
    assert labels.images[0] == RatedImage("a b.png", 3.5, 0.5, "s", "m", "test")
    assert labels.images[1].split == "train" and labels.images[2].scene is None and math.isnan(labels.images[2].std)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    labels = read_labels(write(tmp_path, "Image Name,MOS\r\nbärli.jpg,3.5\r\nzoë.jpg,2.5\r\n", encoding=encoding))
    assert told(labels) == [("bärli.jpg", 3.5), ("zoë.jpg", 2.5)]


def test_decimal_commas_and_quotes(tmp_path: Path) -> None:
    assert told(read_labels(write(tmp_path, "image;mos\na.png;3,75\nb.png;2,5\n"))) == [("a.png", 3.75), ("b.png", 2.5)]
    quoted = read_labels(write(tmp_path, 'image,mos\n"a, b.png",3.75\n"c ""d"".png",1\n'))
    assert told(quoted) == [("a, b.png", 3.75), ('c "d".png', 1.0)]
    assert told(read_labels(write(tmp_path, "a.png 3,75\nb.png 2,5\n", "l.txt"))) == [("a.png", 3.75), ("b.png", 2.5)]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a.jpg 63.9\nb.jpg 12", [RatedImage("a.jpg", 63.9), RatedImage("b.jpg", 12.0)]),
        ("a.jpg 63.9 18.4\nb.jpg 12 .5", [RatedImage("a.jpg", 63.9, 18.4), RatedImage("b.jpg", 12.0, 0.5)]),
        (
            "r.png a.png 63.9\nr.png b.png 1",
            [RatedImage("a.png", 63.9, scene="r.png"), RatedImage("b.png", 1.0, scene="r.png")],
        ),
        ("I01.png I01_01_01.png 4.57 0.496", [RatedImage("I01_01_01.png", 4.57, 0.496, "I01.png")]),
        ("ss01 (10).jpg 0.4\nss01 (7).jpg 0.3", [RatedImage("ss01 (10).jpg", 0.4), RatedImage("ss01 (7).jpg", 0.3)]),
        ("# a comment\n\n10004473376.jpg\t77.38\t0.52\n", [RatedImage("10004473376.jpg", 77.38, 0.52)]),
    ],
)
def test_label_files_of_the_authors(tmp_path: Path, text: str, items: list[RatedImage]) -> None:
    labels = read_labels(write(tmp_path, text, "KONIQ-10K_test_all.txt"))
    for found, wanted in zip(labels.images, items, strict=True):
        assert (found.name, found.mos, found.scene) == (wanted.name, wanted.mos, wanted.scene)
        assert found.std == wanted.std or (math.isnan(found.std) and math.isnan(wanted.std))
    assert labels.name == "KONIQ-10K_test_all"


def test_direction(tmp_path: Path) -> None:
    dmos = read_labels(write(tmp_path, "image,dmos\na.png,3\nb.png,2\n"))
    assert dmos.lower_is_better is None
    assert not read_labels(write(tmp_path, "image,dmos\na.png,3\n"), lower_is_better=False).lower_is_better
    assert read_labels(write(tmp_path, "image,mos\na.png,3\n"), lower_is_better=True).quality == [-3.0]


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    text = "image,mos\na.png,3\nb.png,good\nc.png,\n,4\nd.png,nan\na.png,3\ne.png,1\ne.png,2\nf.png,inf\ng.png,1e999\n"
    labels = read_labels(write(tmp_path, text))
    assert told(labels) == [("a.png", 3.0)]
    assert count_problems(labels.problems) == {"duplicate": 2, "bad row": 6}
    details = {problem.subject: problem.detail for problem in labels.problems}
    assert "'good', which is not a number" in details["b.png"] and "has no score" in details["c.png"]
    assert (
        "names no picture" in details[f"{tmp_path / 'labels.csv'}, line 5"]
        and "contradicting scores (1, 2)" in details["e.png"]
    )
    assert "counted once" in details["a.png"]


def test_a_file_whose_rows_contradict_says_so(tmp_path: Path) -> None:
    with pytest.raises(RatingError, match=r"line 3: a.png has contradicting scores \(1, 2\)"):
        read_labels(write(tmp_path, "image,mos\na.png,1\na.png,2\n"))
    with pytest.raises(RatingError, match="cannot be read as one \\(field larger than field limit"):
        read_labels(write(tmp_path, 'image,mos\n"' + "x" * 200_000 + '",1\n'))


@pytest.mark.parametrize("text", ["", "\n\n", "image,mos\n", "hello\nworld\n", "image,mos\na.png,bad\n"])
def test_a_file_without_labels_says_what_is_expected(tmp_path: Path, text: str) -> None:
    with pytest.raises(RatingError, match="Expected"):
        read_labels(write(tmp_path, text))
    with pytest.raises(RatingError, match="Expected a file of ratings"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(RatingError, match="binary data"):
        read_labels(picture(tmp_path / "labels.png"))


def test_spreadsheets(tmp_path: Path) -> None:
    rows = [["Image name", "MOS", "Brightness"], ["00001.jpg", 58.25, 60], ["00002.jpg", None, 61], ["00003.jpg", 7, 1]]
    labels = read_labels(write_xlsx(tmp_path / "l.xlsx", rows))
    assert told(labels) == [("00001.jpg", 58.25), ("00003.jpg", 7.0)] and len(labels.problems) == 1
    (tmp_path / "broken.xlsx").write_bytes(b"PK nonsense")
    with pytest.raises(RatingError, match="Expected an XLSX file"):
        read_labels(tmp_path / "broken.xlsx")


def test_pictures_are_found_and_what_is_missing_is_listed(tmp_path: Path) -> None:
    for name in ("A.PNG", "sub/b.png", "c.png", "x/same.png", "y/same.png", "extra.png", ".hidden.png"):
        picture(tmp_path / "pictures" / name)
    text = "image,mos\na.png,1\nb.png,2\nc.bmp,3\nsame.png,4\nx/same.png,5\ngone.png,6\n"
    labels = find_images(read_labels(write(tmp_path, text)), [tmp_path / "pictures"])
    found = {item.name: item.path.relative_to(tmp_path / "pictures").as_posix() for item in labels.images}
    assert found == {"a.png": "A.PNG", "b.png": "sub/b.png", "c.bmp": "c.png", "x/same.png": "x/same.png"}
    kinds = {(problem.kind, problem.subject) for problem in labels.problems}
    assert kinds == {
        ("missing picture", "gone.png"),
        ("ambiguous", "same.png"),
        ("missing label", "extra.png"),
        ("missing label", "y/same.png"),
    }
    long = read_labels(write(tmp_path, "image,mos\n" + "x" * 300 + ".png,1\n" + "y" * 300 + ".png,bad\n"))
    assert count_problems(find_images(long, [tmp_path / "pictures"]).problems)["missing picture"] == 1
    with pytest.raises(RatingError, match="Expected a folder of pictures"):
        find_images(labels, [tmp_path / "nowhere"])


def test_splits(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, "image,mos,split\na.png,1,training\nb.png,2,test\nc.png,3,validation\n"))
    assert told(labels.take_split("test")) == [("b.png", 2.0)] and len(labels.take_split("all")) == 3
    with pytest.raises(RatingError, match="Expected a split of labels: all, test, train, val; but got 'dev'"):
        labels.take_split("dev")
