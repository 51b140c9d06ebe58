"""A model's chat template, a program from a stranger: rendered within bounds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vqr1_metric.backends.base import ModelError, as_model_error

#: Lines of a template that may run: the templates of Qwen's models run a few hundred for one turn.
_MOST_LINES = 20_000
#: Seconds and bytes that they may take; far more than a chat needs on the busiest machine.
_MOST_SECONDS, _MOST_BYTES = 20.0, 1 << 30
_STATM = Path("/proc/self/statm")


class _TooMuch(Exception):
    pass


def render_chat(
    tokenizer: Any, template: str, chat: Sequence[dict[str, Any]], *, add_vision_id: bool = False, name: str = "model"
) -> str:
    """The chat as the model reads it, up to where its reply begins.

    Raises:
        ModelError: for a template that is none, fails, or does not come to an end.
    """
    with as_model_error(name, "its chat template fails"), _bounded(name):
        text = tokenizer.apply_chat_template(
            list(chat), chat_template=template, add_generation_prompt=True, tokenize=False, add_vision_id=add_vision_id
        )
    if not isinstance(text, str) or not text:
        raise ModelError(f"{name}: expected a chat template that writes the chat, but it writes nothing.")
    return text


@contextmanager
def _bounded(name: str) -> Iterator[None]:
    """Raise within a template that runs for too long, or needs too much memory."""
    lines, held, end = 0, _memory(), time.monotonic() + _MOST_SECONDS

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal lines
        lines += 1
        if lines > _MOST_LINES or time.monotonic() > end or _memory() - held > _MOST_BYTES:
            raise _TooMuch
        return count

    def enter(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    except _TooMuch:
        raise ModelError(f"{name}: its chat template does not come to an end.") from None
    finally:
        sys.settrace(before)


def _memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
