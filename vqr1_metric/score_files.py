"""Score files: CSV or JSON lines, one line for each picture, that survive being killed at any moment.

Beside ``scores.csv`` lies ``scores.csv.meta.json``, written first, with what the scores were made with. A row is one
write of one line, so a kill leaves whole lines behind and at most one piece of a line, which :func:`repair` cuts off.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqr1_metric.results import ImageScore

#: Columns of the CSV; ``low`` and ``high`` hold 95% of the distribution. JSON lines have these keys, then
#: ``probabilities`` (of the 401 scores 1.00, 1.01, ... 5.00) and ``replies``.
COLUMNS = ("path", "score", "std", "coverage", "error", "low", "high", "tag_probability")
SUFFIXES = (".csv", ".jsonl")
#: A file may only be continued by a run that agrees in these.
IDENTITY = ("model", "revision", "mode", "prompt", "dtype", "min_pixels", "max_pixels", "sampling")

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "'")


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
    }


def as_json(result: ImageScore, *, details: bool = True) -> dict[str, Any]:
    """A result as JSON: None for NaN; with ``details`` the whole distribution and the sampled replies."""
    row = {key: _json_number(value) if isinstance(value, float) else value for key, value in as_row(result).items()}
    row["error"] = row["error"] or None
    if details:
        known = result.error is None
        probabilities = result.distribution.probabilities.tolist()
        row["probabilities"] = [float(f"{p:.6g}") for p in probabilities] if known else None
        row["replies"] = [
            {"score": _json_number(r.score), "reason": r.reason, "reasoning": r.reasoning} for r in result.replies
        ]
    return row


def cell(text: str) -> str:
    """Text as it is safe in one CSV cell on one line.

    A text that a spreadsheet would run as a formula (it begins with ``=``, ``+``, ``-``, ``@`` or a tab), or that
    begins with ``'``, gets a ``'`` in front; line breaks become ``\\n`` and ``\\r``; bytes of a file name that are not
    UTF-8 become ``\\udcXX``.
    """
    text = text.replace("\r", "\\r").replace("\n", "\\n")
    text = text.encode("utf-8", "backslashreplace").decode()
    return "'" + text if text.startswith(_FORMULA_STARTS) else text


class RecordWriter:
    """Appends rows to a score file, each with a single unbuffered write.

    Args:
        path: ends in ``.csv`` or ``.jsonl``; created where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.is_csv = file_format(path) == ".csv"
        self._file = path.open("ab", buffering=0)
        if self.is_csv and self._file.tell() == 0:
            self._append(_csv_line(COLUMNS))

    def write(self, result: ImageScore) -> None:
        """Append one result."""
        if self.is_csv:
            values = as_row(result).values()
            line = _csv_line([cell(v) if isinstance(v, str) else f"{v:.6f}" for v in values])
        else:
            line = json.dumps(as_json(result)).encode() + b"\n"
        self._append(line)

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:  # one write takes all, unless the disk is full: then the next one says so
            left = left[self._file.write(left) :]

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


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
    """The rows of a whole file as ``(cell(path), score)``.

    Raises:
        RecordError: for a line that no score file holds, with its number.
    """
    is_csv = file_format(path) == ".csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            for number, line in enumerate(file, 1):
                row = next(csv.reader([line])) if is_csv else json.loads(line)
                if is_csv and number == 1:
                    if tuple(row) != COLUMNS:
                        raise ValueError("other columns")
                elif is_csv:
                    if len(row) != len(COLUMNS):
                        raise ValueError(f"{len(row)} cells")
                    yield row[0], float(row[1])
                else:
                    yield cell(row["path"]), math.nan if row["score"] is None else float(row["score"])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
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
    """Refuse to continue a file with other settings; only what both state is compared."""
    for key in IDENTITY:
        if key in old and key in new and old[key] != new[key]:
            raise RecordError(
                f"{path}: was made with {key} {old[key]!r}, but this run has {new[key]!r}; scores of both must not be "
                "mixed. Use the same settings, or another output file."
            )


def _csv_line(values) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
