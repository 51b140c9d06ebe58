"""Score files of several runs into one."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqr1_metric import score_files
from vqr1_metric.images.names import ImageKeys, escape_name, is_url
from vqr1_metric.score_files import RecordError


def merge(parts: Sequence[Path], output: Path, *, overwrite: bool = False) -> tuple[int, int]:
    """Write the rows of all parts into one file: all of it or nothing.

    An image that several parts hold gets one row, one with a score if there is any, else the first.

    Args:
        parts: score files of one kind and one identity. Parts of one ``--shard`` have to be complete and finished.
        output: the new file, with its meta data beside it.
        overwrite: replace a file that is there.

    Returns:
        Rows written, and rows left out because the image has another.

    Raises:
        RecordError: if they were made with other settings, if one is missing or still written, or if the output is
            there.
    """
    kind = score_files.file_format(output)
    if any(score_files.file_format(part) != kind for part in parts):
        raise RecordError(f"Expected parts that end in {kind}, as {output} does.")
    if output.exists() and not overwrite:
        raise RecordError(f"{output} exists: --overwrite replaces it")
    if any(part.resolve() == output.resolve() for part in parts):
        raise RecordError(f"{output} is one of the parts: choose another output file")
    missing = [str(part) for part in parts if not part.is_file()]
    if missing:
        raise RecordError(f"no file {missing[0]!r}")
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(score_files.open_locked(part))
        metas = [score_files.read_meta(part) for part in parts]
        for part, meta in zip(parts[1:], metas[1:], strict=True):
            score_files.check_same(part, meta, metas[0])
        _check_shards(parts, metas)
        for part in parts:
            score_files.repair(part)
        best, rows = _best_rows(parts, metas)
        temporary = output.with_name(output.name + ".tmp")
        base = score_files.folder_from(output)
        with temporary.open("wb") as file:
            if kind == ".csv":
                file.write(next(iter(score_files.lines_and_rows(parts[0])))[0])  # the header
            for index, (part, meta) in enumerate(zip(parts, metas, strict=True)):
                folder = score_files.base_folder(part, meta)
                for number, (line, (name, _, _)) in enumerate(score_files.lines_and_rows(part)):
                    if name is not None and (index, number) in best:
                        file.write(_renamed(line, name, folder, kind))
            file.flush()
            os.fsync(file.fileno())
        meta = {key: value for key, value in metas[0].items() if key not in ("shard", "of")} | {"folder": base}
        score_files.write_meta(output, meta)
        os.replace(temporary, output)
    return len(best), rows - len(best)


def _check_shards(parts: Sequence[Path], metas: Sequence[dict[str, Any]]) -> None:
    shards = [meta["shard"] for meta in metas if "shard" in meta]
    if not shards:
        return
    counts = {count for _, count in shards}
    there = {number for number, _ in shards}
    if len(counts) > 1 or len(shards) < len(parts):
        raise RecordError("Expected all parts of one --shard, but they are of several, or of none.")
    missing = sorted(set(range(1, counts.pop() + 1)) - there)
    if missing:
        raise RecordError(f"Expected all parts, but {', '.join(map(str, missing))} of {shards[0][1]} is missing.")
    for part, meta in zip(parts, metas, strict=True):
        if "of" not in meta:
            raise RecordError(f"{part}: this part is not finished; --resume completes it")
        if meta["of"] != metas[0]["of"]:
            raise RecordError(
                f"{part}: was given {meta['of']}, but {parts[0]} was given {metas[0]['of']}: all parts have to get the "
                "same arguments, and find the same images."
            )


def _best_rows(parts: Sequence[Path], metas: Sequence[dict[str, Any]]) -> tuple[set[tuple[int, int]], int]:
    """Part and line of the one row of each image, and how many rows there are in all."""
    chosen: dict[int, tuple[bool, tuple[int, int]]] = {}
    rows = 0
    for index, (part, meta) in enumerate(zip(parts, metas, strict=True)):
        keys = ImageKeys(score_files.base_folder(part, meta))
        for number, (_, (name, score, _)) in enumerate(score_files.lines_and_rows(part)):
            if name is not None:
                rows += 1
                key, scored = keys.key(name), not math.isnan(score)
                if key not in chosen or (scored and not chosen[key][0]):
                    chosen[key] = (scored, (index, number))
    return {place for _, place in chosen.values()}, rows


def _renamed(line: bytes, name: str, folder: str, kind: str) -> bytes:
    """The line with its name as seen from here."""
    if os.path.isabs(name) or is_url(name) or os.path.samefile(folder, os.curdir):
        return line
    seen = score_files.renamed(name, os.curdir, folder)
    if kind == ".csv":
        row = next(csv.reader([line.decode()]))
        return score_files.csv_line([score_files.cell(seen), *row[1:]])
    return json.dumps(json.loads(line) | {"path": escape_name(seen)}).encode() + b"\n"
