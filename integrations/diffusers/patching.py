"""Put something in the place of one object's method for a while: a scheduler's ``step``, or the call of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def put(owner: Any, name: str, value: Any, *, always: bool = False) -> Callable[[], None]:
    """Set an attribute of this object alone, and get the function that takes it back.

    It goes straight into ``__dict__``, because a compiled module hands attribute assignments on to the module that it
    wraps.

    Args:
        owner: of the attribute.
        name: of the attribute.
        value: to put there.
        always: take back what others have put on top, too. Without it, what is not there any more is left alone: the
            end of an interrupted run may come late, when its exception is forgotten.
    """
    attributes = vars(owner)
    missing, before = name not in attributes, attributes.get(name)
    attributes[name] = value

    def undo() -> None:
        if not always and attributes.get(name) is not value:
            return
        if missing:
            attributes.pop(name, None)
        else:
            attributes[name] = before

    return undo


def wrap_call(
    module: torch.nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], *, always: bool = False
) -> Callable[[], None]:
    """Put ``wrap(call)`` in the place of a module's call; as :func:`put`.

    ``Module.__call__`` asks this attribute before hooks and before forward: it is how ``Module.compile`` works.
    """
    call = vars(module).get("_compiled_call_impl") or module._call_impl
    return put(module, "_compiled_call_impl", wrap(call), always=always)
