"""Take candidates out of a running batch: what the pipe still holds for all of them is cut to those that are left."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.patching import put, wrap_call
from vqr1_metric.integrations.diffusers.schedulers import KNOWN_SCHEDULERS, UnsupportedError, row_state, take_rows
from vqr1_metric.integrations.diffusers.steering import CONDITIONED

#: Pipelines whose survivors were checked to come out the same when the others leave the batch in the middle of a run.
PRUNED = {
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
}
_STOCHASTIC = {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler", "LCMScheduler"}
#: Positions of tokens, shared by all candidates, whose length may happen to equal the number of rows.
_SHARED = ("img_ids", "txt_ids")


def check_pruning(pipe: Any) -> None:
    """Raise where taking rows out of a running batch is not known to leave the others as they were."""
    for kind, known in ((type(pipe), PRUNED), (type(pipe.scheduler), KNOWN_SCHEDULERS)):
        if kind.__name__ not in known:
            raise UnsupportedError(
                f"Taking candidates out of a running batch is not known to be exact with {kind.__name__}; use BestOfN, "
                f"or one of {', '.join(sorted(known))}."
            )


def check_generators(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise where the scheduler draws noise for all candidates from one generator.

    Args:
        pipe: in a run.
        call: local variables of its running call.
    """
    passed = call.get("extra_step_kwargs", {})
    if draws_noise(pipe.scheduler, passed) and not isinstance(passed.get("generator"), list):
        raise UnsupportedError(
            f"{type(pipe.scheduler).__name__} draws noise at each step, so candidates can leave the batch only if each "
            f"has a generator of its own that {type(pipe).__name__} passes to it: pass a list of generators, or use "
            "BestOfN."
        )


def draws_noise(scheduler: Any, options: Mapping[str, Any]) -> bool:
    """Does the scheduler's ``step``, called with ``options``, draw random numbers?"""
    name, config = type(scheduler).__name__, scheduler.config
    if name == "DDIMScheduler":
        return options.get("eta", 0.0) > 0
    if name == "TCDScheduler":
        return options.get("eta", 0.3) > 0
    sde = config.get("algorithm_type", "").startswith("sde") or config.get("stochastic_sampling", False)
    return bool(sde) or name in _STOCHASTIC


class Pruner:
    """From now until :meth:`remove`, ``pipe`` works on some of its candidates only.

    Calls of the denoisers get every batched argument cut to the rows of ``kept``; the scheduler's memory is cut once,
    and lists of generators at each step. Calls that are not of the cut batch pass through untouched.

    Args:
        pipe: in the middle of a run, between two steps.
        kept: rows to keep, ascending.
        latents: of all candidates, shape ``(candidates, ...)``.
    """

    def __init__(self, pipe: Any, kept: Sequence[int], latents: Tensor) -> None:
        self.kept, self.before = list(kept), len(latents)
        scheduler = pipe.scheduler
        state = take_rows([row_state(scheduler)], [(0, row) for row in kept], [tuple(latents.shape)])
        vars(scheduler).update(state)
        self._undo: list[Callable[[], None]] = [self._wrap_step(scheduler)]
        for name in CONDITIONED:
            module = getattr(pipe, name, None)
            if isinstance(module, torch.nn.Module):
                self._undo.append(self._wrap_call(module))

    def remove(self) -> None:
        """Leave the pipe as it was."""
        while self._undo:
            self._undo.pop()()

    def cut(self, value: Any, blocks: int) -> Any:
        """``value`` with the rows of the kept candidates, in each of ``blocks`` blocks of guidance."""
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == blocks * self.before:
            rows = [block * self.before + row for block in range(blocks) for row in self.kept]
            return value[torch.tensor(rows, device=value.device)]
        if isinstance(value, dict):
            return {name: self.cut(part, blocks) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.cut(part, blocks) for part in value)
        return value

    def _wrap_call(self, module: torch.nn.Module) -> Callable[[], None]:
        def cutting(call: Callable[..., Any]) -> Callable[..., Any]:
            def cut_call(*args: Any, **kwargs: Any) -> Any:
                rows = next((len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), 0)
                if rows and rows % len(self.kept) == 0:
                    blocks = rows // len(self.kept)
                    # The first argument is made of the latents of the kept already.
                    args = (*args[:1], *(self.cut(a, blocks) for a in args[1:]))
                    whole = {name for name in _SHARED if getattr(kwargs.get(name), "ndim", 0) == 2}
                    whole |= {"hidden_states", "sample"}
                    kwargs = {n: value if n in whole else self.cut(value, blocks) for n, value in kwargs.items()}
                return call(*args, **kwargs)

            return cut_call

        return wrap_call(module, cutting)

    def _wrap_step(self, scheduler: Any) -> Callable[[], None]:
        original = scheduler.step
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            generators = given.arguments.get("generator")
            if isinstance(generators, list) and len(generators) == self.before:
                given.arguments["generator"] = [generators[row] for row in self.kept]
            return original(*given.args, **given.kwargs)

        return put(scheduler, "step", step)
