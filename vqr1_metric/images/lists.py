"""Lists of images: one name a line, a table, or JSON lines."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from vqr1_metric.images.names import unescape_name

#: What the column of names may be called, the first that is there counts.
NAME_COLUMNS = (
    "image", "path", "image_path", "img_path", "file_name", "filename", "file", "image_name", "img", "name", "url",
)  # fmt: skip
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")


class ListError(ValueError):
    """A list that cannot be read; the message says where."""


def read_list(path: str, *, kind: str | None = None, null: bool = False) -> Iterator[str]:
    """The names in a file, as they stand there, one after the other.

    Args:
        path: ``-`` is standard input.
        kind: ``.txt`` (one name a line; every character counts, ``#`` too), ``.csv`` or ``.tsv`` (the column that is
            called ``image``, ``path`` or the like, else the first), ``.jsonl`` (texts, or objects with such a key); by
            default what the suffix says, and ``.txt`` for any other.
        null: names end with a NUL instead of a line break, as ``find -print0`` writes them.

    Raises:
        ListError: for a list that cannot be opened or read, with the line.
    """
    suffix = os.path.splitext(path)[1].lower()
    kind = kind or (suffix if suffix in SUFFIXES else ".txt")
    try:
        with open(0, "rb", closefd=False) if path == "-" else open(path, "rb") as file:
            if null:
                yield from _names(_pieces(file, b"\0"))
            elif kind == ".txt":
                yield from _names(line.removesuffix(b"\r") for line in _pieces(file, b"\n"))
            elif kind == ".jsonl":
                yield from _json_names(_pieces(file, b"\n"))
            else:
                yield from _table_names(file, os.path.dirname(path))
    except OSError as error:
        raise ListError(f"cannot be read ({error.strerror or error})") from None


def _pieces(file: BinaryIO, end: bytes) -> Iterator[bytes]:
    """The file cut at ``end`` and nothing else; the first piece without a byte order mark."""
    rest = file.read(3).removeprefix(b"\xef\xbb\xbf")
    while True:
        *whole, rest = rest.split(end)
        yield from whole
        more = file.read1(1 << 16) if hasattr(file, "read1") else file.read(1 << 16)
        if not more:
            break
        rest += more
    yield rest


def _names(lines: Iterable[bytes]) -> Iterator[str]:
    return (os.fsdecode(line) for line in lines if line)


def _json_names(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise ListError(f"line {number} is not JSON") from None
        if isinstance(entry, dict):
            key = next((key for key in NAME_COLUMNS if isinstance(entry.get(key), str)), None)
            # What `vqr1 score` wrote holds escaped names.
            entry = None if key is None else unescape_name(entry[key]) if "tag_probability" in entry else entry[key]
        if not isinstance(entry, str):
            raise ListError(f"line {number} holds no name; expected a text, or an object with {NAME_COLUMNS[0]!r}")
        yield entry


def _table_names(file: BinaryIO, folder: str) -> Iterator[str]:
    start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    # Standard input cannot be read twice, so what was looked at is put in front again.
    text = io.TextIOWrapper(io.BufferedReader(_Joined(start, file)), encoding, errors="surrogateescape", newline="")
    first_line = text.readline()
    delimiter = max(",;\t", key=first_line.count)
    rows = csv.reader(itertools.chain([first_line], text), delimiter=delimiter)
    try:
        header = next(rows, [])
        names = [cell.strip().lower() for cell in header]
        column = next((names.index(name) for name in NAME_COLUMNS if name in names), None)
        ours = "tag_probability" in names
        if column is None:
            column = 0
            if not _could_be_image(header[0] if header else "", folder):
                header = header if len(header) == 1 else ["", ""]
            else:
                yield from _cell(header, 0, None, False)
        single = delimiter if len(header) == 1 else None
        for row in rows:
            yield from _cell(row, column, single, ours)
    except (csv.Error, UnicodeError) as error:
        raise ListError(f"line {rows.line_num} cannot be read ({error})") from None


def _cell(row: list[str], column: int, single: str | None, ours: bool) -> list[str]:
    """The name in a row; with one column only, a separator in it is a part of the name."""
    name = single.join(row) if single and row else row[column] if len(row) > column else ""
    if ours:
        name = unescape_name(name[1:] if name.startswith("'") else name)
    return [name] if name.strip() else []


def _could_be_image(name: str, folder: str) -> bool:
    from vqr1_metric.images.find import is_image_name

    return is_image_name(name) or os.path.exists(os.path.join(folder, name))


class _Joined(io.RawIOBase):
    """Some bytes, then a file."""

    def __init__(self, start: bytes, file: BinaryIO) -> None:
        self._start, self._file = start, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._start:
            self._start = self._file.read(len(buffer))
        size = min(len(buffer), len(self._start))
        buffer[:size], self._start = self._start[:size], self._start[size:]
        return size
