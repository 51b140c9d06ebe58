"""Which blank space a model writes around its number: measured once for its weights, and remembered on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from vqr1_metric.backends.checkpoints import known_spellings
from vqr1_metric.backends.digests import digest_of
from vqr1_metric.protocol import VISUALQUALITY_R1, Question

#: Raise it when the measurement changes: what was remembered before then no longer counts.
_VERSION = 1


def used_spellings(
    identity: Mapping[str, object] | None, question: Question, measure: Callable[[], tuple[str, ...]]
) -> tuple[str, ...]:
    """The spellings of an answer that a model uses: from the table of checkpoints, this machine's memory, or measured.

    Args:
        identity: what the model is, by content; None for weights in memory, which are measured each time.
        question: what it is asked.
        measure: measures them.
    """
    if identity is None:
        return measure()
    if question == VISUALQUALITY_R1 and (known := known_spellings(identity.get("weights"))) is not None:
        return known
    key = digest_of(json.dumps([_VERSION, identity, question.identity()], sort_keys=True))
    path = cache_folder() / "spellings" / f"{key}.json"
    found = _read(path)
    if found and set(found) <= set(question.spellings):
        return found
    found = measure()
    with contextlib.suppress(OSError):  # a home that cannot be written costs a pass, no more
        _write(path, found)
    return found


def cache_folder() -> Path:
    """Where this package remembers what can be measured again: ``VQR1_CACHE``, or the user's folder for such files."""
    told = os.environ.get("VQR1_CACHE")
    if told:
        return Path(told)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "vqr1_metric"


def _read(path: Path) -> tuple[str, ...] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tuple(found) if isinstance(found, list) and all(isinstance(text, str) for text in found) else None


def _write(path: Path, spellings: tuple[str, ...]) -> None:
    """All of it or nothing, whoever else writes: two processes measure the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(spellings, file)
    os.replace(temporary, path)
