"""`VisualQualityR1Callback`: watch quality while a pipe runs, drop the worse candidates, stop bad runs."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.callbacks import PipelineCallback
from PIL import Image
from torch import Tensor

from vqr1_metric.integrations.diffusers.decoding import check_decoding, decode
from vqr1_metric.integrations.diffusers.patching import put
from vqr1_metric.integrations.diffusers.pruning import Pruner, check_generators, check_pruning
from vqr1_metric.integrations.diffusers.schedulers import (
    UnsupportedError,
    check_previews,
    clean_prediction,
    total_steps,
)
from vqr1_metric.integrations.diffusers.scoring import PictureScorer
from vqr1_metric.results import ImageScore

_NO_STOP = "{} cannot be interrupted in the middle of a run, as stop_below wants it; use BestOfN, or no stop_below."


@dataclass(frozen=True)
class PreviewRecord:
    """One candidate at one step.

    Args:
        step: index of the step, from 0, after which the preview was made.
        candidate: row of the batch that the run began with.
        score: of the predicted clean picture, in [1, 5]; NaN where there is none.
        preview: that picture; for a video a list of frames.
        result: the whole score.
    """

    step: int
    candidate: int
    score: float
    preview: Image.Image | list[Image.Image]
    result: ImageScore


class VisualQualityR1Callback(PipelineCallback):
    """Scores previews of the predicted clean pictures at chosen steps of a diffusers pipeline.

    Pass it as ``callback_on_step_end``, with ``callback_on_step_end_tensor_inputs=cb.tensor_inputs`` (Flux, Qwen-Image
    and others do not ask a callback for it). It can be one of several in ``MultiPipelineCallbacks``. A run begins with
    empty ``records``. Give exactly one of ``every``, ``at_step`` and ``at_ratio``.

    The callback first runs after step 0 and then begins to listen to the scheduler, so step 0 has no preview. What it
    cannot work with it therefore refuses after step 0; :meth:`check` says so before the run.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer; on any device.
        every: preview after every so many steps.
        at_step: preview after the step of this index, at least 1, counted from 0 as in diffusers' own callbacks.
        at_ratio: preview after step ``int(ratio * number of steps)``, ratio in [0, 1); at least step 1.
        keep: after the first preview go on with so many best candidates; the pipe then returns those only, and ``kept``
            says which they are. One prompt a call.
        stop_below: if no preview scores as much, stop; the pipe then returns the previews, and ``stopped`` is True. For
            pipelines that can be interrupted.
        log: a function of a dictionary, a wandb run (``log``) or a TensorBoard ``SummaryWriter`` (``add_scalar``),
            given best and mean score and number of candidates at each preview.
        decode: a function of the pipe and latents that gives PIL pictures, for pipelines that are not known here.
        frames: frames scored of a video.

    Attributes:
        records: one :class:`PreviewRecord` for each preview of each candidate.
        kept: rows of the first batch that are still there.
        stopped: did ``stop_below`` end the run?
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
        decode: Callable[[Any, Tensor], Sequence[Any]] | None = None,
        frames: int = 4,
    ) -> None:
        if sum(value is not None for value in (every, at_step, at_ratio)) != 1:
            raise ValueError("Expected exactly one of every, at_step and at_ratio.")
        for name, value in (("every", every), ("at_step", at_step), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} of at least 1, but got {value}.")
        if at_ratio is not None and not 0 <= at_ratio < 1:
            raise ValueError(f"Expected at_ratio in [0, 1), but got {at_ratio}.")
        if log is not None and not (callable(log) or hasattr(log, "add_scalar") or hasattr(log, "log")):
            raise TypeError(
                f"Expected log to be a function, a wandb run or a SummaryWriter, but got {type(log).__name__}."
            )
        super().__init__(None if at_step is not None else float(at_ratio or 0.0), at_step)
        self.picture_scorer = PictureScorer(metric, frames)
        self.every, self.at_step, self.at_ratio = every, at_step, at_ratio
        self.keep, self.stop_below, self.log, self._decode = keep, stop_below, log, decode
        self.records: list[PreviewRecord] = []
        self.kept: list[int] = []
        self.stopped = False
        self._clean: Tensor | None = None
        self._undo: list[Callable[[], None]] = []  # of this run, in a list of its own

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipe must hand over."""
        return ["latents"]

    def check(self, pipe: Any) -> None:
        """Raise an error for a pipe that this callback cannot work with, and load the scoring model.

        Raises:
            UnsupportedError: for a pipeline without callbacks, whose latents cannot be decoded in the middle of a run,
                that cannot be stopped, or whose candidates cannot be dropped, and for a scheduler without a clean
                prediction.
        """
        if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
            raise UnsupportedError(
                f"{type(pipe).__name__} has no callback_on_step_end (it may ignore one without a word); use BestOfN, "
                "and for previews inside a modular pipeline VisualQualityR1Block."
            )
        check_previews(pipe.scheduler)
        if self._decode is None:
            check_decoding(pipe)
        if self.keep is not None:
            check_pruning(pipe)
        if self.stop_below is not None and not hasattr(type(pipe), "interrupt"):
            raise UnsupportedError(_NO_STOP.format(type(pipe).__name__))
        self.picture_scorer.load()

    # ---------------------------------------------------------------- the run

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipe after every step."""
        if "latents" not in callback_kwargs:
            raise ValueError(
                "Expected latents: pass callback_on_step_end_tensor_inputs=callback.tensor_inputs to the pipe."
            )
        if step_index == 0 or not self.kept:
            self._begin(pipeline, len(callback_kwargs["latents"]))
        if self.stopped:  # an interrupted run calls nobody
            raise UnsupportedError(_NO_STOP.format(type(pipeline).__name__))
        clean, self._clean = self._clean, None
        steps = total_steps(pipeline)
        if self._due(step_index, steps) and clean is not None:
            self._preview(pipeline, step_index, clean, callback_kwargs)
        if self._due(step_index + 1, steps) and not self.stopped:
            self._listen(pipeline.scheduler)
        return callback_kwargs

    def close(self) -> None:
        """Leave the pipe as it was. Happens by itself at the end of a run, also of one that an exception has ended."""
        _undo_all(self._undo)

    def _begin(self, pipe: Any, candidates: int) -> None:
        self.close()
        self.records, self.kept, self.stopped, self._clean = [], list(range(candidates)), False, None
        self._undo = []
        call = _call_of(pipe)
        self.check(pipe)
        steps = total_steps(pipe)
        if not any(self._due(step, steps) for step in range(1, steps)):
            name = next(name for name in ("every", "at_step", "at_ratio") if getattr(self, name) is not None)
            raise ValueError(
                f"Expected a preview within the {steps} steps of this run, the first of which has none, but got "
                f"{name}={getattr(self, name)}."
            )
        if self.keep is not None and self.keep > candidates:
            raise ValueError(f"Expected keep of at most the {candidates} candidates of this run, but got {self.keep}.")
        if self.keep is not None and self.keep < candidates:
            check_generators(pipe, call)
            prompts = call.get("batch_size", 1)
            if prompts != 1:
                raise ValueError(f"Expected one prompt a call where candidates are dropped, but got {prompts}.")
        # The progress bar lives exactly as long as the pipe's call, however that ends; with an exception that is kept,
        # perhaps until a later run, which is none of its business.
        bar = call.get("progress_bar")
        if bar is not None:
            weakref.finalize(bar, _undo_all, self._undo)

    def _due(self, step: int, steps: int) -> bool:
        if self.every is not None:
            return step >= 1 and (step + 1) % self.every == 0
        if self.at_step is not None:
            return step == self.at_step
        return step == max(1, int(self.at_ratio * steps))

    def _listen(self, scheduler: Any) -> None:
        """Note the clean prediction of the next step, once."""
        original = scheduler.step
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            undo()
            given = signature.bind(*args, **kwargs).arguments
            self._clean = clean_prediction(scheduler, given["model_output"], given["timestep"], given["sample"])
            return original(*args, **kwargs)

        undo = put(scheduler, "step", step)
        self._undo.append(undo)

    def _preview(self, pipe: Any, step: int, clean: Tensor, callback_kwargs: dict[str, Any]) -> None:
        pictures = list(self._decode(pipe, clean)) if self._decode else decode(pipe, clean, _call_of(pipe))
        if len(pictures) != len(self.kept):
            raise ValueError(
                f"Expected {len(self.kept)} pictures from decode, one a candidate, but got {len(pictures)}."
            )
        results = self.picture_scorer(pictures)
        for candidate, picture, result in zip(self.kept, pictures, results, strict=True):
            self.records.append(PreviewRecord(step, candidate, result.score, picture, result))
        scores = [result.score for result in results if not math.isnan(result.score)]
        best = max(scores, default=math.nan)
        if self.log is not None:
            mean = sum(scores) / len(scores) if scores else math.nan
            _write(self.log, step, {"vqr1/best": best, "vqr1/mean": mean, "vqr1/candidates": len(results)})
        latents = callback_kwargs["latents"]
        if self.stop_below is not None and not best >= self.stop_below:
            self.stopped = True
            self._undo.append(put(pipe, "_interrupt", True))
            callback_kwargs["latents"] = clean.to(latents.dtype)
        elif self.keep is not None and self.keep < len(results):
            order = sorted(range(len(results)), key=lambda i: (math.isnan(results[i].score), -results[i].score, i))
            rows = sorted(order[: self.keep])
            self._undo.append(Pruner(pipe, rows, latents).remove)
            self.kept = [self.kept[row] for row in rows]
            callback_kwargs["latents"] = latents[rows]


def _undo_all(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _call_of(pipe: Any) -> dict[str, Any]:
    """Local variables of the running call of the pipe: it hands over tensors only, not the size of the picture."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is pipe and "callback_on_step_end" in frame.f_locals:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _write(log: Any, step: int, values: dict[str, float]) -> None:
    if hasattr(log, "add_scalar"):
        for name, value in values.items():
            log.add_scalar(name, value, step)
    else:
        (log if callable(log) else log.log)(values | {"step": step})
