"""Schedulers: the clean picture they predict at a step, and which of their state belongs to which candidate."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers import private

_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_SIGMA = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"}
_ALPHA_SIGMA = {"DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
                "SASolverScheduler", "UniPCMultistepScheduler"}  # fmt: skip
_CUMULATIVE = {"DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"}
_FORMULAS = _FLOW | _SIGMA | _ALPHA_SIGMA | _CUMULATIVE

#: Schedulers whose survivors were checked to come out the same after rows were taken out (docs/diffusers.md).
KNOWN_SCHEDULERS = _FORMULAS - {"SASolverScheduler"}


class UnsupportedError(ValueError):
    """A pipeline or scheduler for which the request is not known to be right; the message says what to do."""


def is_of_diffusers(kind: type) -> bool:
    """Is it the class that diffusers exports under this name? A class of the same name is another thing."""
    return getattr(diffusers, kind.__name__, None) is kind


def scheduler_class(scheduler: Any) -> type:
    """The scheduler's class, without what :func:`overriding` put on top."""
    return next(kind for kind in type(scheduler).__mro__ if "_overriding" not in vars(kind))


def overriding(scheduler: Any, **methods: Callable[..., Any]) -> Any:
    """Make methods of this scheduler object, which must be nobody else's, go through functions.

    Each function gets the scheduler, its own bound method, and the arguments. Pipelines that copy their scheduler for
    a second kind of latents get a copy without them.
    """
    kind = type(scheduler)

    def through(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(kind, name)

        @functools.wraps(original)  # pipelines look at the signature before they pass eta and generators
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, functools.partial(original, self), *args, **kwargs)

        return method

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        plain = copy.copy(self)
        plain.__class__ = kind
        return copy.deepcopy(plain, memo)

    known = {name: through(name, function) for name, function in methods.items() if hasattr(kind, name)}
    extra = {"__deepcopy__": deepcopy, "__module__": kind.__module__, "_overriding": True}
    scheduler.__class__ = type(kind.__name__, (kind,), known | extra)
    return scheduler


def check_previews(scheduler: Any) -> None:
    """Raise where :func:`clean_prediction` has no way for this scheduler: found out by a step of it on zeros."""
    kind = scheduler_class(scheduler)
    if kind.__name__ in _FORMULAS and is_of_diffusers(kind):
        return
    trial, zeros = copy.deepcopy(scheduler), torch.zeros(1, 4, 8, 8)
    try:
        trial.set_timesteps(4)
        known = _told(trial, zeros, trial.timesteps[0], zeros) is not None
    except Exception:  # a scheduler that cannot be tried is one that is not known
        known = False
    if not known:
        raise UnsupportedError(
            f"Expected a scheduler with a known clean prediction, but got {kind.__name__}; known are "
            f"{', '.join(sorted(_FORMULAS))} and those whose step gives pred_original_sample; "
            "use one of these, or BestOfN without preview_at_ratio, which scores final pictures only."
        )


def _told(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
    """What a step of a copy of the scheduler says of it, for those that say it."""
    trial = copy.deepcopy(scheduler)
    own = {"generator": torch.Generator()} if "generator" in inspect.signature(trial.step).parameters else {}
    return getattr(trial.step(model_output, timestep, sample, **own), "pred_original_sample", None)


def clean_prediction(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    r"""The clean latents predicted at a step, :math:`\hat x_0`. Call it before ``scheduler.step``.

    With noise level :math:`\sigma` and signal level :math:`\alpha` of the step (flow matching: :math:`1 - \sigma`):
    ``epsilon``: :math:`(x - \sigma \epsilon) / \alpha`; ``v_prediction``: :math:`\alpha x - \sigma v`; flow matching:
    :math:`x - \sigma v`; ``sample``: the output itself. Euler, LMS and Heun schedulers keep :math:`x / \alpha` and
    :math:`\sigma / \alpha` instead. The formulas are those of each scheduler's own ``step``, thresholding and clipping
    included.

    Args:
        model_output: shape of ``sample``, or with twice the channels where the model also predicts variances.
        timestep: of ``scheduler.timesteps``.
        sample: noisy latents, batch first.

    Returns:
        Tensor of the shape and type of ``sample``.
    """
    kind = scheduler_class(scheduler)
    name = kind.__name__
    if name not in _FORMULAS or not is_of_diffusers(kind):
        told = _told(scheduler, model_output, timestep, sample)
        if told is None:
            check_previews(scheduler)
            raise UnsupportedError(f"{name} gave no clean prediction at {timestep}.")
        return told.to(sample.dtype)
    if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output.chunk(2, dim=1)[0]
    output, x = model_output.float(), sample.float()
    config = scheduler.config
    predicted = config.get("prediction_type", "flow_prediction" if name in _FLOW else "epsilon")
    if name not in _CUMULATIVE:
        place = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
        place = scheduler.index_for_timestep(timestep) if place is None else place  # as the scheduler's own step
        sigma = scheduler.sigmas[place].to(x.device, x.dtype)
    if predicted in ("sample", "original_sample"):
        clean = output
    elif name in _FLOW or predicted == "flow_prediction":
        clean = x + (int(bool(config.get("invert_sigmas"))) - sigma) * output  # inverted levels (Mochi) end at 1
    elif name in _SIGMA:
        clean = (
            x - sigma * output
            if predicted == "epsilon"
            else x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        )
    else:
        if name in _CUMULATIVE:
            cumulative = scheduler.alphas_cumprod.to(x.device)[int(timestep)]
            alpha, sigma = cumulative**0.5, (1 - cumulative) ** 0.5
        else:
            alpha = 1 / (sigma**2 + 1) ** 0.5
            sigma = sigma * alpha
        clean = (x - sigma * output) / alpha if predicted == "epsilon" else alpha * x - sigma * output
    if config.get("thresholding"):
        clean = private.threshold(scheduler, clean)
    elif config.get("clip_sample"):
        clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    return clean.to(sample.dtype)


def total_steps(pipe: Any) -> int:
    """Steps of the pipe's running call, as far as it tells."""
    steps = getattr(pipe, "num_timesteps", None)
    return steps if isinstance(steps, int) and steps > 0 else len(pipe.scheduler.timesteps)


def take_rows(
    states: Sequence[dict[str, Any]], rows: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """One scheduler state holding chosen rows of several, which ran the same steps on different candidates.

    A tensor belongs to the rows exactly if it has the shape of the latents; noise levels and time steps are shared.

    Args:
        states: attributes of the schedulers.
        rows: pairs (position in ``states``, row).
        shapes: the shape of the latents of each state.
    """

    def pick(values: Sequence[Any]) -> Any:
        first = values[rows[0][0]]
        if isinstance(first, list):
            return [pick([value[i] for value in values]) for i in range(len(first))]
        if isinstance(first, Tensor) and tuple(first.shape) == shapes[rows[0][0]]:
            return torch.stack([values[state][row] for state, row in rows])
        return first

    return {name: pick([state[name] for state in states]) for name in states[rows[0][0]]}
