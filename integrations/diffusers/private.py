"""Every private name of diffusers that is used here, each with the public one that it waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Name of the block of a denoising loop behind which the denoiser has answered. Waits for: a hook point of loops.
AFTER_DENOISER = "after_denoiser"


def interrupted(pipe: Any) -> bool:
    """Was ``pipe._interrupt`` set, as diffusers documents it for stopping? Waits for: a public setter."""
    return bool(vars(pipe).get("_interrupt", False))


def interrupt(pipe: Any, value: bool) -> None:
    """Set it. A pipe that never had one is left without."""
    if value or "_interrupt" in vars(pipe):
        vars(pipe)["_interrupt"] = value


def forget_steps(pipe: Any) -> None:
    """Forget the number of steps of an earlier call. Waits for: pipelines that reset ``num_timesteps`` themselves."""
    vars(pipe).pop("_num_timesteps", None)


def threshold(scheduler: Any, clean: Tensor) -> Tensor:
    """Dynamic thresholding as in the scheduler's ``step``. Waits for: a public name of it."""
    return scheduler._threshold_sample(clean)  # type: ignore[no-any-return]


def has_stateful_hooks(module: Any) -> bool:
    """Hooks that remember earlier calls, put on without ``enable_cache``? Waits for: ``is_cache_enabled`` to tell."""
    if not isinstance(module, torch.nn.Module):
        return False
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook._is_stateful for registry in registries if registry for hook in registry.hooks.values())
