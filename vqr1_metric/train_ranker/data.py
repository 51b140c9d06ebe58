"""Readers: the authors' JSONL and label files, CSV with a header, pairs with votes, Hugging Face datasets.

Formats, by what is in the file (the suffix ``.jsonl`` decides for JSONL, everything else is a table):

- JSONL of the authors of VisualQuality-R1: ``{"dataset_name", "image": ["a.png"], "conversations": [..., {"from":
  "gpt", "value": 4.63}]}``; one file may hold several data sets.
- their label files, blank-separated: ``image mos``, ``image mos std``, ``reference image mos``, ``reference image mos
  std``.
- a table with a header: a picture and a score column, optionally ``reference`` and ``split``; commas, semicolons, tabs.
- pairs: a header with ``a``, ``b``, ``votes_a`` and ``votes_b``.
- ``hf:NAME`` or ``hf:NAME:SPLIT``, or a folder written by ``datasets.save_to_disk``: an image and a score column.

Scores keep their own units. Higher is better except in the sets named in ``lower_is_better``. A column called ``dmos``
says nothing by itself (that of KADID-10k is higher for better pictures), so such a set must be named in one of the two.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from vqr1_metric.images import SUFFIXES
from vqr1_metric.train_ranker.ratings import DataError, Preference, RatedPicture, RatingSet, _raise, read_file

#: Header names of a column, in order of preference; compared in lower case without blanks, "_" and "-".
COLUMNS = {
    "image": ("image", "imagename", "imgname", "img", "path", "filename", "file", "distimg", "name"),
    "mos": ("mos", "dmos", "score", "rating", "quality", "label"),
    "group": ("reference", "ref", "refimg", "refname", "scene"),
    "split": ("split", "set"),
}
_PAIR_COLUMNS = ("a", "b", "votesa", "votesb")
_SPLITS = {"training": "train", "validation": "val", "valid": "val"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_data(
    sources: Sequence[str | Path],
    images: Sequence[str | Path] = (),
    lower_is_better: Iterable[str] = (),
    higher_is_better: Iterable[str] = (),
) -> list[RatingSet]:
    """All data sets of several files, see :func:`read_sets` and :func:`direct`."""
    return direct(read_sets(sources, images), set(lower_is_better), set(higher_is_better))


def read_sets(sources: Sequence[str | Path], images: Sequence[str | Path] = ()) -> list[RatingSet]:
    """All data sets of several files, the direction of ``dmos`` columns open.

    Args:
        sources: files, ``hf:`` names or ``save_to_disk`` folders. A set is called like its file without suffix, or as
            the file says.
        images: folders in which pictures are looked for, in this order, before the label file's own; a name is a path
            below the folder or, where only one picture fits, a file name anywhere below it.

    Raises:
        DataError: what was expected, what came, in which file and line.
    """
    if not sources:
        raise DataError("Expected at least one file of ratings, but got none.")
    folders = [_Folder(Path(folder)) for folder in images]
    sets: list[RatingSet] = []
    for source in sources:
        text = str(source)
        if text.startswith("hf:") or (Path(text) / "dataset_info.json").is_file():
            sets += [_read_hub(text)]
            continue
        path = Path(text)
        if not path.is_file():
            raise DataError(f"Expected a file of ratings, but {text!r} is none.")
        finder = _Finder([*folders, _Folder(path.parent)])
        lines = _decode(path).splitlines()
        sets += (
            _read_jsonl(path, lines, finder) if path.suffix.lower() == ".jsonl" else [_read_table(path, lines, finder)]
        )
        _raise("Expected pictures that exist, but", finder.problems)
    return sets


def direct(sets: Sequence[RatingSet], lower: set[str], higher: set[str]) -> list[RatingSet]:
    """The sets with the direction of their scores settled.

    Args:
        lower: names of the sets whose scores are better when lower.
        higher: names of the sets whose ``dmos`` is better when higher.

    Raises:
        DataError: a name that is none of a set, or a ``dmos`` of unknown direction.
    """
    unknown = (lower | higher) - {s.name for s in sets}
    if unknown or lower & higher:
        raise DataError(
            f"Expected names of data sets ({', '.join(s.name for s in sets)}) in either lower_is_better or "
            f"higher_is_better, but got {sorted(unknown or lower & higher)[0]!r}."
        )
    for s in sets:
        if s.lower_is_better is None and s.name not in lower | higher:
            raise DataError(
                f"Expected to be told whether the dmos of {s.name!r} ({s.pictures[0].where}) is better when lower or "
                "higher, which differs between data sets: name it in lower_is_better (--dmos) or higher_is_better "
                "(--mos)."
            )
    return [replace(s, lower_is_better=s.name in lower) for s in sets]


class _Folder:
    """A folder of pictures; its tree is walked only if a name is not a path below it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"Expected a folder of pictures, but {str(path)!r} is none.")
        self.path = path

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                found[file.name.lower()].append(file)
        return found


class _Finder:
    """Finds pictures by name and remembers those it did not find."""

    def __init__(self, folders: Sequence[_Folder]) -> None:
        self.folders = folders
        self.problems: list[str] = []

    def find(self, name: str, where: str) -> Path:
        name = name.replace("\\", "/")
        for folder in self.folders:
            if (folder.path / name).is_file():  # an absolute name stays itself
                return folder.path / name
        for folder in self.folders:
            found = folder.by_name.get(Path(name).name.lower(), [])
            if len(found) == 1:
                return found[0]
            if found:
                self.problems.append(f"{where}: {name} could be {found[0]} or {found[1]}")
                return found[0]
        self.problems.append(f"{where}: there is no {name} in {', '.join(str(f.path) for f in self.folders)}")
        return Path(name)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        raise DataError(f"Expected a text file of ratings, but {str(path)!r} holds binary data.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _picture(name: str, where: str, mos: float, finder: _Finder, group: str = "", split: str = "") -> RatedPicture:
    path = finder.find(name, where)
    split = _SPLITS.get(split.lower(), split.lower())
    return RatedPicture(str(path), where, mos, read_file(path), group or str(path), split or None)


def _number(text: str, where: str, what: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise DataError(f"Expected a number as the {what} in {where}, but got {text!r}.")
    return float(text)


def _read_jsonl(path: Path, lines: Sequence[str], finder: _Finder) -> list[RatingSet]:
    sets: dict[str, list[RatedPicture]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            image = row["image"][0] if isinstance(row["image"], list) else row["image"]
            answer = next(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
        except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
            raise DataError(
                'Expected {"dataset_name", "image": [name], "conversations": [..., {"from": "gpt", "value": score}]} '
                f"in {where}, but got {line[:80]!r} ({type(error).__name__}: {error})."
            ) from None
        mos = _number(str(answer), where, "score")
        sets[str(row.get("dataset_name") or path.stem)].append(_picture(str(image), where, mos, finder))
    if not sets:
        raise DataError(f"Expected ratings in {str(path)!r}, but it is empty.")
    return [RatingSet(name, tuple(pictures)) for name, pictures in sets.items()]


def _read_table(path: Path, lines: Sequence[str], finder: _Finder) -> RatingSet:
    rows = []  # (line number, cells)
    delimiter = None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if delimiter is None:
            delimiter = next((d for d in "\t;," if d in line), " ")
        cells = line.split() if delimiter == " " else next(csv.reader(io.StringIO(line), delimiter=delimiter))
        cells = [cell.strip() for cell in cells]
        # With semicolons between columns a comma is a decimal comma.
        rows.append((number, [c.replace(",", ".") if delimiter == ";" and _is_number(c) else c for c in cells]))
    if not rows:
        raise DataError(f"Expected ratings in {str(path)!r}, but it is empty.")
    header = [_key(cell) for cell in rows[0][1]]
    if all(name in header for name in _PAIR_COLUMNS):
        return _read_pairs(path, rows[1:], [header.index(name) for name in _PAIR_COLUMNS], len(header), finder)
    columns = {
        role: next(header.index(name) for name in names if name in header)
        for role, names in COLUMNS.items()
        if any(name in header for name in names)
    }
    if "image" in columns and "mos" in columns:
        return _read_with_header(path, rows[1:], columns, header, finder)
    if any(_is_number(cell) for cell in rows[0][1][1:]):
        return _read_headless(path, rows, finder)
    raise DataError(
        f"Expected in {path}, line {rows[0][0]}, a header with a picture and a score column (image, mos), one with a, "
        f"b, votes_a and votes_b, or a line 'image mos', but got {' '.join(rows[0][1])!r}."
    )


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text.replace(",", ".")))


def _key(cell: str) -> str:
    return re.sub(r"[\s_\-]+", "", cell.lower())


def _read_with_header(path: Path, rows, columns: dict[str, int], header: list[str], finder: _Finder) -> RatingSet:
    pictures = []
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise DataError(f"Expected {len(header)} columns in {where}, but got {len(cells)}.")
        cell = {role: cells[column] for role, column in columns.items()}
        if not cell["image"]:
            raise DataError(f"Expected the name of a picture in {where}, but got none.")
        mos = _number(cell["mos"], where, "score")
        pictures.append(_picture(cell["image"], where, mos, finder, cell.get("group", ""), cell.get("split", "")))
    return RatingSet(path.stem, tuple(pictures), lower_is_better=None if header[columns["mos"]] == "dmos" else False)


def _read_headless(path: Path, rows, finder: _Finder) -> RatingSet:
    pictures, first = [], rows[0][1]
    names = 1 if _is_number(first[1]) else 2
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) != len(first) or len(cells) - names not in (1, 2):
            raise DataError(
                f"Expected 'image mos', 'image mos std', 'reference image mos' or 'reference image mos std', the same "
                f"in every line, but {where} is {' '.join(cells)!r}."
            )
        mos = _number(cells[names], where, "score")
        pictures.append(_picture(cells[names - 1], where, mos, finder, cells[0] if names == 2 else ""))
    return RatingSet(path.stem, tuple(pictures))


def _read_pairs(path: Path, rows, columns: list[int], width: int, finder: _Finder) -> RatingSet:
    pictures: list[RatedPicture] = []
    index: dict[str, int] = {}
    preferences = []
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) != width:
            raise DataError(f"Expected {width} columns in {where}, but got {len(cells)}.")
        a, b, votes_a, votes_b = (cells[column] for column in columns)
        for name in (a, b):
            if name not in index:
                index[name] = len(pictures)
                pictures.append(_picture(name, where, float("nan"), finder))
        won, lost = _number(votes_a, where, "votes for a"), _number(votes_b, where, "votes for b")
        if won < 0 or lost < 0 or won + lost == 0 or a == b:
            raise DataError(f"Expected two pictures and at least one vote in {where}, but got {' '.join(cells)!r}.")
        preferences.append(Preference(index[a], index[b], won / (won + lost), where))
    if not preferences:
        raise DataError(f"Expected pairs in {str(path)!r}, but there are none.")
    return RatingSet(path.stem, tuple(pictures), preferences=tuple(preferences))


def _read_hub(source: str) -> RatingSet:
    """A Hugging Face dataset; the files of its pictures are read as they are, when they are needed."""
    try:
        import datasets
    except ImportError:
        raise DataError("Expected the datasets library for this source: pip install 'vqr1-metric[train]'.") from None
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        data = datasets.load_dataset(name, split=split or "train")
    else:
        name, data = source, datasets.load_from_disk(source)
    if not isinstance(data, datasets.Dataset):
        raise DataError(f"Expected one split of {source!r}, but got several ({', '.join(data)}): write hf:NAME:SPLIT.")
    image = next((column for column, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    keys = {_key(column): column for column in data.column_names}
    found = {role: next((keys[n] for n in names if n in keys), None) for role, names in COLUMNS.items()}
    if image is None or found["mos"] is None:
        raise DataError(
            f"Expected an image column and a score column (mos) in {source!r}, but got {', '.join(data.column_names)}."
        )
    data = data.cast_column(image, datasets.Image(decode=False))
    labels = data.select_columns([c for c in {found["mos"], found["group"], found["split"]} if c])
    short, pictures = Path(name).name, []
    for row, cells in enumerate(labels):
        where = f"{source}, row {row}"
        group = str(cells[found["group"]]) if found["group"] else f"{short}#{row}"
        split = str(cells[found["split"]]).lower() if found["split"] else ""
        mos = _number(str(cells[found["mos"]]), where, "score")
        read = _row_reader(data, row, image)
        pictures.append(RatedPicture(f"{short}#{row}", where, mos, read, group, _SPLITS.get(split, split) or None))
    return RatingSet(short, tuple(pictures), lower_is_better=None if _key(found["mos"]) == "dmos" else False)


def _row_reader(data, row: int, column: str):
    def read() -> bytes:
        cell = data[row][column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return read
