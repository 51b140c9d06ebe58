"""Warnings that name the line of the user's program, through whatever libraries it called."""

from __future__ import annotations

import sys
import warnings

#: Frames of these packages are passed over: what a caller can change is not there.
_PASSED = ("vqr1_metric", "torch", "torchmetrics", "contextlib", "functools")
_said: set[tuple[str, int, str]] = set()


def warn_caller(message: str, *, once: str | None = None) -> None:
    """A ``UserWarning`` at the line outside this library, torch and torchmetrics that led here.

    Args:
        message: what is wrong and what to do.
        once: a name; the same line is then warned of it only once in this process. Without, Python's own filter of
            repeated warnings does not apply either: whoever calls this decides when it is said again.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        frame = frame.f_back
    place = (frame.f_code.co_filename, frame.f_lineno)
    if once is not None:
        if (*place, once) in _said:
            return
        _said.add((*place, once))
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(message, UserWarning, *place, module=module, registry={})
