"""Other scorers for the same table: any pyiqa metric by name, any file of scores."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.functional.distribution import GRID_SIZE
from vqr1_metric.images import ImageError, load_image
from vqr1_metric.images.names import unescape_name
from vqr1_metric.ratings.parse import find_columns
from vqr1_metric.ratings.sets import RatedImage, RatingError
from vqr1_metric.ratings.tables import parse_number, read_table
from vqr1_metric.score_files import uncell

#: Columns that a file of scores may have beside the score.
_NUMBERS = ("std", "low", "high", "coverage", "tag_probability")


def read_scores(path: str | Path) -> dict[str, dict[str, Any]]:
    """Scores of a file: name -> row with ``score`` and, where the file has them, ``std``, ``probabilities`` and more.

    A name that occurs with different scores has none, and ``error`` says why.

    Args:
        path: a table whose header names a picture and a score (what ``vqr1 score`` writes, or any other), a file of
            ``image score`` lines, or ``.jsonl``.

    Raises:
        RatingError: for a file that holds no scores.
    """
    path = Path(path)
    found: dict[str, dict[str, Any]] = {}
    for name, row in _json_lines(path) if path.suffix.lower() == ".jsonl" else _table_rows(path):
        first = found.setdefault(name, row)
        if first["score"] != row["score"] and not (math.isnan(first["score"]) and math.isnan(row["score"])):
            told = "occurs more than once in the file of scores, with different scores"
            found[name] = {"score": math.nan, "error": told}
    return found


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    table = read_table(path)
    rows, decimal_comma = [cells for _, cells in table.rows], table.decimal_comma
    if not rows:
        raise RatingError(f"Expected scores in {str(path)!r}, but it is empty.")
    image = find_columns(rows[0], {}, path).get("image")
    header = [cell.strip().lower() for cell in rows[0]]
    score = next((header.index(name) for name in ("score", "prediction", "pred", "value") if name in header), None)
    if image is None or score is None:
        if len(rows[0]) < 2 or math.isnan(parse_number(rows[0][-1], decimal_comma)):
            raise RatingError(f"Expected columns image and score in {str(path)!r}, but got {', '.join(rows[0])}.")
        yield from ((" ".join(row[:-1]), {"score": parse_number(row[-1], decimal_comma)}) for row in rows if row[1:])
        return
    numbers = {name: header.index(name) for name in _NUMBERS if name in header}
    error = header.index("error") if "error" in header else None
    ours = "tag_probability" in header  # names are escaped in what vqr1 score wrote
    for row in rows[1:]:
        if len(row) <= max(image, score) or not row[image]:
            continue
        entry: dict[str, Any] = {"score": parse_number(row[score], decimal_comma)}
        entry |= {name: parse_number(row[at], decimal_comma) for name, at in numbers.items() if at < len(row)}
        if error is not None and error < len(row) and row[error]:
            entry["error"] = row[error]
        yield uncell(row[image]) if ours else row[image], entry


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise RatingError(f"Expected a file, but {str(path)!r} is none.")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                name = str(row.get("path") or row["image"])
                yield unescape_name(name) if "tag_probability" in row else name, _checked(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RatingError(
                f"Expected JSON objects with path and score in {str(path)!r}, but line {number} is none ({error})."
            ) from None


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose numbers are numbers, as what follows relies on."""
    numbers = {name: float(row[name]) for name in _NUMBERS if row.get(name) is not None}
    probabilities = row.get("probabilities")
    if probabilities is not None:
        probabilities = [float(value) for value in probabilities]
        if len(probabilities) != GRID_SIZE:
            raise ValueError(f"{len(probabilities)} probabilities instead of {GRID_SIZE}")
    if not all(isinstance(reply, dict) for reply in row.get("replies") or []):
        raise TypeError("its replies are no objects")
    score = math.nan if row["score"] is None else float(row["score"])
    return {**row, **dict.fromkeys(_NUMBERS), **numbers, "score": score, "probabilities": probabilities}


def match_scores(
    scores: Mapping[str, Mapping[str, Any]], items: Sequence[RatedImage]
) -> list[Mapping[str, Any] | None]:
    """The row of each picture: by its path, its name in the labels, or either file name if it is unique; else None."""
    by_name: dict[str, Mapping[str, Any] | None] = {}
    for name, row in scores.items():
        by_name[_file_name(name)] = None if _file_name(name) in by_name else row
    return [
        scores.get(str(item.path))
        or scores.get(item.name)
        or by_name.get(_file_name(item.name))
        or by_name.get(_file_name(str(item.path)))
        for item in items
    ]


def _file_name(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def pyiqa_metric(name: str, device: str | None = None) -> Callable[[Path, int | None], dict[str, Any]]:
    """A function from picture (and short edge) to a row, of any metric that pyiqa knows.

    The row has ``score``, higher meaning better, or NaN and ``error``, why there is none.

    Raises:
        RatingError: without pyiqa, for a name it does not know or a metric that needs a reference, and where pyiqa
            cannot make the metric (its weights cannot be had, another package is missing).
    """
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:
        raise RatingError(
            f"Expected pyiqa for --pyiqa {name}, but it cannot be imported ({error}): pip install pyiqa"
        ) from None
    if name not in pyiqa.list_models():
        raise RatingError(f"Expected a metric that pyiqa knows, but got {name!r}; pyiqa.list_models() lists them.")
    if name not in pyiqa.list_models(metric_mode="NR"):
        raise RatingError(f"Expected a metric of pyiqa that needs no reference, but {name!r} does.")
    try:
        metric = pyiqa.create_metric(name, **({} if device is None else {"device": device}))
    # Whatever it is (no network, a package it wants, a broken file of weights), pyiqa's words say it best.
    except Exception as error:
        raise RatingError(
            f"Expected pyiqa to make its metric {name}, but it cannot ({type(error).__name__}: {error})."
        ) from error
    sign = -1.0 if metric.lower_better else 1.0

    def row(path: Path, short_edge: int | None = None) -> dict[str, Any]:
        try:
            pixels = load_image(load_picture(path, short_edge))
        except ImageError as error:
            return {"score": math.nan, "error": str(error)}
        try:
            return {"score": sign * float(metric(pixels.unsqueeze(0) / 255))}
        except Exception as error:  # too small for its windows, say; the other pictures are scored
            return {"score": math.nan, "error": f"{type(error).__name__}: {error}"}

    return row
