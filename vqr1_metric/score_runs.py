"""Long runs: many images into one score file, a row for each, that go on where they were cut short.

from vqr1_metric import QualityScorer
from vqr1_metric.score_runs import score_to_file

summary = score_to_file(QualityScorer("nano"), ["photos/"], "scores.csv", recursive=True, resume=True)
"""

from __future__ import annotations

import itertools
import math
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from vqr1_metric import __version__, score_files
from vqr1_metric.backends.base import ScoringBackend
from vqr1_metric.functional.intervals import mean_interval
from vqr1_metric.images import ImageLike
from vqr1_metric.images.find import Found, ImageFinder
from vqr1_metric.images.names import ImageKeys
from vqr1_metric.images.urls import fetch_ahead
from vqr1_metric.results import ImageScore
from vqr1_metric.score_files import RecordError, RecordWriter

#: Probability of the interval of a mean.
LEVEL = 0.95


class StreamScorer(Protocol):
    """A :class:`~vqr1_metric.scorer.QualityScorer`, or what :mod:`~vqr1_metric.parts` puts in its place."""

    @property
    def backend(self) -> ScoringBackend:
        """The model, loaded now if it was not."""

    def card(self) -> dict[str, object]:
        """What to write beside scores."""

    def stream(self, images: Iterable[ImageLike], *, in_order: bool = True) -> Iterator[ImageScore]:
        """One result for each image."""


def score_to_file(
    scorer: StreamScorer,
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    recursive: bool = True,
    resume: bool = False,
    retry_errors: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
) -> dict[str, object]:
    """Score images into a ``.csv`` or ``.jsonl`` file, as ``vqr1 score -o`` does.

    Args:
        scorer: the model and its settings; what it is stands beside the file, in ``OUTPUT.meta.json``.
        images: files, folders, patterns and lists, see :class:`~vqr1_metric.images.find.ImageFinder`.
        output: the score file.
        recursive: folders with their subfolders.
        resume: go on with a file that is there; images that have a row are left out.
        retry_errors: like ``resume``, and score again what has no score.
        overwrite: replace a file that is there.
        shard: ``(i, n)``: the i-th of n parts of the images, from 1, into a file of its own name (:func:`shard_path`).

    Returns:
        ``images``, ``scored``, ``failed``, ``mean``, ``interval`` (95%) and ``level`` of all rows of the file.

    Raises:
        RecordError: if the file is there and neither ``resume`` nor ``overwrite`` is told, if its scores have another
            identity, or if another run writes it.
    """
    with ScoreRun(scorer, output, resume=resume, retry_errors=retry_errors, overwrite=overwrite, shard=shard) as run:
        for _ in run.rows(ImageFinder(images, recursive=recursive)):
            pass
    return run.tally.summary()


class Tally:
    """Counts, and 8 bytes for each score: all that a run remembers of its images, beside a hash of their names."""

    def __init__(self) -> None:
        self.rows = 0
        self.scores: array[float] = array("d")

    @property
    def scored(self) -> int:
        """Rows that have a score."""
        return len(self.scores)

    def add(self, score: float) -> None:
        """Count a row; NaN is one without a score."""
        self.rows += 1
        if not math.isnan(score):
            self.scores.append(score)

    def summary(self) -> dict[str, object]:
        """The mean of the scores there are, with its 95% interval; None without scores."""
        mean, interval = None, None
        if self.scored:
            scores = torch.frombuffer(self.scores, dtype=torch.float64)
            mean = float(scores.mean())
            if self.scored > 1:
                interval = [float(bound) for bound in mean_interval(scores, LEVEL)]
        counts = {"images": self.rows, "scored": self.scored, "failed": self.rows - self.scored}
        return {**counts, "mean": mean, "interval": interval, "level": LEVEL}


class ScoreRun:
    """One run into one file. It has the file for itself from the beginning to the end of the ``with`` block.

    Args:
        scorer, output, resume, retry_errors, overwrite, shard: see :func:`score_to_file`.

    Attributes:
        tally: of all rows of the file.
        meta: what the file's scores were made with.
        resumed: rows that were there before; None for a new file.
    """

    def __init__(
        self,
        scorer: StreamScorer,
        output: str | os.PathLike[str],
        *,
        resume: bool = False,
        retry_errors: bool = False,
        overwrite: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        self.scorer, self.shard, self.tally = scorer, shard, Tally()
        self.output = Path(output) if shard is None else shard_path(Path(output), *shard)
        check_output(self.output, resume=resume or retry_errors, overwrite=overwrite)
        self.meta = {**scorer.card(), "package": __version__, "started": datetime.now(UTC).isoformat("T", "seconds")}
        self._done: set[int] = set()
        self._writer = RecordWriter(self.output, overwrite=overwrite, extra=getattr(scorer, "columns", ()))
        try:
            # It may have appeared since it was checked.
            if not self._writer.empty and not (resume or retry_errors):
                raise _in_the_way(self.output)
            self.resumed = None if self._writer.empty else self._take_in(retry_errors)
        except BaseException:
            self._writer.close()
            raise

    def _take_in(self, retry_errors: bool) -> int:
        """What an earlier run wrote."""
        old = score_files.read_meta(self.output)
        score_files.check_same(self.output, old, self.meta)
        score_files.repair(self.output)
        if retry_errors:
            self._writer.drop_errors()
        self.meta = old
        self._writer.folder = score_files.base_folder(self.output, old)
        keys = ImageKeys(self._writer.folder)
        for name, score in score_files.read_rows(self.output):
            self._done.add(keys.key(name))
            self.tally.add(score)
        return self.tally.rows

    def rows(self, images: Iterable[Found], skipped: Callable[[], object] = lambda: None) -> Iterator[ImageScore]:
        """Score the images that have no row yet; each result comes when its row is written.

        Args:
            images: what an :class:`~vqr1_metric.images.find.ImageFinder` finds.
            skipped: called for every image that has a row.
        """
        names = _NameList()
        pending = self._pending(names.of(images), skipped)
        first = next(pending, None)
        if self.resumed is None and (first is not None or self.shard is not None):
            if first is not None:
                _ = self.scorer.backend  # a model that cannot be loaded leaves no file behind
            self._writer.clear()
            where = {"folder": score_files.folder_from(self.output)}
            part = {} if self.shard is None else {"shard": list(self.shard)}
            score_files.write_meta(self.output, self.meta | where | part)
        if self.shard is not None:
            self._writer.begin()
        if first is not None:
            for result in stream_found(self.scorer, itertools.chain([first], pending), in_order=False):
                self._writer.write(result)
                self.tally.add(result.score)
                yield result
        if self.shard is not None:
            finished = score_files.read_meta(self.output) | {"of": names.digest()}
            score_files.write_meta(self.output, finished)

    def _pending(self, images: Iterable[Found], skipped: Callable[[], object]) -> Iterator[Found]:
        keys = ImageKeys()
        for found in images:
            if self.shard is not None and not in_shard(found.name, *self.shard):
                continue
            if keys.key(found.name) in self._done:
                skipped()
            else:
                yield found

    def __enter__(self) -> ScoreRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def stream_found(scorer: StreamScorer, images: Iterable[Found], *, in_order: bool = True) -> Iterator[ImageScore]:
    """:meth:`~vqr1_metric.scorer.QualityScorer.stream` of what a finder finds.

    An image that was not found or not fetched is a result with the reason. Addresses are fetched ahead.
    """
    problems: deque[ImageScore] = deque()

    def contents() -> Iterator[ImageLike]:
        for name, content, problem in fetch_ahead(images):
            if problem is None:
                yield content
            else:
                problems.append(ImageScore.failed(name, f"{name}: {problem}"))

    for result in scorer.stream(contents(), in_order=in_order):
        while problems:
            yield problems.popleft()
        yield result
    yield from problems


def shard_path(output: Path, part: int, parts: int) -> Path:
    """Where a part goes: ``scores.csv`` becomes ``scores.2-of-8.csv``."""
    return output.with_name(f"{output.stem}.{part}-of-{parts}{output.suffix}")


def in_shard(name: str, part: int, parts: int) -> bool:
    """Does an image belong to this part? By its name as given, so that all parts have to get the same arguments."""
    return _hash(name) % parts == part - 1


def _hash(name: str) -> int:
    written = os.path.normpath(name).replace(os.sep, "/").encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(written, digest_size=8).digest(), "big")


class _NameList:
    """Number and sum of the hashes of names: equal for two parts that were given the same images."""

    def __init__(self) -> None:
        self._count = self._sum = 0

    def of(self, images: Iterable[Found]) -> Iterator[Found]:
        for found in images:
            self._count += 1
            self._sum = (self._sum + _hash(found.name)) % 2**64
            yield found

    def digest(self) -> str:
        return f"{self._count} images, {self._sum:016x}"


def check_output(output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise RecordError where an output cannot be written, before anything is loaded."""
    score_files.file_format(output)
    if not output.parent.is_dir():
        raise RecordError(f"no folder {str(output.parent)!r} to write {output.name!r} into")
    if output.exists() and output.stat().st_size and not (resume or overwrite):
        raise _in_the_way(output)


def _in_the_way(output: Path) -> RecordError:
    return RecordError(f"{output} exists: --resume continues it, --overwrite replaces it")
