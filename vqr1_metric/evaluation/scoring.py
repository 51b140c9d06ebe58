"""Scores of a model for many pictures: cached by content, resumable, by several processes with the same result as one.

A cache entry belongs to a picture's SHA-256, to the scorer's identity and to the data set's resizing. Pictures are
scored in chunks that do not depend on how many processes there are, and a chunk is written at once, so that neither a
kill nor another number of processes changes the composition of a batch, and with it the last digits.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vqr1_metric import score_files
from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.images import ImageError, ImageLike
from vqr1_metric.ratings import RatedImage
from vqr1_metric.scorer import QualityScorer

#: Pictures that one process scores before it writes; need not be a multiple of the batch size.
CHUNK = 32
#: Decimals of a score that count. Matrix products of one machine were once seen to differ in the sixth between runs.
DIGITS = 4


def made_by(scorer: QualityScorer, short_edge: int | None = None) -> dict[str, Any]:
    """What to write beside scores: the model's name and revision, everything that decides a score, the resizing."""
    card = scorer.card()
    return {"model": card["model"], "revision": card["revision"], **scorer.identity(), "short_edge": short_edge}


class ScoreCache:
    """Rows of scores on the disk, one folder for each identity, one file for each process that writes.

    Args:
        folder: where caches are kept.
        identity: what decides a score.
        rank: number of the writing process.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int = 0) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (self.folder / "identity.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        self._file = self.folder / f"scores-{rank}.jsonl"
        if self._file.exists():
            score_files.repair(self._file)

    def read(self) -> dict[str, dict[str, Any]]:
        """All rows by picture hash, those of other processes too."""
        rows = {}
        for file in sorted(self.folder.glob("scores-*.jsonl")):
            data = file.read_bytes()
            for line in data[: data.rfind(b"\n") + 1].splitlines():  # another process may be within a line
                row = json.loads(line)
                rows[row["picture"]] = row
        return rows

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, all of them with one write."""
        with self._file.open("ab", buffering=0) as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def score_items(
    scorer: QualityScorer,
    items: Sequence[RatedImage],
    cache: Path,
    short_edge: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """A row for each labelled picture: what :func:`vqr1_metric.score_files.as_json` makes of its result.

    Args:
        items: pictures with a path.
        cache: folder of the cache.
        short_edge: pictures are reduced to it.
        progress: see :func:`score_pictures`.
    """
    paths = [Path(item.path or item.name) for item in items]
    pictures = [(picture_hash(path), partial(_load, path, short_edge)) for path in paths]
    rows = score_pictures(scorer, pictures, cache, progress, short_edge=short_edge)
    # Equal pictures share a row, which has the name of the first.
    return [{**row, "path": str(item.path)} for row, item in zip(rows, items, strict=True)]


def score_pictures(
    scorer: QualityScorer,
    pictures: Sequence[tuple[str, Callable[[], ImageLike]]],
    cache: Path,
    progress: Callable[[int], object] = lambda count: None,
    *,
    short_edge: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each picture, scored or from the cache.

    Started by ``torchrun`` or ``accelerate launch``, every process scores its share and waits for the others; all of
    them get all rows. They need one file system.

    Args:
        pictures: for each a key that changes when its pixels do, and a function that gives it.
        cache: folder of the cache.
        progress: told how many pictures have just been done (by this process, or found in the cache).
        short_edge: what the functions reduce a picture to.
    """
    rank, processes = process_rank()
    store = ScoreCache(cache, {**scorer.identity(), "short_edge": short_edge}, rank)
    known = store.read()
    wait_for_all()  # or one process could write before another has seen what is left to do
    unique = dict(reversed(pictures))  # of equal pictures the first
    order = list(dict.fromkeys(key for key, _ in pictures))
    for number, start in enumerate(range(0, len(order), CHUNK)):
        chunk = order[start : start + CHUNK]
        todo = [key for key in chunk if key not in known]
        if todo and number % processes == rank:
            results = scorer.stream(unique[key]() for key in todo)
            store.append([{"picture": key, **score_files.as_json(r)} for key, r in zip(todo, results, strict=True)])
        if not todo or number % processes == rank:
            progress(len(chunk))
    wait_for_all()
    rows = store.read()
    return [_settled(rows[key]) for key, _ in pictures]


def picture_hash(path: Path) -> str:
    """SHA-256 of a file; of its name, marked as such, where it cannot be read (the scorer then says why)."""
    try:
        if path.is_file():  # opening a pipe would wait for ever
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        pass
    return "unreadable:" + hashlib.sha256(os.fsencode(path)).hexdigest()


def process_rank() -> tuple[int, int]:
    """``(rank, processes)`` as ``torchrun`` and ``accelerate launch`` state them; (0, 1) without either."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> str | None:
    """The GPU of this process where several share a machine; None (the scorer's own choice) otherwise."""
    if process_rank()[1] == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process_rank()[1] == 1:
        return
    if not torch.distributed.is_initialized():
        # The slowest process may need much longer than the default of half an hour.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(_leave)  # no thread of it may be left when the interpreter ends
    torch.distributed.barrier()


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _settled(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the digits that differ between runs."""
    return {**row, **{name: round(row[name], DIGITS) for name in ("score", "std") if row[name] is not None}}


def _load(path: Path, short_edge: int | None) -> ImageLike:
    if short_edge is None:
        return path
    try:
        return load_picture(path, short_edge)
    except ImageError:
        return path  # the scorer finds the same fault and reports it


def __getattr__(name: str) -> object:
    if name == "scorer_identity":
        raise ImportError(f"{__name__}.{name} of version 0.1.0 is now vqr1_metric.evaluation.scoring.made_by.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
