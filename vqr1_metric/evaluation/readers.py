"""Label files as people write them: CSV with a header, the blank-separated files of the VisualQuality-R1 authors, XLSX.

Separators (comma, semicolon, tab, vertical bar, blanks), decimal commas, byte order marks and encodings are recognised.
"""

from __future__ import annotations

import csv
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from vqr1_metric.evaluation.labels import Item, LabelError, LabelSet, Problem, without_duplicates
from vqr1_metric.images import SUFFIXES

#: Header names of a column, in order of preference; compared in lower case without blanks, "_" and "-".
COLUMNS = {
    "image": ("image", "imagename", "imgname", "img", "path", "name", "filename", "file", "distimg", "images"),
    "mos": ("mos", "dmos", "score", "mosquality", "rating", "label", "quality"),
    "std": ("std", "sd", "mosstd", "stdquality", "sigma"),
    "scene": ("scene", "refimg", "ref", "reference", "content"),
    "method": ("method", "model", "distortion"),
    "split": ("split", "set", "subsetname"),
}
_SPLITS = {"training": "train", "train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")


def read_labels(
    path: str | Path, *, name: str | None = None, lower_is_better: bool | None = None, delimiter: str | None = None
) -> LabelSet:
    """Labels of a file, pictures not looked for yet.

    Args:
        path: ``.csv``, ``.tsv`` or ``.txt`` with a header that names at least the picture and the score; a file
            without header whose lines are ``image mos``, ``image mos std``, ``reference image mos`` or ``reference
            image mos std`` (any separator), as the authors of VisualQuality-R1 publish them; ``.xlsx``, first sheet.
        name: what tables call it; the file's stem by default.
        lower_is_better: None takes a column called ``dmos`` for "lower is better" and everything else for "higher".
        delimiter: None recognises it.

    Raises:
        LabelError: a file without a usable row.
    """
    path = Path(path)
    rows, decimal_comma = read_table(path, delimiter)
    if not rows:
        raise LabelError(f"Expected labels in {str(path)!r}, but it is empty.")
    header = _header(rows[0])
    if header is None:
        items, problems = _headless(rows, decimal_comma)
    else:
        items, problems = _with_header(rows, header, decimal_comma)
        if lower_is_better is None:
            lower_is_better = _key(rows[0][header["mos"]]) == "dmos"
    items, duplicates = without_duplicates(items)
    problems = [*problems, *duplicates]
    if not items:
        why = f" ({problems[0].subject}: {problems[0].detail})" if problems else ""
        raise LabelError(
            f"Expected rows with a picture and a score in {str(path)!r}, but found none{why}. A header names the "
            "columns image and mos; without header a line is: image mos [std], or: reference image mos [std]."
        )
    return LabelSet(name or path.stem, tuple(items), bool(lower_is_better), problems=tuple(problems), sources=(path,))


def read_table(path: Path, delimiter: str | None = None) -> tuple[list[list[str]], bool]:
    """The cells of a text table or of the first sheet of an XLSX file, and whether numbers have a decimal comma."""
    if not path.is_file():
        raise LabelError(f"Expected a file, but {str(path)!r} is none.")
    if path.suffix.lower() == ".xlsx":
        return _read_xlsx(path), False
    text = decode(path.read_bytes(), path)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    try:
        delimiter = delimiter or _delimiter(lines)
        cells = (line.split() for line in lines) if delimiter == " " else csv.reader(lines, delimiter=delimiter)
        rows = [[cell.strip() for cell in row] for row in cells]
    except csv.Error as error:
        raise LabelError(f"Expected a table in {str(path)!r}, but it cannot be read as one ({error}).") from None
    return [row for row in rows if any(row)], delimiter != ","


def decode(data: bytes, path: Path) -> str:
    """Text of a file: UTF-8 or UTF-16 by its byte order mark, else UTF-8, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    if b"\0" in data[:4096]:
        raise LabelError(f"Expected a text file or .xlsx, but {str(path)!r} holds binary data.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def parse_number(text: str, decimal_comma: bool = False) -> float:
    """A finite number, or NaN for anything else."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or ("," in text and not decimal_comma):
        return math.nan
    number = float(text.replace(",", "."))
    return number if math.isfinite(number) else math.nan


def find_column(header: Sequence[str], role: str) -> int | None:
    """The column of a header that plays a role of ``COLUMNS``, None if there is none."""
    keys = [_key(cell) for cell in header]
    return next((keys.index(name) for name in COLUMNS[role] if name in keys), None)


def split_name(text: str) -> str | None:
    """``train``, ``val`` or ``test`` for the words in use; another word as it is; None for an empty one."""
    return _SPLITS.get(text.strip().lower(), text.strip() or None)


def _key(cell: str) -> str:
    return re.sub(r"[\s_\-]+", "", cell.lower())


def _header(row: list[str]) -> dict[str, int] | None:
    columns = {role: column for role in COLUMNS if (column := find_column(row, role)) is not None}
    return columns if "image" in columns and "mos" in columns else None


def _delimiter(lines: list[str]) -> str:
    """The separator that cuts most of the first lines into the same number of cells, more than one; else blanks."""
    sample = lines[:50]
    best, best_share = " ", 0.5
    for candidate in ("\t", ";", "|", ","):
        counts = [len(row) for row in csv.reader(sample, delimiter=candidate)]  # a separator in quotes is none
        usual = max(set(counts), key=counts.count) if counts else 1
        share = counts.count(usual) / len(counts) if usual > 1 else 0.0
        if share > best_share:
            best, best_share = candidate, share
    # "a.png 3,5" has a decimal comma and is separated by blanks.
    if best == "," and all(re.search(r"\s-?\d+,\d+\s*$", line) for line in sample):
        return " "
    return best


def _with_header(rows, header: dict[str, int], decimal_comma: bool) -> tuple[list[Item], list[Problem]]:
    items, problems = [], []
    for number, row in enumerate(rows[1:], 2):
        cells = {role: row[column].strip() if column < len(row) else "" for role, column in header.items()}
        mos = parse_number(cells["mos"], decimal_comma)
        if not cells["image"] or math.isnan(mos):
            problems.append(Problem("bad row", cells["image"] or f"row {number}", _complaint(cells)))
            continue
        std = parse_number(cells.get("std", ""), decimal_comma)
        split = split_name(cells.get("split", ""))
        scene, method = cells.get("scene") or None, cells.get("method") or None
        items.append(Item(cells["image"], mos, std, scene, method, split))
    return items, problems


def _complaint(cells: dict[str, str]) -> str:
    if not cells["image"]:
        return "names no picture: left out"
    return f"the score {cells['mos']!r} is not a number: left out" if cells["mos"] else "has no score: left out"


def _headless(rows: list[list[str]], decimal_comma: bool) -> tuple[list[Item], list[Problem]]:
    items, problems = [], []
    for number, row in enumerate(rows, 1):
        numbers: list[float] = []
        names = [cell for cell in row if cell]
        while len(names) > 1 and len(numbers) < 2 and not math.isnan(value := parse_number(names[-1], decimal_comma)):
            numbers.insert(0, value)
            names.pop()
        if not numbers:
            what = f"the score {row[-1]!r} is not a number: left out" if len(row) > 1 else "has no score: left out"
            problems.append(Problem("bad row", names[0] if len(row) > 1 else f"row {number}", what))
            continue
        scene, image = _reference_and_image(names)
        items.append(Item(image, numbers[0], numbers[1] if len(numbers) == 2 else math.nan, scene))
    return items, problems


def _reference_and_image(names: list[str]) -> tuple[str | None, str]:
    """Two names are reference and image; a name with blanks was cut to pieces, only the last of which has a suffix."""
    ends = [i for i, name in enumerate(names) if Path(name).suffix.lower() in SUFFIXES]
    if len(ends) == 2 and ends[1] == len(names) - 1:
        return " ".join(names[: ends[0] + 1]), " ".join(names[ends[0] + 1 :])
    if len(names) == 2 and not ends:
        return names[0], names[1]
    return None, " ".join(names)


_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def _read_xlsx(path: Path) -> list[list[str]]:
    """The first sheet. SPAQ publishes its scores so; a spreadsheet library for that alone would be a dependency."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            shared: list[str] = []
            if "xl/sharedStrings.xml" in names:
                root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
                shared = ["".join(t.text or "" for t in entry.iter(f"{_SHEET}t")) for entry in root]
            sheets = sorted((n for n in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n)), key=_sheet_number)
            sheet = ElementTree.fromstring(archive.read(sheets[0]))
    except (zipfile.BadZipFile, ElementTree.ParseError, IndexError, KeyError) as error:
        raise LabelError(f"Expected an XLSX file, but {str(path)!r} is not one ({error}).") from None
    rows = []
    for row in sheet.iter(f"{_SHEET}row"):
        cells: list[str] = []
        for cell in row.iter(f"{_SHEET}c"):
            column = _column_number(cell.get("r", "")) or len(cells) + 1
            cells += [""] * (column - len(cells))
            cells[column - 1] = _cell_text(cell, shared).strip()
        if any(cells):
            rows.append(cells)
    return rows


def _sheet_number(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def _column_number(reference: str) -> int:
    number = 0
    for letter in re.match(r"[A-Z]*", reference).group():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _cell_text(cell, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(t.text or "" for t in cell.iter(f"{_SHEET}t"))
    value = cell.findtext(f"{_SHEET}v") or ""
    return shared[int(value)] if cell.get("t") == "s" and value else value
