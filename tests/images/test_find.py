"""What the arguments stand for."""

import os
from pathlib import Path

import pytest

from vqr1_metric.images.find import pictures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("z.png", "a.JPG", "m.webp", "notes.txt", ".hidden.png", "sub/b.png", "sub/deep/c.tif", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*arguments: str, recursive: bool = False) -> list[str]:
    return [name.replace(os.sep, "/") for name in pictures(arguments, recursive)]


def test_folders_give_their_pictures_sorted(folder: Path):
    assert listed(".") == ["./a.JPG", "./m.webp", "./z.png"]
    assert listed("sub/") == ["sub/b.png"]
    assert listed(".", recursive=True) == ["./a.JPG", "./m.webp", "./z.png", "./sub/b.png", "./sub/deep/c.tif"]


def test_files_are_taken_as_they_are(folder: Path):
    assert listed("notes.txt", "z.png", "missing.png") == ["notes.txt", "z.png", "missing.png"]


def test_patterns(folder: Path):
    assert listed("*.png") == ["z.png"]
    assert listed("*") == ["a.JPG", "m.webp", "z.png"]
    assert listed("**/*.png") == ["sub/b.png", "z.png"]
    (folder / "[1].png").touch()
    assert listed("[1].png") == ["[1].png"]  # a file of that name is no pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,mos\nb.png,3\ndeep/c.tif,4\n", ["sub/b.png", "sub/deep/c.tif"]),
        ("mos;PATH\n3;b.png\n", ["sub/b.png"]),
        ("mos\timage\n3\tb.png\n\n4\t\n", ["sub/b.png"]),
        ("b.png,3\ngone.png,4\n", ["sub/b.png", "sub/gone.png"]),  # no header
        ("b.png\n", ["sub/b.png"]),
        ("file,mos\nb.png,3\n", ["sub/b.png"]),  # a header that is no picture
        ('\ufeffimage,note\n"b, c.png","two\nlines"\nz.png,\n', ["sub/b, c.png", "sub/z.png"]),
    ],
)
def test_lists(folder: Path, text: str, expected: list[str]):
    (folder / "sub" / "list.csv").write_text(text, encoding="utf-8")
    assert listed("sub/list.csv") == expected


def test_absolute_names_in_lists_stay(folder: Path):
    (folder / "list.csv").write_text(f"image\n{folder}/z.png\n")
    assert listed("list.csv") == [f"{folder.as_posix()}/z.png"]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("empty", "empty: holds no pictures; -r searches its subfolders too"),
        ("*.bmp", "*.bmp: matches no picture"),
        ("empty.csv", "empty.csv: lists no pictures"),
    ],
)
def test_what_stands_for_nothing_is_said_and_kept(folder: Path, argument: str, reason: str):
    (folder / "empty").mkdir()
    (folder / "empty.csv").write_text("image\n")
    said: list[str] = []
    assert list(pictures([argument, "z.png"], warn=said.append)) == [argument, "z.png"]
    assert said == [reason]


def test_names_come_one_by_one(folder: Path):
    """The second argument is not looked at before it is its turn."""
    names = pictures(["sub", "later"])
    assert next(names) == os.path.join("sub", "b.png")
    (folder / "later").mkdir()
    (folder / "later" / "new.png").touch()
    assert list(names) == [os.path.join("later", "new.png")]


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_that_are_not_utf8(folder: Path):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "odd").mkdir()
    (folder / "odd" / name).touch()
    (folder / "odd" / "list.csv").write_bytes(b"image\ncaf\xe9.png\n")
    assert listed("odd") == listed("odd/list.csv") == [f"odd/{name}"]
