"""A model's chat template, a program from a stranger: rendered within bounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vqr1_metric.backends.base import ModelError, as_model_error

#: Lines of a template that may run, and characters that a text in it may have: the templates of Qwen's models run a few
#: hundred lines for one turn.
_MOST_LINES, _MOST_CHARACTERS = 200_000, 1_000_000


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
    """Count the lines of templates that run; by lines and not by time, so that no busy machine fails."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal lines
        lines += 1
        texts = (value for value in frame.f_locals.values() if isinstance(value, str))
        if lines > _MOST_LINES or any(len(text) > _MOST_CHARACTERS for text in texts):
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
