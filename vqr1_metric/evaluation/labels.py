"""What people said of pictures: the rows of a label file, each with its picture on the disk."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vqr1_metric.images import SUFFIXES


class LabelError(ValueError):
    """Labels that cannot be used; the message begins with "Expected" and says what to do."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row or a picture, which was left out while the run went on.

    Args:
        kind: one of ``KINDS``.
        subject: the picture's name, or the line.
        detail: what is wrong with it.
    """

    kind: str
    subject: str
    detail: str = ""


#: Kinds of problems, and how a summary calls them.
KINDS = {
    "missing picture": "label rows without a picture",
    "missing label": "pictures without a label",
    "duplicate": "names that occur more than once",
    "bad row": "rows without a usable score",
    "ambiguous": "names that fit several pictures",
    "no score": "pictures without a score of a scorer",
}


@dataclass(frozen=True)
class Item:
    """One labelled picture.

    Args:
        image: its name in the labels.
        mos: mean opinion score in the labels' own units.
        std: standard deviation of the opinions in the same units; NaN where the labels have none.
        scene: what the picture shows, shared by all versions of it; None where unknown.
        method: what made this version (a restoration method, a generator, a kind of distortion).
        split: train, val or test.
        path: the picture; None until :func:`attach` has found it.
    """

    image: str
    mos: float
    std: float = math.nan
    scene: str | None = None
    method: str | None = None
    split: str | None = None
    path: Path | None = None


@dataclass(frozen=True)
class LabelSet:
    """Labelled pictures of one data set.

    Args:
        name: as tables call it.
        items: the rows that can be used.
        lower_is_better: the labels are DMOS-like.
        short_edge: pictures are reduced to this short edge before they are scored; None leaves them as they are.
        problems: what was left out, and why.
        expected: how many rows the complete set has; None where unknown.
        sources: label files it was read from.
        split: the split that was taken, "all" for everything.
    """

    name: str
    items: tuple[Item, ...]
    lower_is_better: bool = False
    short_edge: int | None = None
    problems: tuple[Problem, ...] = ()
    expected: int | None = None
    sources: tuple[Path, ...] = field(default=(), compare=False)
    split: str = "all"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_scenes(self) -> bool:
        """Do several pictures show the same scene, for every picture with a scene on average two or more?"""
        scenes = [item.scene for item in self.items if item.scene]
        return bool(scenes) and len(scenes) >= 2 * len(set(scenes))

    @property
    def quality(self) -> list[float]:
        """Opinions with higher meaning better, whatever the labels' direction."""
        return [-item.mos if self.lower_is_better else item.mos for item in self.items]

    def take_split(self, split: str) -> LabelSet:
        """Only the rows of one split; ``"all"`` takes everything."""
        if split == "all":
            return self
        known = sorted({item.split for item in self.items if item.split})
        if split not in known:
            raise LabelError(
                f"Expected a split of {self.name}: all{''.join(f', {name}' for name in known)}; but got {split!r}."
            )
        return replace(self, items=tuple(item for item in self.items if item.split == split), split=split)


def without_duplicates(items: Iterable[Item]) -> tuple[list[Item], list[Problem]]:
    """Each name once. Repeated rows that agree count once; rows that contradict each other are all left out."""
    by_name: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_name[item.image].append(item)
    kept, problems = [], []
    for name, rows in by_name.items():
        values = sorted({row.mos for row in rows})
        if len(values) > 1:
            told = ", ".join(f"{value:g}" for value in values)
            problems.append(Problem("duplicate", name, f"has contradicting scores ({told}): left out"))
            continue
        if len(rows) > 1:
            problems.append(Problem("duplicate", name, f"occurs {len(rows)} times with one score: counted once"))
        kept.append(rows[0])
    return kept, problems


def attach(labels: LabelSet, folder: Path, *, report_unlabelled: bool = True) -> LabelSet:
    """Find the picture of every row below ``folder``.

    A name is matched as a path relative to the folder, then without regard to case, then by its file name alone, then
    by its stem (a set published as BMP and stored as PNG), each only where exactly one picture fits.

    Args:
        labels: rows; those that have a path keep it.
        folder: where the pictures are, subfolders included.
        report_unlabelled: list the pictures that no row names.
    """
    if not folder.is_dir():
        raise LabelError(f"Expected a folder of pictures, but {str(folder)!r} is none.")
    pictures = find_pictures(folder)
    index = _index(pictures, folder)
    items, problems, used = [], list(labels.problems), set()
    for item in labels.items:
        if item.path is not None:
            items.append(item)
            used.add(item.path)
            continue
        found = _find(item.image, folder, index)
        if len(found) == 1:
            items.append(replace(item, path=found[0]))
            used.add(found[0])
        elif found:
            told = ", ".join(path.relative_to(folder).as_posix() for path in found[:3])
            problems.append(Problem("ambiguous", item.image, f"could be {told}: left out"))
        else:
            problems.append(Problem("missing picture", item.image, "no such picture: left out"))
    for problem in labels.problems:  # rows that cannot be used name their picture all the same
        used.update(_find(problem.subject, folder, index))
    if report_unlabelled:
        problems += [
            Problem("missing label", path.relative_to(folder).as_posix(), "no label names it: not used")
            for path in pictures
            if path not in used
        ]
    return replace(labels, items=tuple(items), problems=tuple(problems))


def find_pictures(folder: Path) -> list[Path]:
    """Pictures below a folder, sorted, hidden files and folders left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if _is_picture(name)]
    return found


def count_problems(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems there are of each kind, in the order of ``KINDS``, kinds without any left out."""
    counts = {kind: sum(problem.kind == kind for problem in problems) for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def problems_text(counts: Mapping[str, int]) -> str:
    """Counts of :func:`count_problems` in words: ``label rows without a picture: 2; names that ...: 1``."""
    return "; ".join(f"{KINDS[kind]}: {count}" for kind, count in counts.items())


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _index(pictures: list[Path], folder: Path) -> list[dict[str, list[Path]]]:
    """Pictures by relative path, by file name and by stem, all without regard to case."""
    keys = (
        lambda path: path.relative_to(folder).as_posix().lower(),
        lambda path: path.name.lower(),
        lambda path: path.stem.lower(),
    )
    index = []
    for key in keys:
        table: dict[str, list[Path]] = defaultdict(list)
        for path in pictures:
            table[key(path)].append(path)
        index.append(table)
    return index


def _find(name: str, folder: Path, index: list[dict[str, list[Path]]]) -> list[Path]:
    name = name.replace("\\", "/").strip()
    exact = folder / name
    if os.path.isfile(exact):  # Path.is_file raises for a name that no file system takes
        return [exact]
    parts = Path(name.lower())
    keys = (parts.as_posix(), parts.name, parts.stem if _is_picture(name) else parts.name)
    for table, key in zip(index, keys, strict=True):
        found = table.get(key, [])
        if found:
            return found
    return []
