"""Rated pictures: what people said of each, and where that was written, so that every complaint names file and line."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vqr1_metric.images import ImageError, load_image

#: So many complaints are listed; the rest is counted.
_SHOWN = 8
#: Fewer pictures than this give no rank correlation worth the name.
MIN_VALIDATION = 4


class DataError(ValueError):
    """Ratings that cannot be trained on; the message begins with "Expected" and names file and line."""


@dataclass(frozen=True)
class RatedPicture:
    """One picture and what people said of it.

    Args:
        name: as error messages and logs call it.
        where: file and line (or row) it was read from.
        mos: mean opinion score in the data set's own units; NaN in a set of preferences.
        read: returns the bytes of the picture file.
        group: pictures of one group (one reference picture) never part into training and validation.
        split: ``"train"``, ``"val"``, ``"test"``, or None where the labels do not say.
    """

    name: str
    where: str
    mos: float
    read: Callable[[], bytes]
    group: str
    split: str | None = None


@dataclass(frozen=True)
class Preference:
    """``a`` over ``b``: indices into the pictures of a set, and the share of votes that ``a`` won, in [0, 1]."""

    a: int
    b: int
    share: float
    where: str


@dataclass(frozen=True)
class RatingSet:
    """Pictures of one data set, whose scores can be compared with each other and with no others.

    Args:
        name: as logs call it; unique within a run.
        pictures: the rated pictures.
        lower_is_better: the scores are DMOS-like; None while that is not settled.
        preferences: pairs with votes; a set holds either these or scores.
    """

    name: str
    pictures: tuple[RatedPicture, ...]
    lower_is_better: bool | None = False
    preferences: tuple[Preference, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def quality(self) -> list[float]:
        """Scores with higher meaning better, in the set's own units."""
        return [-p.mos if self.lower_is_better else p.mos for p in self.pictures]


def check_sets(sets: Sequence[RatingSet], images_per_comparison: int) -> None:
    """Complain about scores that cannot be learnt from; no picture is opened.

    Raises:
        DataError: NaN, one score for all, contradictions, or fewer pictures than a comparison set holds.
    """
    names = [s.name for s in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"Expected data sets of different names, but {twice[0]!r} was given twice.")
    for s in sets:
        problems = []
        seen: dict[str, RatedPicture] = {}
        for picture in s.pictures:
            if not s.preferences and not math.isfinite(picture.mos):
                problems.append(f"{picture.where}: the score of {picture.name} is {picture.mos}")
            first = seen.setdefault(picture.name, picture)
            if first is not picture:
                problems.append(f"{picture.where}: {picture.name} was rated in {first.where} already")
        problems += [f"{p.where}: a share of {p.share}" for p in s.preferences if not 0 <= p.share <= 1]
        _raise("Expected one finite score for each picture, but", problems)
        if s.preferences:
            if images_per_comparison % 2:
                raise DataError(
                    f"Expected an even images_per_comparison for the preferences of {s.name!r}, which come in pairs, "
                    f"but got {images_per_comparison}."
                )
            units, of_what = 2 * len(s.preferences), "pictures in its pairs"
        else:
            units, of_what = len(s), "pictures"
        if units < images_per_comparison:
            raise DataError(
                f"Expected at least {images_per_comparison} {of_what} in data set {s.name!r} (a comparison set), but "
                f"got {units}. Add pictures or lower images_per_comparison."
            )
        values = {p.share for p in s.preferences} if s.preferences else set(s.quality)
        if len(values) == 1 and (not s.preferences or values == {0.5}):
            where = s.pictures[0].where
            raise DataError(
                f"Expected scores that differ in data set {s.name!r}, but all {len(s)} are {values.pop():g} ({where} "
                "and the following lines): there is no order to learn."
            )


def split_validation(s: RatingSet, fraction: float, seed: int = 0) -> tuple[RatingSet, RatingSet]:
    """Training and validation pictures of a set.

    The labels' own split counts where there is one (rows marked ``test`` are used for nothing). Otherwise a fraction is
    held out, whole groups at a time, picked by a hash of their name and the seed, so that the choice does not depend on
    order. Of preferences whole pairs are held out; pairs that would straddle are left out, and pictures without one.

    Returns:
        Two sets of the same name; the second may be empty.
    """
    marked = {p.split for p in s.pictures} & {"train", "val"}
    if "val" in marked:
        held_out = {p.name for p in s.pictures if p.split == "val"}
    else:
        together = {(p.group,) for p in s.pictures if p.split != "test"}
        if s.preferences:
            together = {tuple(sorted((s.pictures[p.a].group, s.pictures[p.b].group))) for p in s.preferences}
        candidates = sorted(
            together, key=lambda groups: hashlib.sha256(f"{seed}:{s.name}:{':'.join(groups)}".encode()).digest()
        )
        by_group = defaultdict(list)
        for p in s.pictures:
            by_group[p.group].append(p.name)
        wanted, held_out = round(fraction * len(s)), set()
        for groups in candidates:
            if len(held_out) >= wanted:
                break
            for group in groups:
                held_out.update(by_group[group])
    train = [i for i, p in enumerate(s.pictures) if p.split != "test" and p.name not in held_out]
    val = [i for i, p in enumerate(s.pictures) if p.split != "test" and p.name in held_out]
    return _subset(s, train), _subset(s, val)


def _subset(s: RatingSet, kept: Sequence[int]) -> RatingSet:
    if s.preferences:  # a picture without a pair has nothing to say
        inside = set(kept)
        paired = {i for p in s.preferences for i in (p.a, p.b) if {p.a, p.b} <= inside}
        kept = [i for i in kept if i in paired]
    new = {old: i for i, old in enumerate(kept)}
    pairs = [replace(p, a=new[p.a], b=new[p.b]) for p in s.preferences if p.a in new and p.b in new]
    return replace(s, pictures=tuple(s.pictures[i] for i in kept), preferences=tuple(pairs))


def check_validation(sets: Sequence[RatingSet]) -> None:
    """Complain about validation sets that give no correlation; empty ones are fine."""
    for s in sets:
        if s.preferences or not s.pictures:
            continue
        if len(s) < MIN_VALIDATION or len(set(s.quality)) == 1:
            raise DataError(
                f"Expected at least {MIN_VALIDATION} validation pictures of different scores in data set {s.name!r}, "
                f"but got {len(s)}. Raise validation_fraction, or set it to 0 to train without validation."
            )


def check_pictures(train: Sequence[RatingSet], validation: Sequence[RatingSet], progress: bool = True) -> None:
    """Open every picture once, as training will: all must be readable, and none may be in training and validation.

    The same picture under two names is found by the hash of its file.

    Raises:
        DataError: lists the unreadable pictures, or the shared ones, with file and line.
    """
    from tqdm import tqdm

    rated = [(p, False) for s in train for p in s.pictures] + [(p, True) for s in validation for p in s.pictures]

    def look(item: tuple[RatedPicture, bool]) -> tuple[str | None, str]:
        picture, _ = item
        try:
            data = picture.read()
            load_image(data, picture.name)
        except (ImageError, OSError) as error:
            return f"{picture.where}: {error}", ""
        return None, hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(tqdm(pool.map(look, rated), total=len(rated), desc="checking pictures", disable=not progress))
    _raise("Expected readable pictures, but", [problem for problem, _ in results if problem])
    trained = {digest: p for (p, held_out), (_, digest) in zip(rated, results, strict=True) if not held_out}
    shared = [
        f"{p.where}: {p.name} is the same picture as {trained[digest].name} ({trained[digest].where})"
        for (p, held_out), (_, digest) in zip(rated, results, strict=True)
        if held_out and digest in trained
    ]
    _raise("Expected no picture in both training and validation, but", shared)


def _raise(expected: str, problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise DataError(f"{expected} {'; '.join(problems[:_SHOWN])}{more}.")


def read_file(path: Path) -> Callable[[], bytes]:
    """A function that reads this file."""
    return path.read_bytes
