"""The checkpoints that are known: one table for messages, documents and defaults.

python -m vqr1_metric.backends.checkpoints        print it as Markdown, as docs/models.md shows it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint.

    Args:
        name: on the Hugging Face Hub, or of the embedded model.
        architecture: the model class of transformers, and the number of weights.
        trained_on: rated pictures that it learned from; scores of these data sets are no evidence.
        question: version of the question it was trained to answer, None where it was not trained for one.
        readout: how its score is read.
        revision: commit that was tried with this package, None where none was.
        licence: of the weights, as their owner states it.
        spellings: blank space around the number in its answers (the readout's calibration), None where not measured.
        weights: hash of the weights that ``spellings`` was measured on.
    """

    name: str
    architecture: str
    trained_on: str
    question: str | None
    readout: str
    revision: str | None = None
    licence: str = ""
    spellings: tuple[str, ...] | None = None
    weights: str | None = None


_R1 = "visualquality-r1/1"
_ONE_PASS = "one pass; reasoning with mode='think'"
_UNTRAINED = "not for quality; a starting point for `vqr1 train`"
CHECKPOINTS = (
    Checkpoint(
        "nano",
        "a few million weights, in this package",
        "BIQ2021 (its model card says how)",
        _R1,
        "one pass",
        licence="see MODEL_CARD.md",
        spellings=("",),
        weights="3fb09972c3b6f852f4352b82b4d32d0d",
    ),
    Checkpoint(
        "TianheWu/VisualQuality-R1-7B",
        "Qwen2.5-VL 7B",
        "a combination of synthetic and realistic sets that its card does not name",
        _R1,
        _ONE_PASS,
        licence="MIT",
    ),
    Checkpoint(
        "TianheWu/VisualQuality-R1-7B-preview",
        "Qwen2.5-VL 7B",
        "KADID-10k, TID2013, KonIQ-10k",
        _R1,
        _ONE_PASS,
        licence="MIT",
    ),
    Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL 3B", _UNTRAINED, None, "one pass"),
    Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL 7B", _UNTRAINED, None, "one pass"),
    Checkpoint("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL 2B", _UNTRAINED, None, "one pass"),
    Checkpoint("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL 4B", _UNTRAINED, None, "one pass"),
    Checkpoint("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL 8B", _UNTRAINED, None, "one pass"),
)


def near_names(name: str) -> list[str]:
    """Known names that somebody who wrote this one may have meant, the likeliest first, at most three."""
    written = name.lower().strip("/ ")
    scores = []
    for checkpoint in CHECKPOINTS:
        known = checkpoint.name.lower()
        tail = known.rpartition("/")[2]
        ratio = max(
            difflib.SequenceMatcher(None, a, b).ratio()
            for a, b in ((written, known), (written.rpartition("/")[2], tail))
        )
        begins = known.startswith(written) or tail.startswith(written.rpartition("/")[2])
        if written and (ratio > 0.8 or (begins and len(written) > 3)):
            scores.append((-ratio, checkpoint.name))
    return [name for _, name in sorted(scores)[:3]]


def known_spellings(weights: object) -> tuple[str, ...] | None:
    """The spellings measured on weights of this hash, None where they are not in the table."""
    found = (c.spellings for c in CHECKPOINTS if c.weights is not None and c.weights == weights)
    return next(found, None)


def markdown() -> Iterator[str]:
    """The lines of the table."""
    yield "| model | architecture | rated pictures it learned from | question | score read by | terms of the weights |"
    yield "|---|---|---|---|---|---|"
    for c in CHECKPOINTS:
        cells = (
            f"`{c.name}`",
            c.architecture,
            c.trained_on,
            c.question or "none",
            c.readout,
            c.licence or "on its page",
        )
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(markdown()))
