"""From the names in a label file to files on the disk."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from vqr1_metric.images.find import is_image_name
from vqr1_metric.ratings.sets import Problem, RatingError, RatingSet, without_duplicates


def find_images(ratings: RatingSet, folders: Sequence[Path], *, report_unlabelled: bool = True) -> RatingSet:
    """Find the file of every image of a set.

    In each folder, in their order, a name is matched as a path relative to the folder, then without regard to case,
    then by its file name alone, then by its stem (a set published as BMP and stored as PNG), each only where exactly
    one file fits. Two names of one file are one image.

    Args:
        ratings: images; those that have a file keep it.
        folders: where the images are, subfolders included.
        report_unlabelled: list the files of the first folder that no row names.

    Raises:
        RatingError: a folder that is none.
    """
    places = [_Folder(folder) for folder in folders]
    images, problems, used = [], list(ratings.problems), set()
    for image in ratings.images:
        if image.path is not None or image.data is not None:
            images.append(image)
            continue
        found = next((files for place in places if (files := place.find(image.name))), [])
        if len(found) == 1:
            images.append(replace(image, path=found[0]))
            used.add(found[0])
        elif found:
            told = " or ".join(str(path) for path in found[:3])
            problems.append(Problem("ambiguous", image.name, f"could be {told}: left out", image.where))
        else:
            told = ", ".join(str(folder) for folder in folders)
            problems.append(Problem("missing picture", image.name, f"is not in {told}: left out", image.where))
    # Two names of one file are votes for two versions that are the same; no score of either is lost.
    kept, twice = (images, []) if ratings.preferences else without_duplicates(images)
    names = {image.name for image in kept}
    if report_unlabelled and places:
        for problem in ratings.problems:  # rows that cannot be used name their picture all the same
            used.update(places[0].find(problem.subject))
        problems += [
            Problem("missing label", path.relative_to(folders[0]).as_posix(), "no label names it: not used")
            for path in places[0].files
            if path not in used
        ]
    return replace(
        ratings,
        images=tuple(kept),
        preferences=tuple(p for p in ratings.preferences if p.a in names and p.b in names),
        problems=(*problems, *twice),
    )


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted, hidden files and folders left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if has_image_suffix(name)]
    return found


def has_image_suffix(name: str) -> bool:
    """Does a file's name, which is not a hidden file's, end as image files do?"""
    return not os.path.basename(name).startswith(".") and is_image_name(name)


class _Folder:
    """A folder of images; its tree is walked only if a name is not a path below it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise RatingError(f"Expected a folder of pictures, but {str(path)!r} is none.")
        self.path = path

    @cached_property
    def files(self) -> list[Path]:
        return image_files(self.path)

    @cached_property
    def _index(self) -> list[dict[str, list[Path]]]:
        """Files by relative path, by file name and by stem, all without regard to case."""
        keys: tuple[Callable[[Path], str], ...] = (
            lambda path: path.relative_to(self.path).as_posix().lower(),
            lambda path: path.name.lower(),
            lambda path: path.stem.lower(),
        )
        index: list[dict[str, list[Path]]] = []
        for key in keys:
            table: dict[str, list[Path]] = defaultdict(list)
            for path in self.files:
                table[key(path)].append(path)
            index.append(table)
        return index

    def find(self, name: str) -> list[Path]:
        """The files that a name fits best; one that is an absolute path stays itself."""
        name = name.replace("\\", "/").strip()
        exact = self.path / name
        if name and os.path.isfile(exact):  # Path.is_file raises for a name that no file system takes
            return [exact]
        parts = Path(name.lower())
        keys = (parts.as_posix(), parts.name, parts.stem if has_image_suffix(name) else parts.name)
        return next((found for table, key in zip(self._index, keys, strict=True) if (found := table.get(key))), [])
