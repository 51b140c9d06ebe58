"""Which files of several methods show the same scene, and which scenes belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vqr1_metric.ratings import Problem, RatingError
from vqr1_metric.ratings.lookup import image_files
from vqr1_metric.ratings.parse import find_columns
from vqr1_metric.ratings.tables import read_table


@dataclass(frozen=True)
class Pairing:
    """The scenes that every method has.

    Args:
        scenes: name of each scene: that of its file of the first method, without suffix.
        files: method -> the name of its file of each scene.
        rule: how names were matched, in words.
        problems: files without a partner.
    """

    scenes: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    rule: str
    problems: tuple[Problem, ...]

    def lines(self, limit: int = 10) -> list[str]:
        """What was paired with what, a line each, the rest counted."""
        rows = [" with ".join(names) for names in zip(*self.files.values(), strict=True)]
        return rows[:limit] + ([f"... and {len(rows) - limit} more"] if len(rows) > limit else [])


def image_names(folder: Path) -> list[str]:
    """Names of the images of a folder and its subfolders, relative to it.

    Raises:
        RatingError: no folder, or none in it.
    """
    if not folder.is_dir():
        raise RatingError(f"Expected a folder of pictures or a file of scores, but {str(folder)!r} is none.")
    names = [path.relative_to(folder).as_posix() for path in image_files(folder)]
    if not names:
        raise RatingError(f"Expected pictures in {str(folder)!r}, but it holds none.")
    return names


def pair_names(methods: Mapping[str, Sequence[str]], strip: Sequence[str] = ()) -> Pairing:
    """Match the files of several methods by their names.

    Names match without suffix and case: as paths, as paths below the folder that all names of a method share, or by
    file name alone (one folder flat, another nested). An ending that most names of a method add to those of the method
    with the shortest ones (``01_out.png`` for ``01.png``) is taken off. The first rule that pairs most counts, and is
    told.

    Args:
        methods: method -> names of its files, relative to its folder.
        strip: regular expressions of what to take off the end of names, such as ``_out`` or ``_[A-Za-z]+_x[234]``.

    Raises:
        RatingError: for an expression that is none, and if no scene is in all methods.
    """
    try:
        expressions = [re.compile(f"(?:{text})$") for text in strip]
    except re.error as error:
        raise RatingError(
            f"Expected regular expressions to take off names, but got {error.pattern!r} ({error})."
        ) from None

    def as_path(name: str) -> str:
        path = PurePosixPath(name.replace("\\", "/"))
        stem = path.stem
        for expression in expressions:
            stem = expression.sub("", stem) or stem
        return (path.parent / stem).as_posix().lower()

    keys = {method: [as_path(name) for name in names] for method, names in methods.items()}
    inner = {method: _below_common_folder(paths) for method, paths in keys.items()}
    flat = {method: [path.rsplit("/", 1)[-1] for path in paths] for method, paths in keys.items()}
    told = f", without {' and '.join(strip)} at the end" if strip else ""
    count, tables, rule = 0, dict[str, dict[str, str]](), ""
    for kind, found in (("by path", keys), ("by path below their folders", inner), ("by file name", flat)):
        for short, off in ((found, []), _without_endings(found)):
            unique = {method: _unique(short[method], names) for method, names in methods.items()}
            shared = len(set.intersection(*(set(table) for table in unique.values())))
            if shared > count:
                count, tables, rule = shared, unique, ", ".join([kind + told, *off])
    if not count:
        shown = "; ".join(f"{method}: {', '.join(list(names)[:2])}" for method, names in methods.items())
        raise RatingError(
            f"Expected files of the same scenes, but no name is in all of them ({shown}). What methods add to the end "
            "of names is taken off with strip=[...] (--strip _out --strip '_x[234]')."
        )
    first = next(iter(methods))
    scenes = [scene for scene in tables[first] if all(scene in table for table in tables.values())]
    taken = {method: {table[scene] for scene in scenes} for method, table in tables.items()}
    problems = [
        Problem("missing picture", f"{method}/{name}", "has no partner, or shares its name: left out")
        for method, names in methods.items()
        for name in names
        if name not in taken[method]
    ]
    files = {method: tuple(table[scene] for scene in scenes) for method, table in tables.items()}
    titles = tuple(PurePosixPath(name.replace("\\", "/")).with_suffix("").as_posix() for name in files[first])
    return Pairing(titles, files, rule, tuple(problems))


def _unique(keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Key -> name, without the keys that several names have."""
    counts = Counter(keys)
    return {key: name for key, name in zip(keys, names, strict=True) if counts[key] == 1}


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return ["/".join(path.split("/")[shared:]) for path in paths]


def _without_endings(keys: Mapping[str, Sequence[str]]) -> tuple[dict[str, Sequence[str]], list[str]]:
    """Keys without what most of a method's add to those of the method with the shortest, and what that is, in words."""
    base = min(keys, key=lambda method: sum(map(len, keys[method])) / len(keys[method]))
    found: dict[str, Sequence[str]] = {}
    told = []
    for method, names in keys.items():
        ending = "" if method == base else _ending(keys[base], names)
        found[method] = [name.removesuffix(ending) for name in names]
        told += [f"{ending!r} taken off the names of {method}"] if ending else []
    return found, told


def _ending(short: Sequence[str], long: Sequence[str]) -> str:
    """What most of the longer names add to the end of one of the shorter ones; empty if there is no such thing."""
    known = set(short)
    endings = Counter(name[i:] for name in long for i in range(1, len(name)) if name[:i] in known)
    if not endings:
        return ""
    ending, count = max(endings.items(), key=lambda entry: (entry[1], -len(entry[0])))
    return ending if 2 * count > len(long) else ""


def group_scenes(scenes: Sequence[str], by: str) -> list[str]:
    """The group of each scene.

    Args:
        scenes: names with their folders, without suffix.
        by: ``"folder"``; ``FILE:COLUMN``, a column of a table that names pictures; or a regular expression whose first
            group (or whole match) in the name is the group, such as ``^(.*)_frame``.

    Raises:
        RatingError: a scene that has no group.
    """
    file, colon, column = by.rpartition(":")
    if by == "folder":
        found = [PurePosixPath(scene).parent.as_posix() for scene in scenes]
    elif colon and Path(file).is_file():
        table = _column(Path(file), column)
        stems = _unique([PurePosixPath(name).name for name in table], list(table))
        found = [
            table.get(scene.lower()) or table.get(stems.get(PurePosixPath(scene).name.lower(), "")) or ""
            for scene in scenes
        ]
    else:
        try:
            expression = re.compile(by)
        except re.error as error:
            raise RatingError(
                f"Expected folder, FILE:COLUMN or a regular expression, but got {by!r} ({error})."
            ) from None
        matches = [expression.search(scene) for scene in scenes]
        found = ["" if m is None else (m.group(1) if expression.groups else m.group()) or "" for m in matches]
    for scene, group in zip(scenes, found, strict=True):
        if not group:
            raise RatingError(f"Expected a group of every scene by {by!r}, but {scene!r} has none.")
    return found


def _column(path: Path, column: str) -> dict[str, str]:
    """Picture (without suffix, in small letters) -> its cell in a column."""
    table = read_table(path)
    header = table.rows[0][1] if table.rows else []
    roles = find_columns(header, {}, path)
    at = next((i for i, name in enumerate(header) if name.lower() == column.lower()), roles.get(column))
    if at is None or "image" not in roles:
        raise RatingError(f"Expected columns image and {column} in {str(path)!r}, but it has {', '.join(header)}.")
    return {
        PurePosixPath(row[roles["image"]].replace("\\", "/")).with_suffix("").as_posix().lower(): row[at]
        for _, row in table.rows[1:]
        if len(row) > max(at, roles["image"])
    }
