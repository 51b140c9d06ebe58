"""One call of a pipe that may stop for a preview, carry on from a saved step, or start from given noise.

Nothing that others use is touched. The call runs on a shallow copy of the pipe, with a copy of the scheduler and with
stand-ins for the denoisers, all of them the call's own: other calls, of other threads too, see the pipe, the scheduler
and the weights as they were. So it works alike for pipelines with and without callbacks, with ``torch.compile`` and
with offloading. A skipped step costs nothing: the stand-in answers with what its denoiser last said, and the scheduler
hands the latents on. The pipe itself encodes, blends and decodes: a preview is a picture that the pipe made.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vqr1_metric.integrations.diffusers import private
from vqr1_metric.integrations.diffusers.schedulers import (
    UnsupportedError,
    clean_prediction,
    overriding,
    scheduler_class,
    take_rows,
)

#: Components whose calls are counted in denoiser rows.
DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "image_unet", "decoder")
#: Denoisers that take turns (Wan 2.2: one for the early, one for the late steps), so that either may answer.
_TURNS = {"transformer": "transformer_2", "transformer_2": "transformer"}
_DRAWS = {"bernoulli", "multinomial", "normal", "normal_", "rand", "rand_like", "randint", "randint_like", "randn",
          "randn_like", "randperm", "uniform_"}  # fmt: skip


class Cancelled(Exception):
    """The call was cancelled before its last step, so there are no pictures."""


class Stopped(Cancelled):
    """A callback with ``stop_below`` has given up these candidates."""


class StandIn:
    """In the place of a component in one copy of a pipe: calls go through ``call``, everything else to the component.

    Args:
        real: the component.
        call: ``call(real, *args, **kwargs)``.
    """

    def __init__(self, real: Any, call: Callable[..., Any]) -> None:
        vars(self).update(_real=real, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._real, *args, **kwargs)

    @property  # type: ignore[misc]  # only read, while that of object can be set too
    def __class__(self) -> Any:  # pipelines ask isinstance()
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


class _GlobalDraws(TorchFunctionMode):
    """Notes whether this thread draws from PyTorch's global generator."""

    drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= getattr(func, "__name__", "") in _DRAWS and (kwargs or {}).get("generator") is None
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Answer:
    """What a denoiser said; ``listed`` if it takes and gives a list with one tensor for each picture (Z-Image)."""

    output: Any
    listed: bool

    def resized(self, old: int, new: int) -> _Answer:
        """Zeros of the same form for another number of candidates."""

        def resize(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.new_zeros((len(part) // old * new, *part.shape[1:]))
            if isinstance(part, dict):  # diffusers' output classes are dictionaries
                return type(part)(**{name: resize(value) for name, value in part.items()})
            if isinstance(part, list) and self.listed:
                return [torch.zeros_like(part[0])] * (len(part) // old * new)
            if isinstance(part, (tuple, list)):
                return type(part)(resize(value) for value in part)
            return part

        return _Answer(resize(self.output), self.listed)


@dataclass
class Snapshot:
    """Where a chunk of candidates stood after ``steps_done`` scheduler steps.

    Args:
        latents: shape ``(candidates, ...)``, what the scheduler returned.
        state: the scheduler's attributes.
        generators: state of each candidate's random generator.
        drew: has the scheduler drawn noise from them?
        answers: for every denoiser and number of input rows a candidate has: its last output.
        outputs: number of tensors that ``scheduler.step`` returned.
    """

    steps_done: int
    latents: Tensor
    state: dict[str, Any]
    generators: list[Tensor]
    drew: bool = False
    answers: dict[tuple[str, int], _Answer] = field(default_factory=dict)
    outputs: int = 1

    @staticmethod
    def gather(snapshots: Sequence[Snapshot], rows: Sequence[tuple[int, int]]) -> Snapshot:
        """Chosen candidates, as pairs (position in ``snapshots``, row), of chunks that stand at the same step.

        The denoisers' answers are taken from the first snapshot; the others need not hold any.
        """
        first = snapshots[0]
        answers = {key: answer.resized(len(first.latents), len(rows)) for key, answer in first.answers.items()}
        state = take_rows([s.state for s in snapshots], rows, [tuple(s.latents.shape) for s in snapshots])
        latents = torch.stack([snapshots[s].latents[r] for s, r in rows])
        generators = [snapshots[s].generators[r] for s, r in rows]
        return Snapshot(first.steps_done, latents, state, generators, first.drew, answers, first.outputs)


class Call:
    """One call of a pipe, to be made on ``view``, its own copy of it.

    Args:
        pipe: a pipeline with a ``scheduler`` and a denoiser.
        generators: one for each candidate of the call; they are given to ``scheduler.step`` where the pipe does not, so
            that schedulers that draw noise draw each candidate's own.
        preview_at: in [0, 1): after the step ``int(preview_at * steps)``, counted from 0 as in diffusers' callbacks,
            the rest is skipped. The pipe then returns decoded predictions of the clean pictures; ``snapshot`` is set.
        resume: a snapshot of these candidates; the steps it has behind it are skipped.
        noise: shape ``(candidates, ...)``, to put in the place of what the pipe adds to an input picture.

    Attributes:
        rows: denoiser rows computed.
        steps: scheduler steps seen, skipped ones included; ``total`` is what the pipe runs, None before the first.
        noise: what the candidates started from: noise added to an input picture, or what entered the first step, of
            unit variance. ``added`` tells which.
        cancelled: did a callback, or anybody by ``pipe._interrupt``, cancel it?
    """

    def __init__(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        *,
        preview_at: float | None = None,
        resume: Snapshot | None = None,
        noise: Tensor | None = None,
    ) -> None:
        self.pipe, self.generators = pipe, list(generators)
        self.preview_at, self.resume, self._given = preview_at, resume, noise
        self.rows = self.steps = 0
        self.total: int | None = None
        self.noise: Tensor | None = None
        self.added = self.cancelled = self._drew = False
        self.snapshot: Snapshot | None = None
        self._last: Tensor | None = None
        self._skipping = resume is not None
        self._ran = False  # was the latest step a real one?
        self._answers: dict[tuple[str, int], _Answer] = dict(resume.answers) if resume else {}
        self._outputs = resume.outputs if resume else 1
        self.view = copy.copy(pipe)
        own = vars(self.view)
        private.forget_steps(self.view)
        private.interrupt(self.view, False)
        own["scheduler"] = overriding(
            copy.deepcopy(pipe.scheduler), step=self._step, add_noise=self._add_noise, scale_noise=self._add_noise
        )
        self._signature = inspect.signature(self.view.scheduler.step)
        for name in (*DENOISERS, "controlnet"):
            if callable(getattr(pipe, name, None)):
                own[name] = StandIn(getattr(pipe, name), functools.partial(self._denoise, name))
        if hasattr(pipe, "maybe_free_model_hooks"):  # the pipe's own list of hooks, on the components themselves
            own["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks
        if getattr(pipe, "guider", None) is not None:
            own["guider"] = copy.copy(pipe.guider)

    @property
    def complete(self) -> bool:
        """Has the pipe run all its steps?"""
        return self.total is not None and self.steps >= self.total

    def not_finite(self) -> list[bool]:
        """Which candidates ended in latents that hold NaN or infinity."""
        if self._last is None or len(self._last) != len(self.generators):
            return [False] * len(self.generators)
        return [not bool(finite) for finite in torch.isfinite(self._last).flatten(1).all(1)]

    def watching(self, callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A user's callback, called after real steps only, with the right to cancel."""
        if callback is None:
            return None

        def called(view: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if not self._ran:
                return values
            if (
                self.snapshot is not None and "latents" in values
            ):  # after the last step of a preview: show, take nothing
                callback(view, step, timestep, dict(values, latents=self.snapshot.latents))
            else:
                values = callback(view, step, timestep, values)
            if self._asked_to_stop() and not self.complete:
                listed = [callback, *getattr(callback, "callbacks", [])]
                raise Stopped if any(getattr(c, "stopped", False) is True for c in listed) else Cancelled
            return values

        return called

    def _asked_to_stop(self) -> bool:
        self.cancelled |= private.interrupted(self.view) or private.interrupted(self.pipe)
        return self.cancelled

    # ---------------------------------------------------------------- denoisers

    def _denoise(self, name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, (Tensor, list))), None)
        rows = 0 if given is None else len(given)
        key = (name, rows // len(self.generators))
        turns = (_TURNS.get(name, name), key[1])
        if self._skipping and (known := self._answers.get(key) or self._answers.get(turns)):
            return known.output
        if self.total is None and isinstance(steps := getattr(self.view, "num_timesteps", None), int) and steps > 0:
            self._count_steps(steps)
        output = real(*args, **kwargs)
        self.rows += rows if name in DENOISERS else 0
        if self.preview_at is not None:
            self._answers[key] = _Answer(output, isinstance(given, list))
        return output

    # ---------------------------------------------------------------- steps

    def _count_steps(self, total: int) -> None:
        self.total = total
        if self.preview_at is not None and int(self.preview_at * total) >= total - 1:
            raise ValueError(
                f"Expected preview_at_ratio to leave a step to run, but a preview after {total} of {total} steps would "
                "be the final picture; pass more num_inference_steps, a smaller ratio, or preview_at_ratio=None."
            )

    def _step(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        sample, as_dict = given["sample"], given.get("return_dict", True)
        if self.total is None:  # a pipe that does not say; image-to-image runs only the last of its scheduler's steps
            first = torch.as_tensor(given.get("timestep", math.nan)).flatten()[0].to(scheduler.timesteps)
            places = torch.nonzero(scheduler.timesteps == first)
            self._count_steps(len(scheduler.timesteps) - (int(places[0]) if len(places) else 0))
        if self._asked_to_stop():
            raise Cancelled
        self.steps += 1
        if self.noise is None:
            self.noise = sample.detach() / getattr(scheduler, "init_noise_sigma", 1.0)
        self._ran = not self._skipping
        if self._skipping:
            if self.resume is not None and self.steps == self.resume.steps_done:
                sample = self._restore(scheduler)
            return self._answer(sample, as_dict)
        if len(sample) != len(self.generators):
            raise UnsupportedError(
                f"Expected one row of latents for each of {len(self.generators)} candidates, but "
                f"{type(self.pipe).__name__} denoises {len(sample)}."
            )
        if "generator" in given and given["generator"] is None:
            given["generator"] = self.generators
        stop = self.preview_at is not None and self.steps == int(self.preview_at * (self.total or 0)) + 1
        clean = clean_prediction(scheduler, given["model_output"], given["timestep"], sample) if stop else None
        states = [generator.get_state() for generator in self.generators]
        with _GlobalDraws() as draws:
            result = step(*bound.args, **bound.kwargs)
        if draws.drawn:
            raise UnsupportedError(
                f"{scheduler_class(scheduler).__name__} draws noise from PyTorch's global generator, so candidates "
                "could not be made again from their seeds; use another scheduler or setting, or a newer diffusers."
            )
        self._drew |= any(not torch.equal(s, g.get_state()) for s, g in zip(states, self.generators, strict=True))
        self._last = result[0] if clean is None else clean
        if clean is None:
            return result
        self._outputs = len(result) if isinstance(result, tuple) else 1
        self.snapshot = Snapshot(
            self.steps,
            result[0],
            {name: list(v) if isinstance(v, list) else v for name, v in vars(scheduler).items()},
            [generator.get_state() for generator in self.generators],
            self._drew,
            dict(self._answers),
            self._outputs,
        )
        self._skipping = True
        return self._answer(clean.to(result[0].dtype), as_dict)

    def _restore(self, scheduler: Any) -> Tensor:
        assert self.resume is not None
        self._skipping = False
        vars(scheduler).update({n: list(v) if isinstance(v, list) else v for n, v in self.resume.state.items()})
        for generator, state in zip(self.generators, self.resume.generators, strict=True):
            generator.set_state(state)
        self._drew = self.resume.drew
        return self.resume.latents

    def _answer(self, latents: Tensor, as_dict: bool) -> Any:
        if not as_dict:
            return (latents,) * self._outputs
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(prev_sample=latents, pred_original_sample=latents)

    def _add_noise(self, scheduler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Also ``scale_noise``: note the noise that the pipe adds to an input picture, or put other noise there."""
        bound = inspect.signature(method).bind(*args, **kwargs)
        noise = bound.arguments.get("noise")
        if isinstance(noise, Tensor) and len(noise) == len(self.generators):
            if self._given is not None and self._given.shape == noise.shape:
                bound.arguments["noise"] = noise = self._given.to(noise)
            if not self.steps and self.noise is None:
                self.noise, self.added = noise.detach(), True
        return method(*bound.args, **bound.kwargs)
