"""Score files: CSV or JSON lines, one line for each picture, that survive being killed at any moment.

Beside ``scores.csv`` lies ``scores.csv.meta.json``, written first, with what the scores were made with. A row is one
write of one line, so a kill leaves whole lines behind and at most one piece of a line, which :func:`repair` cuts off.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric import file_locks
from vqr1_metric.images.names import escape_name, is_url, unescape_name

if TYPE_CHECKING:
    from vqr1_metric.results import ImageScore

#: Columns of the CSV; ``low`` and ``high`` hold 95% of the distribution. JSON lines have these keys, then
#: ``probabilities`` (of the 401 scores 1.00, 1.01, ... 5.00) and ``replies``.
COLUMNS = ("path", "score", "std", "coverage", "error", "low", "high", "tag_probability")
SUFFIXES = (".csv", ".jsonl")

_FORMULA_STARTS = ("=", "+", "-", "@", "'")


class RecordError(ValueError):
    """A score file that cannot be read or continued; the message says why and what to do."""


def as_row(result: ImageScore) -> dict[str, Any]:
    """A result as a row: a value for each of ``COLUMNS``, NaN where there is none."""
    low, high = result.interval()
    reason = "" if result.error is None else result.error.removeprefix(f"{result.name}: ")
    return {
        "path": result.name,
        "score": result.score,
        "std": result.std,
        "coverage": result.coverage,
        "error": reason,
        "low": low,
        "high": high,
        "tag_probability": result.tag_probability,
        **getattr(result, "columns", {}),
    }


def as_json(result: ImageScore, *, details: bool = True) -> dict[str, Any]:
    """A result as JSON: None for NaN; with ``details`` the whole distribution and the sampled replies."""
    row: dict[str, Any] = as_row(result)
    row = {key: _json_number(value) if isinstance(value, float) else value for key, value in row.items()}
    row |= {"path": escape_name(row["path"]), "error": _text(row["error"])}
    if details:
        known = result.error is None
        probabilities = result.distribution.probabilities.tolist()
        row["probabilities"] = [float(f"{p:.6g}") for p in probabilities] if known else None
        row["replies"] = [
            {
                "score": _json_number(r.score),
                "reason": None if r.reason is None else _text(r.reason),
                "reasoning": _text(r.reasoning),
            }
            for r in result.replies
        ]
        row |= getattr(result, "details", {})
    return row


def _text(text: str) -> str:
    """Text that UTF-8 can hold; JSON keeps line breaks itself."""
    return text.encode("utf-8", "backslashreplace").decode()


def cell(text: str) -> str:
    """Text as it is safe in one CSV cell on one line; :func:`uncell` gives it back.

    Line breaks, other controls and bytes of a file name that are not UTF-8 are escaped
    (:func:`~vqr1_metric.images.names.escape_name`). A text that a spreadsheet would run as a formula (it begins with
    ``=``, ``+``, ``-`` or ``@``), or that begins with ``'``, gets a ``'`` in front.
    """
    text = escape_name(text)
    return "'" + text if text.startswith(_FORMULA_STARTS) else text


def uncell(text: str) -> str:
    """The text that :func:`cell` wrote."""
    return unescape_name(text.removeprefix("'"))


class RecordWriter:
    """The one writer of a score file: locked until it is closed, each row a single unbuffered write.

    Args:
        path: ends in ``.csv`` or ``.jsonl``; created where it is missing, and removed again if nothing was written.
        overwrite: drop what is there, at the first row.
        extra: columns of a CSV behind the usual ones, for results that have more to say.

    Raises:
        RecordError: if another run writes this file.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, extra: Sequence[str] = ()) -> None:
        self._columns = (*COLUMNS, *extra)
        self.path, self.is_csv = path, file_format(path) == ".csv"
        self._file = open_locked(path)
        self._overwrite = overwrite
        #: Where relative names of the file start, if not in the current folder.
        self.folder: str | None = None

    @property
    def empty(self) -> bool:
        """Has the file no row that is to be kept?"""
        return self._overwrite or os.fstat(self._file.fileno()).st_size == 0

    def write(self, result: ImageScore) -> None:
        """Append one result."""
        row = as_row(result) if self.is_csv else as_json(result)
        if self.folder is not None:
            name = renamed(result.name, self.folder)
            row["path"] = name if self.is_csv else escape_name(name)
        self.begin()
        self._append(_line(self.is_csv, {name: row.get(name) for name in self._columns} if self.is_csv else row))

    def clear(self) -> None:
        """Drop what is to be overwritten: before new meta data are written, or they would be taken for those of it."""
        if self._overwrite:
            self._file.truncate(0)
            self._overwrite = False

    def begin(self) -> None:
        """Make an empty file one without rows, with a header if its kind has one."""
        self.clear()
        if self.is_csv and os.fstat(self._file.fileno()).st_size == 0:
            self._append(csv_line(self._columns))

    def drop_errors(self) -> None:
        """Take out the rows without a score, so that their images are scored again; all or nothing."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        new = open_locked(temporary)
        for line, (_, score, _) in lines_and_rows(self.path):
            if line is not None and not math.isnan(score):
                new.write(line)
        os.fsync(new.fileno())
        os.replace(temporary, self.path)
        self._file.close()
        self._file = new

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:  # one write takes all, unless the disk is full: then the next one says so
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Give the file free for others."""
        if not self._file.closed and os.fstat(self._file.fileno()).st_size == 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_locked(path: Path) -> io.FileIO:
    """A score file for its one writer.

    Raises:
        RecordError: if another run writes it.
    """
    try:
        return file_locks.open_locked(path)
    except file_locks.FileInUse:
        raise RecordError(
            f"{path}: another run is writing this file. Wait for its end, choose another output file, or use --shard."
        ) from None


def _line(is_csv: bool, row: dict[str, Any]) -> bytes:
    if is_csv:
        return csv_line(map(_as_cell, row.values()))
    return json.dumps(row).encode() + b"\n"


def _as_cell(value: object) -> str:
    if isinstance(value, str):
        return cell(value)
    return f"{value:.6f}" if isinstance(value, float) else "" if value is None else str(value)


def folder_from(path: Path) -> str:
    """The current folder as seen from the score file ``path``: a file and its images may move together."""
    try:
        return os.path.relpath(os.getcwd(), path.absolute().parent)
    except ValueError:  # another drive
        return os.getcwd()


def base_folder(path: Path, meta: dict[str, Any]) -> str:
    """Where relative names of a score file start; the current folder if its meta data do not say."""
    return os.path.normpath(os.path.join(path.absolute().parent, str(meta.get("folder", os.getcwd()))))


def renamed(name: str, folder: str, start: str = os.curdir) -> str:
    """A name relative to ``start`` as one relative to ``folder``."""
    if os.path.isabs(name) or is_url(name) or os.path.samefile(folder, start):
        return name
    place = os.path.join(os.path.abspath(start), name)
    try:
        return os.path.relpath(place, folder)
    except ValueError:  # another drive
        return place


def repair(path: Path) -> None:
    """Cut off a line that was not written to its end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def read_rows(path: Path) -> Iterator[tuple[str, float]]:
    """The rows of a whole file as ``(name, score)``, names as they were before they were escaped.

    Raises:
        RecordError: for a line that no score file holds, with its number.
    """
    return ((name, score) for line, (name, score, _) in lines_and_rows(path) if name is not None)


def lines_and_rows(path: Path) -> Iterator[tuple[bytes, tuple[str | None, float, str]]]:
    """Each line with its name (None: the header), score and error."""
    is_csv = file_format(path) == ".csv"
    with path.open("rb") as file:
        number = columns = 0
        try:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8", "replace")
                row: Any = next(csv.reader([text])) if is_csv else json.loads(text)
                if is_csv and number == 1:
                    if tuple(row[: len(COLUMNS)]) != COLUMNS:
                        raise ValueError("other columns")
                    columns = len(row)
                    yield line, (None, 0.0, "")
                elif is_csv:
                    if len(row) != columns:
                        raise ValueError(f"{len(row)} cells")
                    yield line, (uncell(row[0]), float(row[1]), uncell(row[4]))
                else:
                    score = math.nan if row["score"] is None else float(row["score"])
                    yield line, (unescape_name(row["path"]), score, row.get("error") or "")
        except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
            raise RecordError(
                f"{path}: expected a file that vqr1 score wrote, but line {number} is not a row of one ({error})"
            ) from None


def file_format(path: Path) -> str:
    """``".csv"`` or ``".jsonl"``."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(f"Expected an output file that ends in {' or '.join(SUFFIXES)}, but got {str(path)!r}.")
    return suffix


def meta_path(path: Path) -> Path:
    """The file beside a score file that says what the scores were made with."""
    return path.with_name(path.name + ".meta.json")


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write the meta data of the score file ``path``: all of it or nothing."""
    target = meta_path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta data of the score file ``path``."""
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = None
    if not isinstance(meta, dict):
        raise RecordError(
            f"{path}: cannot be continued, because {meta_path(path).name} beside it is missing or damaged and nothing "
            "else says what its scores were made with. Choose another output file, or --overwrite it."
        )
    return meta


def check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to continue a file whose scores another scorer made.

    Args:
        path: the score file, for the message.
        old, new: meta data, with the whole of :meth:`~vqr1_metric.scorer.QualityScorer.identity` under ``identity``.
    """
    before, now = old.get("identity"), json.loads(json.dumps(new["identity"]))
    if not isinstance(before, dict):
        raise RecordError(
            f"{path}: cannot be continued, because {meta_path(path).name} does not say all that its scores were made "
            "with (an older version wrote it). Choose another output file, or --overwrite it."
        )
    different = [name for name in now | before if before.get(name) != now.get(name)]
    if different:
        name = different[0]
        others = f" (and other {', '.join(different[1:])})" if different[1:] else ""
        raise RecordError(
            f"{path}: was made with {name} {before.get(name)!r}, but this run has {now.get(name)!r}{others}; scores of "
            "both must not be mixed. Use the same model and settings, or another output file."
        )


def csv_line(values: Iterable[object]) -> bytes:
    """A row as a line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
