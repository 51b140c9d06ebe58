"""`VisualQualityR1Callback`: watch quality while a pipe runs, stop bad runs."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from diffusers.callbacks import PipelineCallback
from torch import Tensor

from vqr1_metric.integrations.diffusers import private
from vqr1_metric.integrations.diffusers.calls import DENOISERS, StandIn
from vqr1_metric.integrations.diffusers.previews import Decode, PreviewRecord, Previews
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, clean_prediction, overriding, total_steps

_NO_STOP = "{} cannot be interrupted in the middle of a run, as stop_below wants it; use BestOfN, or no stop_below."


class VisualQualityR1Callback(PipelineCallback):  # type: ignore[misc]
    """Scores previews of the predicted clean pictures at chosen steps of a diffusers pipeline.

    Pass it as ``callback_on_step_end``, with ``callback_on_step_end_tensor_inputs=cb.tensor_inputs`` (Flux, Qwen-Image
    and others do not ask a callback for it). It can be one of several in ``MultiPipelineCallbacks``. A run begins with
    empty ``records``. Give exactly one of ``every``, ``at_step`` and ``at_ratio``.

    It watches, and never ends a run because a preview failed: an unknown scheduler or pipeline, a scorer or logger with
    an error, a run without a step to preview are a warning. :meth:`check` raises for them before the run.

    A callback first runs after step 0, so step 0 has no preview. For one step at a time, the pipe gets a copy of its
    scheduler that notes the prediction; no scheduler or model is changed.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer; on any device.
        every: preview after every so many steps.
        at_step: preview after the step of this index, at least 1, counted from 0 as in diffusers' own callbacks.
        at_ratio: preview after step ``int(ratio * number of steps)``, ratio in [0, 1), as in diffusers' own callbacks
            and in :class:`BestOfN`; at least step 1.
        stop_below: if no preview scores as much, stop; the pipe then returns the previews, and ``stopped`` is True. For
            pipelines that can be interrupted. Within :class:`BestOfN` these candidates are given up.
        log: a function of a dictionary, a wandb run (``log``) or a TensorBoard ``SummaryWriter`` (``add_scalar``),
            given best and mean score and number of candidates at each preview.
        decode: a function of the pipe and latents that gives PIL pictures, for pipelines that are not known here.
        frames: frames scored of a video.

    Attributes:
        records: one :class:`PreviewRecord` for each preview of each candidate.
        stopped: did ``stop_below`` end the run?
        failure: why a preview of the run failed, or None.
    """

    def __init__(
        self,
        metric: Any,
        *,
        every: int | None = None,
        at_step: int | None = None,
        at_ratio: float | None = None,
        keep: int | None = None,
        stop_below: float | None = None,
        log: Any = None,
        decode: Decode | None = None,
        frames: int = 4,
    ) -> None:
        if keep is not None:
            raise TypeError(
                "keep= is gone, a callback only watches: BestOfN(pipe, metric)(prompt, n=..., preview_at_ratio=..., "
                f"survivors={keep}, keep={keep}) drops the other candidates, for every pipeline."
            )
        if sum(value is not None for value in (every, at_step, at_ratio)) != 1:
            raise ValueError("Expected exactly one of every, at_step and at_ratio.")
        for name, value in (("every", every), ("at_step", at_step)):
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} of at least 1, but got {value}.")
        if at_ratio is not None and not 0 <= at_ratio < 1:
            raise ValueError(f"Expected at_ratio in [0, 1), but got {at_ratio}.")
        super().__init__(None if at_step is not None else float(at_ratio or 0.0), at_step)
        self.register_to_config(every=every, at_step=at_step, at_ratio=at_ratio, stop_below=stop_below, frames=frames)
        self.previews = Previews(metric, frames, decode, log)
        self.every, self.at_step, self.at_ratio, self.stop_below = every, at_step, at_ratio, stop_below
        self.stopped, self._may_stop = False, True
        self._step = -1
        self._heard: tuple[Tensor, Any] | None = None
        self._undo: Callable[[], None] = lambda: None

    @property
    def records(self) -> list[PreviewRecord]:
        """One for each preview of each candidate of the last run."""
        return self.previews.records

    @property
    def failure(self) -> str | None:
        """Why a preview of the last run failed, or None."""
        return self.previews.failure

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipe must hand over."""
        return ["latents"]

    def check(self, pipe: Any) -> None:
        """Raise an error for a pipe that this callback cannot work with, and load the scoring model.

        Raises:
            UnsupportedError: for a pipeline without callbacks, whose latents cannot be decoded in the middle of a run,
                or that cannot be stopped, and for a scheduler without a clean prediction.
        """
        if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
            raise UnsupportedError(
                f"{type(pipe).__name__} has no callback_on_step_end (it may ignore one without a word); use BestOfN, "
                "and for previews inside a modular pipeline VisualQualityR1Block."
            )
        self.previews.check(pipe)
        if self.stop_below is not None and not hasattr(type(pipe), "interrupt"):
            raise UnsupportedError(_NO_STOP.format(type(pipe).__name__))

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipe after every step."""
        if "latents" not in callback_kwargs:
            raise ValueError(
                "Expected latents: pass callback_on_step_end_tensor_inputs=callback.tensor_inputs to the pipe."
            )
        steps = total_steps(pipeline)
        if step_index <= self._step or step_index == 0:
            self._begin(pipeline, steps)
        self._step = -1 if step_index >= steps - 1 else step_index
        if self.stopped:  # an interrupted run calls nobody; this one would go on from the previews
            raise UnsupportedError(_NO_STOP.format(type(pipeline).__name__))
        heard, self._heard = self._heard, None
        if self._due(step_index, steps):
            if heard is not None:
                self._preview(pipeline, step_index, *heard, callback_kwargs)
            else:
                self.previews.fail(f"{type(pipeline).__name__} did not step its scheduler.")
        if self.failure is None and not self.stopped and self._due(step_index + 1, steps):
            self._listen(pipeline, callback_kwargs["latents"])
        return callback_kwargs

    def close(self) -> None:
        """Give the pipe its own scheduler back. Happens by itself, also when an exception ends the run."""
        self._undo()

    def _begin(self, pipe: Any, steps: int) -> None:
        self.close()
        self.previews.records, self.previews.failure = [], None
        self.stopped, self._heard = False, None
        self._may_stop = hasattr(type(pipe), "interrupt")
        if self.stop_below is not None and not self._may_stop:
            warnings.warn(f"The run will not be stopped: {_NO_STOP.format(type(pipe).__name__)}", stacklevel=3)
        try:
            self.previews.check(pipe)
            if not any(self._due(step, steps) for step in range(1, steps)):
                name = next(name for name in ("every", "at_step", "at_ratio") if getattr(self, name) is not None)
                raise ValueError(
                    f"Expected a preview within the {steps} steps of this run, the first of which has none, but got "
                    f"{name}={getattr(self, name)}."
                )
        except Exception as error:  # of the pipe, the scheduler, or of whatever loads the scoring model
            self.previews.fail(error)

    def _due(self, step: int, steps: int) -> bool:
        if self.every is not None:
            return step >= 1 and (step + 1) % self.every == 0
        if self.at_step is not None:
            return step == self.at_step
        return step == max(1, int((self.at_ratio or 0.0) * steps))

    def _listen(self, pipe: Any, latents: Tensor) -> None:
        """Note the clean prediction of the next step, and where the denoiser is told that tokens lie."""
        parts, original = vars(pipe), pipe.scheduler
        told: dict[str, Any] = {}
        stepped: list[bool] = []

        def step(scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            try:
                clean = clean_prediction(scheduler, given["model_output"], given["timestep"], given["sample"])
                self._heard = (clean, told.get("img_ids", told.get("img_shapes")))
            except Exception as error:
                self.previews.fail(error)
            result = step(*args, **kwargs)
            stepped.append(True)
            undo()
            return result

        def denoise(real: Any, *args: Any, **kwargs: Any) -> Any:
            told.update({name: kwargs[name] for name in ("img_ids", "img_shapes") if name in kwargs})
            return real(*args, **kwargs)

        own = overriding(copy.copy(original), step=step)
        signature = inspect.signature(own.step)
        stand_ins = {name: StandIn(parts[name], denoise) for name in DENOISERS if callable(parts.get(name))}

        def undo() -> None:
            if parts.get("scheduler") is own:
                if stepped:
                    vars(original).update(vars(own))
                parts["scheduler"] = original
            for name, stand_in in stand_ins.items():
                if parts.get(name) is stand_in:
                    parts[name] = vars(stand_in)["_real"]

        parts["scheduler"] = own
        parts |= stand_ins
        self._undo = undo
        # These latents live until the step is done, or until the call that holds them ends, however that ends.
        weakref.finalize(latents, undo).atexit = False

    def _preview(self, pipe: Any, step: int, clean: Tensor, positions: Any, callback_kwargs: dict[str, Any]) -> None:
        scores = [s for s in self.previews.take(pipe, step, clean, positions) if math.isfinite(s)]
        if self.stop_below is not None and self._may_stop and scores and max(scores) < self.stop_below:
            self.stopped = True
            private.interrupt(pipe, True)
            stopped = clean.to(callback_kwargs["latents"].dtype, copy=True)
            weakref.finalize(stopped, functools.partial(private.interrupt, pipe, False)).atexit = False
            callback_kwargs["latents"] = stopped
