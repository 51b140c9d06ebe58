"""From arguments (files, folders, patterns, lists, addresses) to images, one after the other, nothing left out in
silence: what is passed over is counted, with the reason."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from vqr1_metric.images.lists import SUFFIXES as LIST_SUFFIXES
from vqr1_metric.images.lists import ListError, read_list
from vqr1_metric.images.names import ImageKeys, escape_name, is_url

_MAGIC = frozenset("*?[")
#: Images that Pillow alone does not open: naming one is better than passing over it.
_OTHER_IMAGES = frozenset((
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".exr", ".hdr", ".svg", ".psb",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
))  # fmt: skip
#: Not images, though Pillow knows the suffix.
_DOCUMENTS = frozenset((".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".emf", ".wmf"))


@dataclass(frozen=True)
class Found:
    """One image by its name, or the reason why an argument stands for none (``problem``)."""

    name: str
    problem: str | None = None


@dataclass
class Counts:
    """What was found: ``taken + repeated + sum(skipped) + refused`` of it.

    Args:
        taken: images that were handed on.
        repeated: reached before, by another argument or through a linked folder.
        skipped: passed over, by reason.
        refused: folders, lists and arguments that stand for nothing or cannot be read; each is handed on as a problem.
    """

    taken: int = 0
    repeated: int = 0
    refused: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """In words; empty if everything was taken."""
        parts = [f"{count} {reason}" for reason, count in self.skipped.most_common(6)]
        parts += (
            [f"{rest} others"]
            if (rest := sum(self.skipped.values()) - sum(n for _, n in self.skipped.most_common(6)))
            else []
        )
        parts += [f"{self.repeated} named or linked twice"] if self.repeated else []
        parts += [f"{self.refused} that cannot be read or stand for nothing"] if self.refused else []
        return f"images taken: {self.taken}; passed over: {', '.join(parts)}" if parts else ""


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of images, in small letters: all that Pillow and its registered plugins know, and some they do not."""
    from PIL import Image

    return frozenset(Image.registered_extensions()) - _DOCUMENTS | _OTHER_IMAGES


def is_image_name(name: str) -> bool:
    """Does the suffix say that it is an image?"""
    return os.path.splitext(name)[1].lower() in image_suffixes()


class ImageFinder:
    """The images that arguments stand for, in the order of the arguments. Iterate over it once.

    A folder stands for its files with an image's suffix, sorted, hidden ones left out; with ``recursive`` for those of
    its subfolders too, linked ones included, each real folder once. A pattern is matched here where the shell did not
    (``**`` reaches into subfolders). A ``.txt``, ``.csv``, ``.tsv`` or ``.jsonl`` file is a list
    (:mod:`~vqr1_metric.images.lists`); names in it are relative to it. Any other file is an image, whatever its name.
    ``-`` is a list on standard input. What stands for nothing, and what cannot be read, comes as a problem.

    Args:
        arguments: files, folders, patterns, lists.
        recursive: folders with their subfolders.
        files_from: files that hold a name a line (or tables, by their suffix), relative to the current folder; ``-`` is
            standard input.
        null: the names in ``files_from`` and on standard input end with a NUL.
        suffixes: what folders and patterns stand for; all images by default.
        urls: take ``https://`` addresses too; without, one is a problem.
        note: called with name and reason for everything that is passed over.

    Attributes:
        counts: what was found so far.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]] = (),
        *,
        recursive: bool = False,
        files_from: Sequence[str] = (),
        null: bool = False,
        urls: bool = False,
        suffixes: frozenset[str] | None = None,
        note: Callable[[str, str], object] = lambda name, reason: None,
    ) -> None:
        self._arguments = [os.fspath(argument) for argument in arguments]
        self._files_from, self._recursive, self._null, self._urls = list(files_from), recursive, null, urls
        self._note = note
        self._suffixes = suffixes
        self._keys = ImageKeys()
        self.counts = Counts()

    @property
    def reads_input(self) -> bool:
        """Is a list read from standard input, which can be done once only?"""
        return "-" in (*self._arguments, *self._files_from)

    def __iter__(self) -> Iterator[Found]:
        seen: set[int] = set()
        for found in self.all():
            key = self._keys.key(found.name)
            if found.problem is not None:
                self.counts.refused += 1
            elif key in seen:
                self.counts.repeated += 1
                self._note(found.name, "named or linked twice")
                continue
            else:
                self.counts.taken += 1
            seen.add(key)
            yield found

    def all(self) -> Iterator[Found]:
        """The same without a memory of names: what is reached twice comes twice."""
        for argument in self._arguments:
            yield from self._or_problem(argument, self._expand(argument))
        for path in self._files_from:
            yield from self._or_problem(path, self._listed(path, ""))

    def _or_problem(self, argument: str, found: Iterator[Found]) -> Iterator[Found]:
        nothing = True
        for one in found:
            nothing = False
            yield one
        if nothing:
            yield Found(argument, self._why_nothing(argument))

    def _expand(self, argument: str) -> Iterator[Found]:
        if argument == "-":
            yield from self._listed("-", "")
        elif is_url(argument):
            yield self._address(argument)
        elif os.path.isdir(argument):
            yield from self._folder(argument)
        elif os.path.isfile(argument) and argument.lower().endswith(LIST_SUFFIXES):
            yield from self._listed(argument, os.path.dirname(argument))
        elif _MAGIC & set(argument) and not os.path.lexists(argument):
            yield from self._pattern(argument)
        else:
            yield Found(argument)

    def _why_nothing(self, argument: str) -> str:
        if argument in self._files_from or argument == "-" or os.path.isfile(argument):
            return "lists no images"
        if os.path.isdir(argument):
            return "holds no images" + ("" if self._recursive else "; -r searches its subfolders too")
        return "matches no image"

    def _address(self, name: str) -> Found:
        if not self._urls:
            return Found(name, "is an address; --urls fetches https:// addresses")
        return (
            Found(name) if name.startswith("https://") else Found(name, "is not fetched: only https:// addresses are")
        )

    def _listed(self, path: str, folder: str) -> Iterator[Found]:
        try:
            for name in read_list(path, null=self._null and (path == "-" or path in self._files_from)):
                yield self._address(name) if is_url(name) else Found(os.path.join(folder, name))
        except ListError as error:
            yield Found(path, str(error))

    def _folder(self, top: str) -> Iterator[Found]:
        """Files first, then subfolders, both sorted, as ``os.walk`` does; a real folder is entered once."""
        entered: set[tuple[int, ...]] = set()
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                if not _first_time(folder, entered):
                    self._skip(folder, "folders linked twice")
                    continue
                with os.scandir(folder) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                yield Found(folder, f"cannot be read ({error.strerror})")
                continue
            subfolders = []
            for entry in inside:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    self._skip(path, "hidden")
                elif _is_folder(path):
                    subfolders.append(path)
                elif self._is_image(path):
                    yield Found(path)
            if self._recursive:
                waiting += reversed(subfolders)
            else:
                for path in subfolders:
                    self._skip(path, "subfolders (-r takes them)")

    def _pattern(self, pattern: str) -> Iterator[Found]:
        """Images that match, sorted; a walk of its own, because ``glob`` goes round in linked folders."""
        parts = pattern.replace(os.sep, "/").split("/")
        fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
        root = "".join(part + "/" for part in parts[:fixed])
        for name in sorted(set(_matches(root, tuple(parts[fixed:]), set()))):
            if _is_folder(name):
                self._skip(name, "folders that match a pattern")
            elif self._is_image(name):
                yield Found(name)

    def _is_image(self, path: str) -> bool:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in (image_suffixes() if self._suffixes is None else self._suffixes):
            return True
        self._skip(path, f"not images by their suffix ({escape_name(suffix)})" if suffix else "without a suffix")
        return False

    def _skip(self, name: str, reason: str) -> None:
        self.counts.skipped[reason] += 1
        self._note(name, reason)


def find_images(folder: str | os.PathLike[str], *, recursive: bool = True) -> list[str]:
    """Names of the images in a folder, sorted; see :class:`ImageFinder`."""
    return [found.name for found in ImageFinder([folder], recursive=recursive) if found.problem is None]


def _is_folder(path: str) -> bool:
    try:
        return os.path.isdir(path)
    except (OSError, ValueError):
        return False


def _first_time(folder: str, entered: set[tuple[int, ...]], *state: int) -> bool:
    """Is this real folder new (in this state)? It is remembered."""
    status = os.stat(folder)
    place = (status.st_dev, status.st_ino, *state)
    new = place not in entered
    entered.add(place)
    return new


def _matches(folder: str, parts: tuple[str, ...], entered: set[tuple[int, ...]]) -> Iterator[str]:
    """Names below ``folder`` that match; ``**`` enters each real folder once."""
    first, rest = parts[0], parts[1:]
    if not _MAGIC & set(first):
        if os.path.lexists(folder + first):
            yield from _matches(folder + first + "/", rest, entered) if rest else [folder + first]
        return
    try:
        if first == "**" and not _first_time(folder or os.curdir, entered, len(parts)):
            return
        names = sorted(os.listdir(folder or os.curdir))
    except OSError:
        return
    if first == "**" and rest:
        yield from _matches(folder, rest, entered)
    for name in names:
        if name.startswith(".") and not first.startswith("."):
            continue
        if first == "**":
            if _is_folder(folder + name):
                yield from _matches(folder + name + "/", parts, entered)
            elif not rest:
                yield folder + name
        elif fnmatch.fnmatchcase(name, first):
            yield from _matches(folder + name + "/", rest, entered) if rest else [folder + name]
