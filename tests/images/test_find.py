"""What the arguments stand for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqr1_metric.images.find import ImageFinder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("z.png", "a.JPG", "m.webp", "notes.txt", ".hidden.png", "sub/b.png", "sub/deep/c.tif", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*arguments: str, **options) -> list[str]:
    return [found.name.replace(os.sep, "/") for found in ImageFinder(arguments, **options)]


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
        ("empty", "holds no images; -r searches its subfolders too"),
        ("*.bmp", "matches no image"),
        ("empty.csv", "lists no images"),
        ("https://example.org/a.png", "is an address; --urls fetches https:// addresses"),
    ],
)
def test_what_stands_for_nothing_is_a_problem(folder: Path, argument: str, reason: str):
    (folder / "empty").mkdir()
    (folder / "empty.csv").write_text("image\n")
    finder = ImageFinder([argument, "z.png"])
    assert [(found.name, found.problem) for found in finder] == [(argument, reason), ("z.png", None)]
    assert (finder.counts.taken, finder.counts.refused) == (1, 1)


def test_names_come_one_by_one(folder: Path):
    """The second argument is not looked at before it is its turn."""
    names = iter(ImageFinder(["sub", "later"]))
    assert next(names).name == os.path.join("sub", "b.png")
    (folder / "later").mkdir()
    (folder / "later" / "new.png").touch()
    assert [found.name for found in names] == [os.path.join("later", "new.png")]


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_that_are_not_utf8(folder: Path):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "odd").mkdir()
    (folder / "odd" / name).touch()
    (folder / "odd" / "list.csv").write_bytes(b"image\ncaf\xe9.png\n")
    assert listed("odd") == listed("odd/list.csv") == [f"odd/{name}"]


SUFFIXES = ["jpg", "jpeg", "jfif", "jpe", "png", "apng", "gif", "bmp", "dib", "tif", "tiff", "webp", "ppm", "pgm"]
SUFFIXES += ["pbm", "pnm", "jp2", "j2k", "jpx", "ico", "mpo", "avif"]


def test_every_suffix_of_an_image_is_taken_and_the_rest_is_counted(tmp_path: Path):
    for suffix in [*SUFFIXES, "HEIC", "jxl", "cr2", "txt", "pdf"]:
        (tmp_path / f"a.{suffix}").touch()
    for name in ("Makefile", ".DS_Store", "b.txt"):
        (tmp_path / name).touch()
    passed: list[tuple[str, str]] = []
    finder = ImageFinder([tmp_path], note=lambda name, reason: passed.append((Path(name).name, reason)))
    taken = {Path(found.name).suffix[1:] for found in finder}
    assert taken == {*SUFFIXES, "HEIC", "jxl", "cr2"}
    assert finder.counts.taken == len(taken)
    assert finder.counts.skipped == {
        "not images by their suffix (.txt)": 2,
        "not images by their suffix (.pdf)": 1,
        "without a suffix": 1,
        "hidden": 1,
    }
    assert ("Makefile", "without a suffix") in passed and len(passed) == 5
    summary = finder.counts.summary()
    assert summary.startswith(f"images taken: {len(taken)}; passed over: 2 not images by their suffix (.txt), ")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("arguments", [[".", "-r"], ["**/*.png"], ["**"]])
def test_linked_folders_are_entered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]):
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("tree/a.png", "tree/deep/b.png", "elsewhere/c.png"):
        (tmp_path / name).touch()
    for i in range(12):  # each a way round, and through each other
        (tmp_path / "tree" / "deep" / f"loop{i}").symlink_to(tmp_path / "tree", target_is_directory=True)
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "tree" / "self").symlink_to("self")
    monkeypatch.chdir(tmp_path / "tree")
    found = listed(arguments[0], recursive="-r" in arguments)
    assert sorted(Path(name).name for name in found) == ["a.png", "b.png", "c.png"]


def test_one_file_by_many_names_is_taken_once(folder: Path):
    (folder / "link").symlink_to(folder / "sub", target_is_directory=True)
    (folder / "y.png").symlink_to("z.png")
    finder = ImageFinder(["sub/b.png", "./sub//b.png", f"{folder}/sub/b.png", "link/b.png", "sub/../sub/b.png"])
    assert [found.name for found in finder] == ["sub/b.png"]
    assert finder.counts.repeated == 4
    assert listed("z.png", "y.png") == ["z.png", "y.png"]  # a link to a file is a name that somebody gave


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is readable")
def test_a_folder_that_cannot_be_read_is_a_problem_and_the_rest_goes_on(folder: Path):
    closed = folder / "sub" / "closed"
    closed.mkdir(mode=0)
    try:
        found = list(ImageFinder(["."], recursive=True))
    finally:
        closed.chmod(0o700)
    assert [one.name for one in found if one.problem] == ["./sub/closed"]
    assert next(one for one in found if one.problem).problem == "cannot be read (Permission denied)"
    assert "./sub/deep/c.tif" in [one.name for one in found]


def test_a_folder_that_vanishes_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    def gone(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    found = list(ImageFinder(["."], recursive=True))
    assert [(one.name, one.problem) for one in found][-1] == ("./sub/deep", "cannot be read (Permission denied)")
    assert len(found) == 5


# ---------------------------------------------------------------- lists


def test_lines_are_names_whatever_they_hold(folder: Path):
    names = [
        "#1.jpg",
        " blank.png ",
        "a,b.png",
        "tab\there.png",
        "form\x0bfeed.png",
        "nel\x85.png",
        "line\u2028.png",
        '"q".png',
    ]
    (folder / "list.txt").write_text("\n".join(names) + "\r\n\n", encoding="utf-8", newline="")
    assert listed("list.txt") == names
    assert listed(files_from=["list.txt"]) == names
    (folder / "sub" / "zero").write_bytes("\0".join(["new\nline.png", *names]).encode() + b"\0")
    assert listed(files_from=["sub/zero"], null=True) == ["new\nline.png", *names]  # from here, as tar -T


def test_a_list_of_one_column_may_hold_separators(folder: Path):
    (folder / "list.csv").write_text("image\na,b.png\nc;d.png\n#e.png\n")
    assert listed("list.csv") == ["a,b.png", "c;d.png", "#e.png"]


@pytest.mark.parametrize("column", ["filename", "file_name", "Image_Path", "img"])
def test_the_column_of_names_may_be_called_otherwise(folder: Path, column: str):
    (folder / "list.csv").write_text(f"id,{column},mos\n7,z.png,3\n")
    assert listed("list.csv") == ["z.png"]


def test_json_lines_and_utf16(folder: Path):
    (folder / "list.jsonl").write_text('{"mos": 3, "image": "z.png"}\n"m.webp"\n\n{"path": "#x.png"}\n')
    assert listed("list.jsonl") == ["z.png", "m.webp", "#x.png"]
    (folder / "list.jsonl").write_text('"z.png"\n{"mos": 3}\n')
    found = list(ImageFinder(["list.jsonl"]))
    assert found[0].problem is None and "line 2 holds no name" in found[1].problem
    (folder / "excel.csv").write_text("image\tmos\nz.png\t3\n", encoding="utf-16")
    assert listed("excel.csv") == ["z.png"]


def test_standard_input(folder: Path):
    code = (
        "from vqr1_metric.images.find import ImageFinder\n"
        "finder = ImageFinder(['-'], null=True)\n"
        "print(finder.reads_input, [found.name for found in finder])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"a\nb.png\0#c.png\0", capture_output=True, check=True)
    assert done.stdout.decode().strip() == r"True ['a\nb.png', '#c.png']"


def test_addresses(folder: Path):
    found = list(ImageFinder(["https://example.org/a.png", "http://example.org/b.png"], urls=True))
    assert [(one.name, one.problem) for one in found] == [
        ("https://example.org/a.png", None),
        ("http://example.org/b.png", "is not fetched: only https:// addresses are"),
    ]
