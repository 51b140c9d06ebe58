"""Label files become rating sets: every format that is known, once.

By what is in the file:

- a table with a header (CSV, TSV, any separator, XLSX): an image and a score column, optionally ``std``, ``scene``
  (``reference``), ``method``, ``split``, ``dataset``, ``question``; further columns are kept.
- without header, as the authors of VisualQuality-R1 publish them: ``image mos``, ``image mos std``, ``reference image
  mos``, ``reference image mos std``.
- JSON lines or a JSON list of objects with such keys, or of chats with one image (``conversations``, ``messages``)
  whose last reply is the score.
- votes: ``a, b, votes_a, votes_b`` (without votes each row is one for ``a``), ``chosen, rejected``, or ``image, scene,
  best_votes`` (votes for the best of each scene).
- ``hf:NAME`` or ``hf:NAME:SPLIT``, or a folder written by ``datasets.save_to_disk``: an image and a score column.

A column called ``dmos`` says nothing of its direction by itself: that of KADID-10k is higher for better images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqr1_metric.ratings.lookup import find_images
from vqr1_metric.ratings.parse import find_columns, parse_ratings
from vqr1_metric.ratings.sets import RatingError, RatingSet, raise_problems
from vqr1_metric.ratings.tables import Table, read_table


def read_ratings(
    source: str | Path,
    images: str | Path | Sequence[str | Path] | None = None,
    *,
    strict: bool,
    columns: Mapping[str, str | int | None] | None = None,
    lower_is_better: bool | None = None,
    split: str = "all",
    name: str | None = None,
    delimiter: str | None = None,
    find: bool = True,
) -> RatingSet:
    """What people said of images, from a file of any known format, each image with its file.

    Args:
        source: a label file; or ``hf:NAME[:SPLIT]``, or a folder written by ``datasets.save_to_disk``.
        images: folder or folders in which images are looked for, in this order, and then beside the label file.
        strict: True raises for a row that cannot be used, an image that is not found or named twice; False leaves it
            out, lists it in ``problems``, and lists the images that no row names too.
        columns: role -> header (or number, from 0) of a column that is called otherwise, for the roles of
            :data:`COLUMNS`; None leaves a column out.
        lower_is_better: the direction of the scores; None takes "higher" for everything but a ``dmos``, whose direction
            stays undecided (``RatingSet.lower_is_better`` is None, ``quality`` raises).
        split: ``"train"``, ``"val"``, ``"test"``: only these rows; images of the others are not looked for.
        name: of the set; the file's stem by default.
        delimiter: of a text table; None recognises it.
        find: False does not look for images.

    Returns:
        One set; :meth:`RatingSet.by_dataset` parts one whose rows name several data sets.

    Raises:
        RatingError: no usable row, an unknown word in a split column, columns that do not exist; with ``strict`` any
            problem, with file and line.
    """
    if str(source).startswith("hf:") or (Path(source) / "dataset_info.json").is_file():
        found = _read_hub(str(source), columns or {}, strict)
        found = found if lower_is_better is None else replace(found, lower_is_better=lower_is_better)
        return replace(found, name=name or found.name).take_split(split)
    path = Path(source)
    ratings = parse_ratings(read_table(path, delimiter), path, columns)
    ratings = replace(
        ratings,
        name=name or ratings.name,
        lower_is_better=ratings.lower_is_better if lower_is_better is None else lower_is_better,
    )
    complete = len(ratings)
    ratings = ratings.take_split(split)
    if find:
        folders = [] if images is None else [images] if isinstance(images, str | Path) else list(images)
        ratings = find_images(
            ratings,
            [*(Path(folder) for folder in folders), path.parent],
            report_unlabelled=not strict and len(ratings) == complete,
        )
    if strict:
        raise_problems(f"ratings in {str(path)!r} that can all be used", ratings.problems)
    return ratings


def _read_hub(source: str, columns: Mapping[str, str | int | None], strict: bool) -> RatingSet:
    """A Hugging Face dataset; the files of its images are read as they are, when they are needed."""
    try:
        import datasets
    except ImportError:
        raise RatingError("Expected the datasets library for this source: pip install 'vqr1-metric[train]'.") from None
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        data = datasets.load_dataset(name, split=split or "train")
    else:
        name, data = source, datasets.load_from_disk(source)
    if not isinstance(data, datasets.Dataset):
        raise RatingError(
            f"Expected one split of {source!r}, but got several ({', '.join(data)}): write hf:NAME:SPLIT."
        )
    image = next((column for column, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    header = [column for column in data.column_names if column != image]
    roles = find_columns(header, {role: told for role, told in columns.items() if role != "image"}, Path(source))
    if image is None or "mos" not in roles:
        raise RatingError(
            f"Expected an image column and a score column (mos) in {source!r}, but got {', '.join(data.column_names)}."
        )
    data = data.cast_column(image, datasets.Image(decode=False))
    short = Path(name).name
    cells = data.select_columns(header)
    rows = [(row, ["" if cells_[c] is None else str(cells_[c]) for c in header]) for row, cells_ in enumerate(cells)]
    table = Table([(-1, [*header, "image"]), *((n, [*row, f"{short}#{n}"]) for n, row in rows)], named=True)
    found = parse_ratings(table, Path(source), {**columns, "image": "image"})
    images = []
    for rated in found.images:
        number = int(rated.name.rpartition("#")[2])
        where = f"{source}, row {number}"
        images.append(replace(rated, where=where, data=_reader(data, number, image)))
    problems = tuple(replace(p, where=p.where.replace(", line ", ", row ")) for p in found.problems)
    if strict:
        raise_problems(f"ratings in {source!r} that can all be used", problems)
    return replace(found, name=short, images=tuple(images), problems=problems, sources=())


def _reader(data: Any, row: int, column: str) -> Callable[[], bytes]:
    def read() -> bytes:
        cell = data[row][column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return read
