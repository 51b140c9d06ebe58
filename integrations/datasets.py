"""Hugging Face datasets: score a column of pictures with ``Dataset.map``.

    from datasets import load_dataset
    from vqr1_metric.integrations.datasets import PictureScorer

    scored = load_dataset("imagefolder", data_dir="photos")["train"].map(
        PictureScorer("nano", column="image"), batched=True, batch_size=32
    )
    scored["score"]

The same callable is what :mod:`vqr1_metric.integrations.ray` runs in its actors. It imports neither library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer


class PictureScorer:
    """From a batch of rows to their scores.

    Args:
        model: Hugging Face Hub name, local folder, or ``"nano"``.
        column: where the pictures are: paths, bytes, decoded pictures, or the dictionaries with ``bytes`` and ``path``
            that an undecoded ``datasets.Image`` column holds.
        prefix: put before the names of the new columns.
        options: of :class:`~vqr1_metric.scorer.QualityScorer`.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, column: str = "image", prefix: str = "", **options: Any) -> None:
        self.scorer = QualityScorer(model, **options)
        self.column, self.prefix = column, prefix

    def __getstate__(self) -> dict[str, Any]:
        # Part of what `datasets` hashes for its cache: a path would still be the same when the model behind it is not.
        return {**self.__dict__, "fingerprint": self.scorer.fingerprint}

    def __call__(self, batch: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
        """New columns ``score`` (1 to 5, NaN where there is none), ``std``, ``coverage``, ``tag_probability`` and
        ``error`` (None, or why there is no score)."""
        if self.column not in batch:
            raise ValueError(f"Expected a column {self.column!r} of pictures, but there are {', '.join(batch)}.")
        pictures = [_picture(value) for value in batch[self.column]]
        scored = self.scorer.stream(picture for picture in pictures if picture is not None)
        missing = ImageScore.failed("", "expected a path, bytes, a PIL picture, an array or a tensor, but got NoneType")
        results = [missing if picture is None else next(scored) for picture in pictures]
        columns: dict[str, list[Any]] = {
            name: [getattr(r, name) for r in results] for name in ("score", "std", "coverage", "tag_probability")
        }
        columns["error"] = [_error(result) for result in results]
        return {self.prefix + name: values for name, values in columns.items()}


def _picture(value: Any) -> Any:
    """What ``load_image`` takes, None where the row has no picture; anything else raises."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


def _error(result: ImageScore) -> str | None:
    """Without the name, which for anything but a path is a place in a batch that nobody knows of later."""
    return None if result.error is None else result.error.removeprefix(f"{result.name}: ")
