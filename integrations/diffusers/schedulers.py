"""The predicted clean picture at a step of each scheduler, and which of a scheduler's state belongs to which row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_SIGMA = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"}
_ALPHA_SIGMA = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}
_CUMULATIVE = {"DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"}

#: Schedulers with a clean prediction, and whose survivors were checked to come out the same after rows were taken out.
KNOWN_SCHEDULERS = _FLOW | _SIGMA | _ALPHA_SIGMA | _CUMULATIVE


class UnsupportedError(ValueError):
    """A pipeline or scheduler for which the request is not known to be right; the message says what to do."""


def check_previews(scheduler: Any) -> None:
    """Raise where :func:`clean_prediction` has no formula for this scheduler."""
    name = type(scheduler).__name__
    if name not in KNOWN_SCHEDULERS:
        raise UnsupportedError(
            f"Expected a scheduler with a known clean prediction, but got {name}; known are "
            f"{', '.join(sorted(KNOWN_SCHEDULERS))}; "
            "use one of these, or BestOfN without preview_at_ratio, which scores final pictures only."
        )


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
    name = type(scheduler).__name__
    check_previews(scheduler)
    if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output.chunk(2, dim=1)[0]
    output, x = model_output.float(), sample.float()
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction" if name in _FLOW else "epsilon")
    if name not in _CUMULATIVE:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = scheduler.sigmas[scheduler.step_index].to(x.device, x.dtype)
    if kind in ("sample", "original_sample"):
        clean = output
    elif name in _FLOW or kind == "flow_prediction":
        clean = x + (int(bool(config.get("invert_sigmas"))) - sigma) * output  # inverted levels (Mochi) end at 1
    elif name in _SIGMA:
        clean = x - sigma * output if kind == "epsilon" else x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
    else:
        if name in _CUMULATIVE:
            cumulative = scheduler.alphas_cumprod.to(x.device)[int(timestep)]
            alpha, sigma = cumulative**0.5, (1 - cumulative) ** 0.5
        else:
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
        clean = (x - sigma * output) / alpha if kind == "epsilon" else alpha * x - sigma * output
    if config.get("thresholding"):
        clean = scheduler._threshold_sample(clean)
    elif config.get("clip_sample"):
        clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    return clean.to(sample.dtype)


def total_steps(pipe: Any) -> int:
    """Steps of the pipe's running call (image-to-image runs only the last of its scheduler's steps)."""
    steps = getattr(pipe, "_num_timesteps", None)
    return steps if isinstance(steps, int) and steps > 0 else len(pipe.scheduler.timesteps)


def row_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes, lists copied, so that later steps do not change what was saved."""
    kept = {name: value for name, value in vars(scheduler).items() if name not in ("step", "_internal_dict")}
    return {name: list(value) if isinstance(value, list) else value for name, value in kept.items()}


def take_rows(
    states: Sequence[dict[str, Any]], rows: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """One scheduler state holding chosen rows of several, which ran the same steps on different candidates.

    A tensor belongs to the rows exactly if it has the shape of the latents; noise levels and time steps are shared.

    Args:
        states: from :func:`row_state`.
        rows: pairs (position in ``states``, row).
        shapes: the shape of the latents of each state.
    """
    import torch

    def pick(values: Sequence[Any]) -> Any:
        first = values[rows[0][0]]
        if isinstance(first, list):
            return [pick([value[i] for value in values]) for i in range(len(first))]
        if isinstance(first, Tensor) and tuple(first.shape) == shapes[rows[0][0]]:
            return torch.stack([values[state][row] for state, row in rows])
        return first

    return {name: pick([state[name] for state in states]) for name in states[rows[0][0]]}
