"""Scores in Parquet files, on one machine, in a folder that a run can be resumed into.

    from vqr1_metric import QualityScorer
    from vqr1_metric.integrations.parquet import score_to_parquet

    score_to_parquet(QualityScorer("nano"), ["photos/"], "scores/")
    pyarrow.parquet.read_table("scores/")

Many machines: :mod:`vqr1_metric.integrations.ray`, which writes the same files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from vqr1_metric.images.find import Found, ImageFinder
from vqr1_metric.images.names import ImageKeys, escape_name
from vqr1_metric.results import ImageScore
from vqr1_metric.score_runs import stream_found

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    raise ModuleNotFoundError("Scores in Parquet files need pyarrow: pip install 'vqr1-metric[parquet]'") from None

if TYPE_CHECKING:
    from vqr1_metric.scorer import QualityScorer

#: In the schema of every file: what made the scores, so that two models are never mixed in one folder.
FINGERPRINT = b"vqr1_fingerprint"
_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "score": pa.float64(),
        "std": pa.float64(),
        "coverage": pa.float64(),
        "tag_probability": pa.float64(),
        "error": pa.string(),
    }
)


def score_to_parquet(
    scorer: QualityScorer,
    images: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    recursive: bool = True,
    rows_per_file: int = 1000,
) -> int:
    """Score every image that ``folder`` does not hold yet, and write the scores there.

    Files appear whole or not at all. Run the same call again after an interruption: images that have a row are left
    out. Images without a score have NaN and the reason, and count as finished.

    Args:
        scorer: the model.
        images: files, folders, patterns and lists, see :class:`~vqr1_metric.images.find.ImageFinder`.
        folder: for the files, a path or a URI that pyarrow knows (``s3://...``).
        recursive: folders with their subfolders.
        rows_per_file: as many as an interruption can cost.

    Returns:
        The rows that were added. The column ``path`` holds absolute paths, written with
        :func:`~vqr1_metric.images.names.escape_name`.

    Raises:
        ValueError: if the folder's scores came from another model or other settings.
    """
    filesystem, root = open_folder(os.fspath(folder))
    fingerprint = f"{scorer.fingerprint:x}".encode()
    done = finished_keys(filesystem, root, "path", fingerprint)
    keys = ImageKeys()

    def pending() -> Iterator[Found]:
        for found in ImageFinder(images, recursive=recursive):
            if escape_name(keys.place(found.name)) not in done:
                yield found

    added = 0
    results = stream_found(scorer, pending(), in_order=False)
    while rows := [_row(result, keys) for result in islice(results, rows_per_file)]:
        write_file(pa.Table.from_pylist(rows, _SCHEMA), filesystem, root, "path", fingerprint)
        added += len(rows)
    return added


def _row(result: ImageScore, keys: ImageKeys) -> dict[str, object]:
    numbers = {name: getattr(result, name) for name in ("score", "std", "coverage", "tag_probability")}
    reason = None if result.error is None else escape_name(result.error.removeprefix(f"{result.name}: "))
    return {"path": escape_name(keys.place(result.name)), **numbers, "error": reason}


def open_folder(folder: str) -> tuple[FileSystem, str]:
    """The file system and the path in it; the folder is made where it is missing."""
    filesystem, root = FileSystem.from_uri(folder) if "://" in folder else (LocalFileSystem(), os.path.abspath(folder))
    if filesystem.get_file_info(root).type == FileType.NotFound:
        filesystem.create_dir(root, recursive=True)
    return filesystem, root.rstrip("/")


def finished_keys(filesystem: FileSystem, root: str, key: str, fingerprint: bytes) -> set[object]:
    """The keys of all rows in the folder."""
    keys: set[object] = set()
    for info in filesystem.get_file_info(FileSelector(root)):
        if info.extension != "parquet":
            continue
        table = pq.read_table(info.path, columns=[key], filesystem=filesystem)
        if (table.schema.metadata or {}).get(FINGERPRINT) != fingerprint:
            raise ValueError(
                f"Expected scores of this model and these settings in {root}, but {info.path} holds others, which must "
                "not be mixed: choose another folder, or the settings of before."
            )
        keys.update(table[key].to_pylist())
    return keys


def write_file(table: pa.Table, filesystem: FileSystem, root: str, key: str, fingerprint: bytes) -> None:
    """Write one file, under a name made of its keys: a task that is run again replaces its own file."""
    name = hashlib.sha256("\n".join(map(str, table[key].to_pylist())).encode()).hexdigest()[:32]
    table = table.replace_schema_metadata({FINGERPRINT: fingerprint})
    pq.write_table(table, f"{root}/{name}.unfinished", filesystem=filesystem)
    filesystem.move(f"{root}/{name}.unfinished", f"{root}/{name}.parquet")
