"""Standard streams that are closed, full, or cannot show a character."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def open_standard_streams() -> None:
    """Connect closed ones with nothing, and let none fail on a character.

    An output file that got the number of a closed stream would receive what C libraries print there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # File names need not be text in the terminal's encoding.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def give_up(stream: Any) -> None:
    """Connect a stream that nobody reads, or that is full, with nothing, so that Python does not complain at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, stream.fileno())
        os.close(target)


@contextlib.contextmanager
def forgiving_stderr() -> Iterator[None]:
    """Bars and warnings that cannot be written are lost, and not the run with them."""
    stream = sys.stderr
    sys.stderr = _Forgiving(stream)
    try:
        yield
    finally:
        sys.stderr = stream


class _Forgiving:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
            return len(text)
        give_up(self._stream)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
