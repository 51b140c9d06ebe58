"""From the arguments of a command to the names of pictures, one after the other."""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Callable, Iterator, Sequence

_COLUMNS = ("image", "path")
_MAGIC = frozenset("*?[")

HELP = "pictures, folders, patterns such as 'photos/*.jpg', or lists (.csv with a column image or path)"


def pictures(
    arguments: Sequence[str], recursive: bool = False, warn: Callable[[str], object] = lambda message: None
) -> Iterator[str]:
    """The pictures that arguments stand for, in the order of the arguments.

    A folder stands for its files with a picture's suffix, sorted, hidden ones left out; with ``recursive`` for those of
    its subfolders too. A pattern is matched here where the shell did not (``**`` reaches into subfolders). A ``.csv``
    file is a list: its column ``image`` or ``path``, else its first; names in it are relative to the list. An argument
    that stands for nothing is given back as it is, so that its row says so.
    """
    for argument in arguments:
        nothing = True
        for name in _expand(argument, recursive):
            nothing = False
            yield name
        if nothing:
            warn(f"{argument}: {_why_nothing(argument, recursive)}")
            yield argument


def _expand(argument: str, recursive: bool) -> Iterator[str]:
    if os.path.isdir(argument):
        yield from _from_folder(argument, recursive)
    elif os.path.exists(argument):
        yield from _from_list(argument) if argument.lower().endswith(".csv") else [argument]
    elif _MAGIC & set(argument):
        yield from sorted(name for name in glob.iglob(argument, recursive=True) if _is_picture(name))
    else:
        yield argument


def _why_nothing(argument: str, recursive: bool) -> str:
    if os.path.isdir(argument):
        return "holds no pictures" + ("" if recursive else "; -r searches its subfolders too")
    return "lists no pictures" if os.path.exists(argument) else "matches no picture"


def _is_picture(name: str) -> bool:
    from vqr1_metric.images import SUFFIXES

    return os.path.splitext(name)[1].lower() in SUFFIXES


def _from_folder(folder: str, recursive: bool) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _is_picture(name):
                yield os.path.join(parent, name)


def _from_list(path: str) -> Iterator[str]:
    folder = os.path.dirname(path)
    # Bytes that are not UTF-8 survive as the file system's own escapes.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first_line = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter=max(",;\t", key=first_line.count))
        column = None
        for row in rows:
            if column is None:
                names = [cell.strip().lower() for cell in row]
                column = next((names.index(name) for name in _COLUMNS if name in names), 0)
                is_header = names and names[column] in _COLUMNS
                if is_header or (row and not _is_picture(row[0]) and not os.path.exists(os.path.join(folder, row[0]))):
                    continue
            if len(row) > column and row[column].strip():
                yield os.path.join(folder, row[column])
