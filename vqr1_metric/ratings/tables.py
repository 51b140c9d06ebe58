"""The cells of a label file: text tables with any separator and encoding, XLSX, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vqr1_metric.protocol import answer_text
from vqr1_metric.ratings.sets import RatingError

_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """Cells of a file.

    Args:
        rows: ``(line number, cells)``, the header among them where there is one.
        decimal_comma: a comma in a number is a decimal comma.
        named: the first row is a header for certain (JSON objects have keys).
        broken: ``(line number, what is wrong)`` of lines that hold no cells at all.
    """

    rows: list[tuple[int, list[str]]]
    decimal_comma: bool = False
    named: bool = False
    broken: tuple[tuple[int, str], ...] = ()

    def number(self, text: str) -> float:
        """A finite number, or NaN for anything else."""
        return parse_number(text, self.decimal_comma)


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """The cells of a file, by its suffix: ``.xlsx`` (first sheet), ``.json``, ``.jsonl``, anything else is text.

    Args:
        path: the file.
        delimiter: of a text table; None recognises comma, semicolon, tab, vertical bar and blanks.

    Raises:
        RatingError: no file, or one that cannot be read as a table.
    """
    if not path.is_file():
        raise RatingError(f"Expected a file of ratings, but {str(path)!r} is none.")
    suffix = path.suffix.lower()
    if suffix == ".xlsx":
        return Table(_read_xlsx(path))
    text = decode(path.read_bytes(), path)
    if suffix in (".jsonl", ".json"):
        return _read_json(path, text, lines=suffix == ".jsonl")
    try:
        return _read_text(text, delimiter)
    except csv.Error as error:
        raise RatingError(f"Expected a table in {str(path)!r}, but it cannot be read as one ({error}).") from None


def decode(data: bytes, path: Path) -> str:
    """Text of a file: UTF-8 or UTF-16 by its byte order mark, else UTF-8, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\0" in data[:4096]:
        raise RatingError(f"Expected a text file or .xlsx, but {str(path)!r} holds binary data.")
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


def _read_text(text: str, delimiter: str | None) -> Table:
    # Only these end a line: a name may hold the other line breaks of Unicode.
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip() and not _is_comment(line)]
    delimiter = delimiter or find_delimiter(lines)
    rows: list[tuple[int, list[str]]] = []
    if delimiter == " ":
        rows = [(number, line.split()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    rows = [(number, cells) for number, cells in rows if any(cells) and not _is_comment(" ".join(cells), len(cells))]
    return Table(rows, decimal_comma=delimiter != ",")


def _is_comment(line: str, cells: int = 1) -> bool:
    """``# a note``, and ``#note`` where it is not a row of several cells, as a picture may be called ``#1.jpg``."""
    line = line.lstrip()
    return line.startswith("#") and (
        line[1:2] in ("", " ", "\t", "#") or (cells == 1 and not re.search(r"[,;|\t ]", line))
    )


def find_delimiter(lines: Sequence[str]) -> str:
    """The separator that cuts most of the first lines into the same number of cells, more than one; else blanks."""
    sample = list(lines[:50])
    best, best_share = " ", 0.5
    for candidate in ("\t", ";", "|", ","):
        counts = [len(row) for row in csv.reader(sample, delimiter=candidate)]  # a separator in quotes is none
        usual = max(set(counts), key=counts.count) if counts else 1
        share = counts.count(usual) / len(counts) if counts else 0.0
        if usual > 1 and share > best_share:
            best, best_share = candidate, share
    # "a.png 3,5" has a decimal comma and is separated by blanks.
    if best == "," and all(re.search(r"\s-?\d+,\d+\s*$", line) for line in sample):
        return " "
    return best


def _read_json(path: Path, text: str, *, lines: bool) -> Table:
    """Objects as rows under the union of their keys."""
    found: list[tuple[int, dict[str, str]]] = []
    broken: list[tuple[int, str]] = []
    for number, row in _json_lines(text) if lines else _json_list(path, text):
        if isinstance(row, dict):
            found.append((number, flat_json(row)))
        else:
            broken.append((number, f"is not a JSON object: {str(row)[:80]!r}: left out"))
    header = list(dict.fromkeys(key for _, cells in found for key in cells))
    rows = [(number, [cells.get(key, "") for key in header]) for number, cells in found]
    if broken and not rows:
        raise RatingError(f"Expected JSON objects in {str(path)!r}, but line {broken[0][0]} {broken[0][1]}.")
    return Table([(0, header), *rows] if rows else [], named=True, broken=tuple(broken))


def _json_lines(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, line


def _json_list(path: Path, text: str) -> Iterator[tuple[int, object]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RatingError(f"Expected JSON in {str(path)!r}, but it cannot be read ({error}).") from None
    if not isinstance(whole, list):
        raise RatingError(f"Expected a list of objects in {str(path)!r}, but got a JSON {type(whole).__name__}.")
    yield from enumerate(whole, 1)


def flat_json(row: Mapping[str, Any]) -> dict[str, str]:
    """An object as cells: chats become image, mos and question; lists of one are their entry.

    Known chats: ``conversations`` with ``from`` and ``value`` (LLaVA, the authors of VisualQuality-R1, VLM-R1) and
    ``messages`` with ``role`` and ``content`` (ms-swift, LLaMA-Factory, OpenAI); a score may stand in answer tags.
    """
    cells = {str(key): _text(value) for key, value in row.items() if key not in ("conversations", "messages")}
    pictures = row.get("images") or row.get("image")
    turns = row.get("conversations") or row.get("messages")
    rated = any(key.lower() in ("mos", "score") for key in cells)  # then a reply may be about something else
    if isinstance(turns, list):
        for turn in turns:
            if not isinstance(turn, dict):
                continue
            content, role = turn.get("value", turn.get("content")), turn.get("from", turn.get("role"))
            if isinstance(content, list):
                parts = [part for part in content if isinstance(part, dict)]
                pictures = pictures or [p.get("image") or p.get("image_url") for p in parts if "text" not in p]
                content = " ".join(str(part["text"]) for part in parts if "text" in part)
            if role in ("human", "user"):
                cells["question"] = str(content).replace("<image>", "").strip()
            elif role in ("gpt", "assistant") and not rated:
                cells["mos"] = _text(content)
    if pictures is not None:
        cells.pop("images", None)
        cells["image"] = _text(pictures)
    answer = next((name for name in ("mos", "solution", "answer", "output") if cells.get(name)), None)
    if answer is not None and not rated:
        cells["mos"] = cells[answer]
    if "mos" in cells:
        inside = answer_text(cells["mos"])
        cells["mos"] = cells["mos"] if inside is None else inside.strip()
    return cells


def _text(value: object) -> str:
    """A JSON value as a cell; a list of one is its entry, of a picture's object its path counts."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "image", "url", "value", "content") if value.get(key)), None)
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def _read_xlsx(path: Path) -> list[tuple[int, list[str]]]:
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
        rows = []
        for number, row in enumerate(sheet.iter(f"{_SHEET}row"), 1):
            cells: list[str] = []
            for cell in row.iter(f"{_SHEET}c"):
                column = min(_column_number(cell.get("r", "")), 16_384) or len(cells) + 1
                cells += [""] * (column - len(cells))
                cells[column - 1] = _cell_text(cell, shared).strip()
            if any(cells):
                rows.append((int(row.get("r") or number), cells))
    except (zipfile.BadZipFile, ElementTree.ParseError, IndexError, KeyError, ValueError) as error:
        raise RatingError(f"Expected an XLSX file, but {str(path)!r} is not one ({error}).") from None
    return rows


def _sheet_number(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def _column_number(reference: str) -> int:
    number = 0
    for letter in reference:
        if not "A" <= letter <= "Z":
            break
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _cell_text(cell: ElementTree.Element, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(t.text or "" for t in cell.iter(f"{_SHEET}t"))
    value = cell.findtext(f"{_SHEET}v") or ""
    return shared[int(value)] if cell.get("t") == "s" and value else value
