"""Ray Data: score millions of pictures on many machines, into Parquet files, and go on where a run was cut short.

    import ray
    from vqr1_metric.integrations.ray import score_to_parquet

    pictures = ray.data.from_items([{"path": path} for path in paths])          # or read_parquet with a column of bytes
    scored = score_to_parquet(pictures, "scores/", column="path", concurrency=8, num_gpus=1)
    print(scored.mean("score"))

Distribution, placement, retries and streaming are Ray's own. Each actor holds one model.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vqr1_metric.integrations.datasets import PictureScorer
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

try:
    import pyarrow as pa
    import ray
    from pyarrow.fs import FileSystem
    from ray.data import Dataset

    from vqr1_metric.integrations.parquet import finished_keys, open_folder, write_file
except ModuleNotFoundError as error:
    if error.name not in ("ray", "pyarrow"):
        raise
    raise ModuleNotFoundError("vqr1_metric.integrations.ray needs Ray: pip install 'vqr1-metric[ray]'") from None


class ScoringActor:
    """A callable class for ``Dataset.map_batches``: adds the columns of
    :class:`~vqr1_metric.integrations.datasets.PictureScorer` to a batch.

    ``expected`` is the fingerprint that the scorer must have, in hexadecimal.

    :func:`score_to_parquet` uses it; use it yourself for a pipeline of your own::

        dataset.map_batches(ScoringActor, fn_constructor_kwargs={"model": "nano", "column": "path"}, concurrency=2)
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        column: str,
        drop_column: bool = False,
        expected: str | None = None,
        **options: Any,
    ) -> None:
        self.score = PictureScorer(model, column=column, **options)
        if expected is not None and _fingerprint(model, options) != expected:
            raise ValueError(
                f"The model {model!r} on this machine is not the one that this run began with: its files or what they "
                "are loaded as (dtype, kind of device) differ. Scores of both must not be mixed."
            )
        self.column, self.drop_column = column, drop_column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with its new columns."""
        kept = {name: values for name, values in batch.items() if not (self.drop_column and name == self.column)}
        return kept | {name: np.array(values, object) for name, values in self.score(batch).items()}


def score_to_parquet(
    dataset: Dataset,
    folder: str,
    *,
    column: str = "path",
    key: str | None = None,
    model: str = DEFAULT_MODEL,
    concurrency: int = 1,
    num_gpus: float = 0,
    batch_size: int = 64,
    rows_per_file: int = 1000,
    **options: Any,
) -> Dataset:
    """Score every row that ``folder`` does not hold yet, and write the scores there.

    Files appear whole or not at all. Run the same call again after an interruption: rows whose key is in a file are
    left out. Rows without a score (a damaged picture) have NaN and the reason, and count as finished.

    Args:
        dataset: rows with a column of absolute paths (which every machine must see) or of bytes.
        folder: for the Parquet files, a path or a URI that pyarrow knows (``s3://...``); every machine must see it.
        column: where the pictures are.
        key: a column whose values identify a row; by default ``column``. With another key the pictures' column is not
            written, so that bytes are not copied into the results.
        model: Hugging Face Hub name, local folder, or ``"nano"``.
        concurrency: actors, each with a model of its own.
        num_gpus: GPUs of each actor; may be a fraction.
        batch_size: rows that an actor takes at a time.
        rows_per_file: about as many as an interruption can cost for each actor.
        options: of :class:`~vqr1_metric.scorer.QualityScorer`.

    Returns:
        Everything in ``folder``, as ``ray.data.read_parquet``.

    Raises:
        ValueError: if the folder's scores came from another model or other settings.
    """
    key, folder = key or column, str(folder)
    # Workers may have another current directory.
    if "://" not in folder:
        folder = os.path.abspath(folder)
    if os.path.isdir(model):
        model = os.path.abspath(model)
    filesystem, root = open_folder(folder)
    # By a worker like those that score: what a dtype of None means depends on the device.
    worker = ray.remote(num_gpus=num_gpus)(_fingerprint)
    expected = ray.get(worker.remote(model, options))
    fingerprint = expected.encode()
    done = ray.put(finished_keys(filesystem, root, key, fingerprint))
    todo = dataset.map_batches(lambda batch: _without(batch, key, ray.get(done)), batch_size=None)
    scored = todo.map_batches(
        ScoringActor,
        fn_constructor_kwargs={
            "model": model,
            "column": column,
            "drop_column": key != column,
            "expected": expected,
            **options,
        },
        concurrency=concurrency,
        num_gpus=num_gpus,
        batch_size=batch_size,
    )
    scored.map_batches(
        lambda table: _write(table, filesystem, root, key, fingerprint),
        batch_format="pyarrow",
        batch_size=rows_per_file,
    ).materialize()
    return ray.data.read_parquet(folder)


def _fingerprint(model: str, options: dict[str, Any]) -> str:
    return f"{QualityScorer(model, **options).fingerprint:x}"


def _without(batch: dict[str, np.ndarray], key: str, done: set[Any]) -> dict[str, np.ndarray]:
    if key not in batch:
        raise ValueError(f"Expected a column {key!r} that identifies a row, but there are {', '.join(batch)}.")
    new = np.array([value not in done for value in batch[key].tolist()], bool)
    return {name: values[new] for name, values in batch.items()}


def _write(table: pa.Table, filesystem: FileSystem, root: str, key: str, fingerprint: bytes) -> pa.Table:
    error = table.schema.get_field_index("error")
    # A column of nothing but None would have no type, and a batch without errors is the usual one.
    table = table.set_column(error, "error", table["error"].cast(pa.string()))
    write_file(table, filesystem, root, key, fingerprint)
    return pa.table({"rows": [table.num_rows]})
