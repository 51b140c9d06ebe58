"""Small random pipelines of every family, built from configurations alone: no download, milliseconds a step.

``build(family)`` gives a pipe and the arguments that it is called with. Text encoders and tokenizers are real but tiny
where a pipeline repeats its text for several pictures only if it encodes it itself; elsewhere ready embeddings are
passed.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from tiny_pipelines import transformers, unets  # noqa: F401 (they fill FAMILIES)
from tiny_pipelines.parts import FAMILIES, TinyPipe

__all__ = ["FAMILIES", "TinyPipe", "build", "failing", "offload"]


def build(family: str, scheduler: str | None = None, **scheduler_options: Any) -> TinyPipe:
    """A pipe of one of ``FAMILIES`` with seeded weights, on a scheduler of its own or the named one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = FAMILIES[family]()
    if scheduler is not None:
        kind = getattr(diffusers, scheduler)
        # As in the released pipelines: latents are not in [-1, 1].
        if "clip_sample" in inspect.signature(kind).parameters:
            scheduler_options.setdefault("clip_sample", False)
        tiny.pipe.scheduler = kind.from_config(tiny.pipe.scheduler.config, **scheduler_options)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


@contextlib.contextmanager
def failing(module: torch.nn.Module, number: int) -> Iterator[None]:
    """Within, the call of this number (from 1) of a module ends in a RuntimeError."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise RuntimeError("out of memory")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def offload(pipe: Any, kind: str) -> None:
    """Let the hooks of ``"model offload"`` or ``"group offload"`` move weights, from the CPU to the CPU."""
    if kind == "model offload":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu = torch.device("cpu")
        try:
            pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        except AttributeError:
            if torch.accelerator.current_accelerator() is not None:
                raise
            pytest.skip("this release of diffusers offloads groups to accelerators only")
