"""Rated images and votes, each with where it was written, so that every complaint can name file and line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

#: A message lists so many problems and counts the rest.
SHOWN = 8

#: Kinds of problems, and how a summary calls them.
KINDS = {
    "missing picture": "label rows without a picture",
    "missing label": "pictures without a label",
    "duplicate": "names that occur more than once",
    "bad row": "rows without a usable score",
    "ambiguous": "names that fit several pictures",
    "no score": "pictures without a score of a scorer",
}


class RatingError(ValueError):
    """Ratings that cannot be used; the message begins with "Expected" and says what to do."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row or an image, which was left out while the reading went on.

    Args:
        kind: one of ``KINDS``.
        subject: the image's name, or the line.
        detail: what is wrong with it.
        where: file and line it was found in; empty where it has none.
    """

    kind: str
    subject: str
    detail: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where or self.subject}: {self.subject + ' ' if self.where else ''}{self.detail}"


@dataclass(frozen=True)
class RatedImage:
    """One image and what people said of it.

    Args:
        name: as the labels call it.
        mos: mean opinion score in the labels' own units; NaN in a set of votes.
        std: standard deviation of the opinions in the same units; NaN where the labels have none.
        scene: what the image shows (its reference), shared by all versions of it; None where unknown.
        method: what made this version (a restoration method, a generator, a kind of distortion).
        split: ``"train"``, ``"val"``, ``"test"``, or None where the labels do not say.
        question: what people were asked, where the labels say it; without the mark of the image.
        dataset: the data set it belongs to, where one file holds several.
        columns: the other cells of its row, by their header, for grouping.
        where: file and line it was read from.
        path: its file; None until it was looked for, and for images of a Hugging Face dataset.
        data: gives the bytes of an image that has no file.
    """

    name: str
    mos: float = math.nan
    std: float = math.nan
    scene: str | None = None
    method: str | None = None
    split: str | None = None
    question: str | None = None
    dataset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)
    path: Path | None = None
    data: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """The bytes of its file."""
        if self.data is not None:
            return self.data()
        if self.path is None:
            raise RatingError(f"Expected the file of {self.name!r} ({self.where}), but it was not looked for.")
        return self.path.read_bytes()


@dataclass(frozen=True)
class Preference:
    """Votes between two versions.

    Args:
        a, b: names of the images.
        votes_a, votes_b: how many preferred each, not both 0; they may be fractions.
        scene: what both show; resampling draws whole scenes.
        where: file and line.
    """

    a: str
    b: str
    votes_a: float
    votes_b: float
    scene: str = ""
    where: str = field(default="", compare=False)

    @property
    def share(self) -> float:
        """The share of the votes that ``a`` won, in [0, 1]."""
        return self.votes_a / (self.votes_a + self.votes_b)


@dataclass(frozen=True)
class RatingSet:
    """Images of one data set, whose scores can be compared with each other and with no others; or votes between them.

    Args:
        name: as tables and logs call it.
        images: each image once.
        lower_is_better: the scores are DMOS-like; None while that is not settled.
        preferences: votes; a set holds either these or scores.
        choices: scene -> image -> votes for best, where the votes were for the best of several.
        problems: what was left out, and why.
        short_edge: images are reduced to this short edge before they are scored; None leaves them as they are.
        expected: how many rows the complete set has; None where unknown.
        sources: the files it was read from.
        split: the split that was taken, ``"all"`` for everything.
    """

    name: str
    images: tuple[RatedImage, ...]
    lower_is_better: bool | None = False
    preferences: tuple[Preference, ...] = ()
    choices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    short_edge: int | None = None
    expected: int | None = None
    sources: tuple[Path, ...] = field(default=(), compare=False)
    split: str = "all"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def quality(self) -> list[float]:
        """Scores with higher meaning better, in the set's own units.

        Raises:
            RatingError: while the direction is not settled.
        """
        if self.lower_is_better is None:
            where = f" ({self.images[0].where})" if self.images else ""
            raise RatingError(
                f"Expected to be told whether the dmos of {self.name!r}{where} is better when lower or higher, which "
                "differs between data sets: lower_is_better=True or False (--lower-is-better, --higher-is-better)."
            )
        return [-image.mos if self.lower_is_better else image.mos for image in self.images]

    @property
    def has_scenes(self) -> bool:
        """Do several images show the same scene, for every image with a scene on average two or more?"""
        scenes = [image.scene for image in self.images if image.scene]
        return bool(scenes) and len(scenes) >= 2 * len(set(scenes))

    def groups(self, by: str) -> list[str | None]:
        """The group of each image: its cell in a column of the labels, by role or by header.

        Raises:
            RatingError: no image has such a column.
        """
        roles = ("scene", "method", "split", "dataset")
        found = [(getattr(i, by) if by in roles else i.columns.get(by)) or None for i in self.images]
        if not any(found):
            headers = {name for image in self.images for name in image.columns}
            known = [role for role in roles if any(getattr(image, role) for image in self.images)] + sorted(headers)
            raise RatingError(f"Expected a column of {self.name!r} ({', '.join(known) or 'none'}), but got {by!r}.")
        return found

    def take_split(self, split: str) -> RatingSet:
        """Only the rows of one split; ``"all"`` takes everything."""
        if split == "all":
            return self
        known = sorted({image.split for image in self.images if image.split})
        if split not in known:
            raise RatingError(
                f"Expected a split of {self.name}: all{''.join(f', {name}' for name in known)}; but got {split!r}."
            )
        return replace(self, images=tuple(image for image in self.images if image.split == split), split=split)

    def by_dataset(self) -> list[RatingSet]:
        """One set for each data set that the file names; the set itself where it names none."""
        names = list(dict.fromkeys(image.dataset for image in self.images))
        if names in ([], [None]):
            return [self]
        parts = []
        for name in names:
            images = tuple(image for image in self.images if image.dataset == name)
            inside = {image.name for image in images}
            pairs = tuple(p for p in self.preferences if p.a in inside and p.b in inside)
            parts.append(replace(self, name=name or self.name, images=images, preferences=pairs))
        return parts


def without_duplicates(images: Iterable[RatedImage]) -> tuple[list[RatedImage], list[Problem]]:
    """Each image once. Repeated rows that agree count once; rows that contradict each other are all left out.

    Images are the same if they have one name (and data set), or one file.
    """
    groups: dict[object, list[RatedImage]] = {}
    for image in images:
        key = (image.dataset, image.path or image.name)
        groups.setdefault(key, []).append(image)
    kept, problems = [], []
    for rows in groups.values():
        first = rows[0]
        values = list(dict.fromkeys(row.mos for row in rows))
        others = f"(first in {first.where})" if first.where else ""
        if len(values) > 1:
            told = ", ".join(f"{value:g}" for value in values)
            detail = f"has contradicting scores ({told}): left out"
            problems.append(Problem("duplicate", first.name, f"{detail} {others}".strip(), rows[1].where))
            continue
        if len(rows) > 1:
            detail = f"occurs {len(rows)} times with one score: counted once"
            problems.append(Problem("duplicate", first.name, f"{detail} {others}".strip(), rows[1].where))
        kept.append(first)
    return kept, problems


def count_problems(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems there are of each kind, in the order of ``KINDS``, kinds without any left out."""
    counts = {kind: sum(problem.kind == kind for problem in problems) for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def problems_text(counts: Mapping[str, int]) -> str:
    """Counts of :func:`count_problems` in words: ``label rows without a picture: 2; names that ...: 1``."""
    return "; ".join(f"{KINDS[kind]}: {count}" for kind, count in counts.items())


def raise_problems(expected: str, problems: Sequence[object]) -> None:
    """Raise if there are any, naming the first few.

    Raises:
        RatingError: ``Expected <expected>, but <problem>; <problem> (and 3 more).``
    """
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise RatingError(f"Expected {expected}, but {'; '.join(str(p) for p in problems[:SHOWN])}{more}.")
