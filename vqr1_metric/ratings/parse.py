"""The cells of a label file become images with scores, or votes between them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from vqr1_metric.ratings.lookup import has_image_suffix
from vqr1_metric.ratings.sets import (
    Preference,
    Problem,
    RatedImage,
    RatingError,
    RatingSet,
    raise_problems,
    without_duplicates,
)
from vqr1_metric.ratings.tables import Table

#: Header names of a column, in order of preference; compared in lower case without blanks, "_", "-" and a leading "#".
COLUMNS = {
    "image": (
        "image", "imagename", "imgname", "img", "imagepath", "path", "filename", "file", "distimg", "name", "images",
    ),
    "mos": ("mos", "qualitymos", "mosquality", "dmos", "score", "rating", "quality", "label"),
    "std": ("std", "sd", "mosstd", "qualitystd", "stdquality", "sigma"),
    "scene": ("scene", "reference", "ref", "refimg", "refname", "refimage", "content"),
    "method": ("method", "model", "distortion", "generator"),
    "split": ("split", "set", "subsetname"),
    "dataset": ("dataset", "datasetname", "database"),
    "question": ("question",),
    "a": ("a", "imagea", "first", "left", "chosen"),
    "b": ("b", "imageb", "second", "right", "rejected"),
    "votes_a": ("votesa", "awins", "apreferred", "firstvotes"),
    "votes_b": ("votesb", "bwins", "bpreferred", "secondvotes"),
    "best_votes": ("bestvotes", "votes", "wins"),
}  # fmt: skip
#: Words of a split column; others are refused, because what they hold out must not be trained on.
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "": None,
}  # fmt: skip


Row = tuple[str, dict[str, str], dict[str, str]]


def parse_ratings(table: Table, path: Path, columns: Mapping[str, str | int | None] | None = None) -> RatingSet:
    """The set of a file's cells, images not looked for yet.

    Args:
        table: cells.
        path: file of the cells, for messages.
        columns: as for :func:`read_ratings`.

    Raises:
        RatingError: as for :func:`read_ratings`.
    """
    if not table.rows:
        raise RatingError(f"Expected ratings in {str(path)!r}, but it is empty.")
    header = table.rows[0][1]
    roles = find_columns(header, columns or {}, path)
    stem = path.stem
    if isinstance((columns or {}).get("mos"), int) and not math.isnan(table.number(header[roles["mos"]])):
        table = replace(table, rows=[(0, [""] * len(header)), *table.rows])  # columns by number need no header
        header = table.rows[0][1]
    if "a" in roles and "b" in roles and "mos" not in roles:
        return _pairs(stem, path, *_cells(table, roles, path), table, roles)
    if {"image", "scene", "best_votes"} <= set(roles) and "mos" not in roles:
        return _best_of(stem, path, *_cells(table, roles, path), table)
    lower: bool | None = False
    if "image" in roles and "mos" in roles:
        rows, problems = _cells(table, roles, path)
        if "dmos" in _key(header[roles["mos"]]):
            lower = None
    elif table.named or not (has_image_suffix(header[0]) or _is_score(table, header)):
        raise RatingError(
            f"Expected in {path}, line {table.rows[0][0]}, a header with a picture and a score column (image, mos), "
            "one with a, b, votes_a, votes_b (or chosen, rejected, or image, scene, best_votes), or a line 'image "
            f"mos', but got {' '.join(header)[:200]!r}. Other names are given as columns={{'image': ..., 'mos': ...}} "
            "(--column image=... --column mos=...)."
        )
    else:
        rows, problems = _headless(table, path)
        if "dmos" in stem.lower():
            lower = None
    found = []
    for where, cells, others in rows:
        mos = table.number(cells["mos"])
        if not cells["image"] or math.isnan(mos):
            problems.append(Problem("bad row", cells["image"] or where, _complaint(cells), where))
            continue
        found.append(
            RatedImage(
                cells["image"],
                mos,
                table.number(cells.get("std", "")),
                cells.get("scene") or None,
                cells.get("method") or None,
                SPLITS[cells.get("split", "").lower()],
                cells.get("question") or None,
                cells.get("dataset") or None,
                others,
                where,
            )
        )
    kept, twice = without_duplicates(found)
    problems += twice
    if not kept:
        raise_problems(f"rows with a picture and a score in {str(path)!r}", problems or ["found none"])
    return RatingSet(stem, tuple(kept), lower, problems=tuple(problems), sources=(path,))


def find_columns(header: Sequence[str], told: Mapping[str, str | int | None], path: Path) -> dict[str, int]:
    """Role -> number of its column, for the roles of :data:`COLUMNS` that a header has.

    Raises:
        RatingError: a role that there is none of, or a column that is not there.
    """
    unknown = sorted(set(told) - set(COLUMNS))
    if unknown:
        raise RatingError(f"Expected columns of {', '.join(COLUMNS)}, but got {unknown[0]!r}.")
    keys = [_key(cell) for cell in header]
    found = {}
    for role, names in COLUMNS.items():
        if role not in told:
            column = next((keys.index(name) for name in names if name in keys), None)
        elif (wanted := told[role]) is None:
            continue
        elif isinstance(wanted, int):
            column = wanted if 0 <= wanted < len(header) else None
        else:
            column = next((keys.index(key) for key in (_key(wanted),) if key in keys), None)
            column = header.index(wanted) if wanted in header else column
        if column is not None:
            found[role] = column
        elif role in told:
            raise RatingError(
                f"Expected a column {told[role]!r} for {role} in {str(path)!r}, but it has {', '.join(header)}."
            )
    return {role: column for role, column in found.items() if role in told or column not in _told(told, found)}


def _told(told: Mapping[str, object], found: Mapping[str, int]) -> set[int]:
    return {column for role, column in found.items() if role in told}


def _key(cell: str) -> str:
    return re.sub(r"[\s_\-]+", "", cell.lower().removeprefix("#"))


def _is_score(table: Table, cells: Sequence[str]) -> bool:
    return any(not math.isnan(table.number(cell)) for cell in cells[1:])


def _cells(table: Table, roles: dict[str, int], path: Path) -> tuple[list[Row], list[Problem]]:
    """``(where, cells by role, other cells by header)`` of each row below the header."""
    header = table.rows[0][1]
    _check_splits(table, roles, path)
    others = [i for i in range(len(header)) if i not in roles.values() and header[i]]
    rows: list[Row] = []
    lines = [f"{path}, line {number}" for number, _ in table.broken]
    problems = [Problem("bad row", at, text, at) for at, (_, text) in zip(lines, table.broken, strict=True)]
    for number, row in table.rows[1:]:
        where = f"{path}, line {number}"
        if any(row[len(header) :]):  # a comma in a name, or a decimal comma, without quotes
            detail = f"has {len(row)} cells instead of {len(header)}: left out"
            problems.append(Problem("bad row", row[0] or where, detail, where))
            continue
        row = row + [""] * (len(header) - len(row))
        rows.append((where, {role: row[i] for role, i in roles.items()}, {header[i]: row[i] for i in others if row[i]}))
    return rows, problems


def _check_splits(table: Table, roles: dict[str, int], path: Path) -> None:
    """Refuse words that are no splits; a column ``set`` in which none of them is one is another kind of set."""
    if "split" not in roles:
        return
    column = roles["split"]
    words = [(number, row[column].strip() if column < len(row) else "") for number, row in table.rows[1:]]
    unknown = [(number, word) for number, word in words if word.lower() not in SPLITS]
    known = any(word and word.lower() in SPLITS for _, word in words)
    if unknown and not known and _key(table.rows[0][1][column]) in ("set", "subsetname"):
        del roles["split"]
    elif unknown:
        number, word = unknown[0]
        raise RatingError(
            f"Expected train, val or test (or training, valid, validation) as the split in {path}, line {number}, but "
            f"got {word!r}; a column that is no split is left out with columns={{'split': None}} (--column split=)."
        )


def _complaint(cells: Mapping[str, str]) -> str:
    if not cells["image"]:
        return "names no picture: left out"
    return (
        f"has the score {cells['mos']!r}, which is not a number: left out" if cells["mos"] else "has no score: left out"
    )


def _headless(table: Table, path: Path) -> tuple[list[Row], list[Problem]]:
    """``image mos [std]`` or ``reference image mos [std]``; lines of another form than most are problems."""
    parsed: list[tuple[str, list[str], list[str]]] = []
    problems = []
    for number, row in table.rows:
        where = f"{path}, line {number}"
        names = [cell for cell in row if cell]
        numbers: list[str] = []
        while len(names) > 1 and len(numbers) < 2 and not math.isnan(table.number(names[-1])):
            numbers.insert(0, names.pop())
        if not numbers:
            what = f"has the score {row[-1]!r}, which is not a number: left out" if len(row) > 1 else "has no score"
            problems.append(Problem("bad row", names[0] if names else where, what, where))
            continue
        parsed.append((where, _reference_and_image(names), numbers))
    forms = [(len(names), len(numbers)) for _, names, numbers in parsed]
    usual = max(set(forms), key=forms.count) if forms else None
    rows: list[Row] = []
    for (where, names, numbers), form in zip(parsed, forms, strict=True):
        if form != usual:
            detail = "is not of the form that most lines have (image mos [std] or reference image mos [std]): left out"
            problems.append(Problem("bad row", names[-1], detail, where))
            continue
        cells = {"image": names[-1], "mos": numbers[0], "std": numbers[1] if len(numbers) == 2 else ""}
        rows.append((where, cells | ({"scene": names[0]} if len(names) == 2 else {}), {}))
    return rows, problems


def _reference_and_image(names: list[str]) -> list[str]:
    """Two names are reference and image; a name with blanks was cut to pieces, only the last of which has a suffix."""
    ends = [i for i, name in enumerate(names) if has_image_suffix(name)]
    if len(ends) == 2 and ends[1] == len(names) - 1:
        return [" ".join(names[: ends[0] + 1]), " ".join(names[ends[0] + 1 :])]
    if len(names) == 2 and not ends:
        return names
    return [" ".join(names)]


# ---------------------------------------------------------------- votes


def _pairs(
    stem: str, path: Path, rows: list[Row], problems: list[Problem], table: Table, roles: Mapping[str, int]
) -> RatingSet:
    counted = "votes_a" in roles and "votes_b" in roles
    if not counted:
        _refuse_unknown_votes(path, rows, table, roles)
    pairs, votes = [], (1.0, 0.0)
    named: dict[str, RatedImage] = {}
    for where, cells, others in rows:
        a, b = cells["a"], cells["b"]
        if counted:
            votes = table.number(cells["votes_a"]), table.number(cells["votes_b"])
        if not a or not b or a == b or not all(vote >= 0 for vote in votes) or not sum(votes):
            problems.append(Problem("bad row", where, "needs two pictures and at least one vote: left out", where))
            continue
        pairs.append(Preference(a, b, *votes, cells.get("scene") or where, where))
        for image in (a, b):
            split = SPLITS[cells.get("split", "").lower()]
            named.setdefault(
                image, RatedImage(image, scene=cells.get("scene"), split=split, columns=others, where=where)
            )
    return _votes(stem, path, named, pairs, {}, problems)


def _refuse_unknown_votes(path: Path, rows: list[Row], table: Table, roles: Mapping[str, int]) -> None:
    """Numbers beside two pictures may be votes under another name: one vote for ``a`` would be made up."""
    half = {"votes_a", "votes_b"} & set(roles)
    numbers = {header for _, _, others in rows for header, cell in others.items() if not math.isnan(table.number(cell))}
    if half or numbers:
        raise RatingError(
            f"Expected votes_a and votes_b, or neither, beside two pictures in {str(path)!r}, but got "
            f"{', '.join(sorted(half or numbers))}; other names are given as columns={{'votes_a': ..., 'votes_b': "
            "...} (--column votes_a=... --column votes_b=...)."
        )


def _best_of(stem: str, path: Path, rows: list[Row], problems: list[Problem], table: Table) -> RatingSet:
    """Luce (1959): of two versions, among those who chose one of these two, so many chose each."""
    choices: dict[str, dict[str, float]] = defaultdict(dict)
    named: dict[str, RatedImage] = {}
    for where, cells, others in rows:
        name, scene, votes = cells["image"], cells["scene"], table.number(cells["best_votes"])
        if not name or not scene or not votes >= 0:
            detail = "needs a picture, a scene and votes: left out"
            problems.append(Problem("bad row", name or where, detail, where))
        elif name in choices[scene]:
            problems.append(Problem("duplicate", name, "occurs twice in its scene: the first row counts", where))
        else:
            choices[scene][name] = votes
            split = SPLITS[cells.get("split", "").lower()]
            image = RatedImage(
                name, scene=scene, method=cells.get("method") or None, split=split, columns=others, where=where
            )
            named.setdefault(name, image)
    pairs = [
        Preference(a, b, found[a], found[b], scene, named[a].where)
        for scene, found in choices.items()
        for a, b in combinations(found, 2)
        if found[a] + found[b] > 0
    ]
    return _votes(stem, path, named, pairs, {scene: dict(found) for scene, found in choices.items()}, problems)


def _votes(
    stem: str,
    path: Path,
    named: Mapping[str, RatedImage],
    pairs: Sequence[Preference],
    choices: Mapping[str, Mapping[str, float]],
    problems: Sequence[Problem],
) -> RatingSet:
    if not pairs:
        told = f" ({problems[0]})" if problems else ""
        raise RatingError(f"Expected at least one pair of pictures with a vote in {str(path)!r}, but found none{told}.")
    return RatingSet(
        stem, tuple(named.values()), False, tuple(pairs), choices, problems=tuple(problems), sources=(path,)
    )
