"""Steers one call of a pipe from outside: stop after a preview, or carry on from a saved step with chosen candidates.

Nothing of a pipeline is copied here. For the length of one call the denoisers and ``scheduler.step`` go through
:class:`Steering`, which works the same for pipelines with and without callbacks, with ``torch.compile`` and with
offloading hooks. A skipped step costs nothing: the denoiser answers with what it last said, and the scheduler hands
the latents on. So the pipe itself encodes, blends and decodes, and a preview is a picture that the pipe made.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.patching import wrap_call
from vqr1_metric.integrations.diffusers.schedulers import (
    UnsupportedError,
    clean_prediction,
    row_state,
    take_rows,
    total_steps,
)

#: Components whose calls are counted in denoiser rows.
DENOISERS = ("unet", "transformer", "transformer_2")
#: Denoisers that take turns (Wan 2.2: one for the early, one for the late steps), so that either may answer.
_TURNS = {"transformer": "transformer_2", "transformer_2": "transformer"}
#: Components that are called at each step with the latents and what conditions them.
CONDITIONED = (*DENOISERS, "controlnet")


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
        answers: for every denoiser and number of input rows a candidate has: its last output.
        outputs: number of tensors that ``scheduler.step`` returned.
    """

    steps_done: int
    latents: Tensor
    state: dict[str, Any]
    generators: list[Tensor]
    answers: dict[tuple[str, int], _Answer] = field(default_factory=dict)
    outputs: int = 1

    @staticmethod
    def gather(snapshots: Sequence[Snapshot], rows: Sequence[tuple[int, int]]) -> Snapshot:
        """Chosen candidates, as pairs (position in ``snapshots``, row), of chunks that stand at the same step.

        The denoisers' answers are taken from the first snapshot; the others need not hold any.
        """
        first = snapshots[0]
        old = len(first.latents)
        answers = {key: answer.resized(old, len(rows)) for key, answer in first.answers.items()}
        return Snapshot(
            first.steps_done,
            torch.stack([snapshots[s].latents[r] for s, r in rows]),
            take_rows([s.state for s in snapshots], rows, [tuple(s.latents.shape) for s in snapshots]),
            [snapshots[s].generators[r] for s, r in rows],
            answers,
            first.outputs,
        )


class Steering:
    """Context manager round one call of ``pipe``.

    Args:
        pipe: a pipeline with a ``scheduler`` and a denoiser.
        generators: one for each candidate of the call; they are given to ``scheduler.step`` where the pipe does not, so
            that schedulers that draw noise draw each candidate's own.
        preview_at: share of the steps to run, in (0, 1), before the call is cut short: it then returns decoded
            predictions of the clean pictures, and ``snapshot`` is set.
        resume: a snapshot of these candidates; the steps it has behind it are skipped.

    Attributes:
        rows: denoiser rows computed.
        steps: scheduler steps seen, skipped ones included.
        noise: what entered the first step, of unit variance where that was noise, shape ``(candidates, ...)``.
    """

    def __init__(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        *,
        preview_at: float | None = None,
        resume: Snapshot | None = None,
    ) -> None:
        self.pipe, self.generators = pipe, list(generators)
        self.preview_at, self.resume = preview_at, resume
        self.rows = self.steps = 0
        self.noise: Tensor | None = None
        self.snapshot: Snapshot | None = None
        self._stop: int | None = None
        self._skipping = resume is not None
        self._answers: dict[tuple[str, int], _Answer] = dict(resume.answers) if resume else {}
        self._outputs = resume.outputs if resume else 1
        self._undo: list[Callable[[], None]] = []

    # ---------------------------------------------------------------- in and out

    def __enter__(self) -> Steering:
        scheduler = self.pipe.scheduler
        state = dict(vars(scheduler))
        self._step, self._signature = scheduler.step, inspect.signature(scheduler.step)

        @functools.wraps(self._step)  # pipelines look at the signature before they pass eta and generators
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._steered_step(*args, **kwargs)

        scheduler.step = step

        def restore() -> None:
            vars(scheduler).clear()
            vars(scheduler).update(state)

        self._undo.append(restore)
        for name in CONDITIONED:
            module = getattr(self.pipe, name, None)
            if isinstance(module, torch.nn.Module):
                self._gate(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _gate(self, name: str, module: torch.nn.Module) -> None:
        def gate(call: Callable[..., Any]) -> Callable[..., Any]:
            def gated(*args: Any, **kwargs: Any) -> Any:
                given = next((a for a in (*args, *kwargs.values()) if isinstance(a, (Tensor, list))), None)
                rows = 0 if given is None else len(given)
                key = (name, rows // len(self.generators))
                turns = (_TURNS.get(name), key[1])
                if self._skipping and (known := self._answers.get(key) or self._answers.get(turns)):
                    return known.output
                self._check_preview_step()
                output = call(*args, **kwargs)
                if name in DENOISERS:
                    self.rows += rows
                if self.preview_at is not None:
                    self._answers[key] = _Answer(output, isinstance(given, list))
                return output

            return gated

        self._undo.append(wrap_call(module, gate, always=True))

    # ---------------------------------------------------------------- steps

    def _check_preview_step(self) -> None:
        """Before the first denoiser call, when the number of steps is known."""
        if self.preview_at is None or self._stop is not None:
            return
        total = total_steps(self.pipe)
        self._stop = max(1, math.floor(self.preview_at * total + 1e-6))
        if self._stop >= total:
            raise ValueError(
                f"Expected preview_at_ratio to leave a step to run, but a preview after {self._stop} of {total} steps "
                "would be the final picture; pass more num_inference_steps or preview_at_ratio=None."
            )

    def _steered_step(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        sample, as_dict = given["sample"], given.get("return_dict", True)
        self.steps += 1
        if self.noise is None:
            self.noise = sample.detach() / getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)
        if self._skipping:
            return self._answer(self._restore(sample) if self._returns(sample) else sample, as_dict)
        if len(sample) != len(self.generators):
            raise UnsupportedError(
                f"Expected one row of latents for each of {len(self.generators)} candidates, but "
                f"{type(self.pipe).__name__} denoises {len(sample)}. "
                "A callback that drops candidates cannot be passed to BestOfN."
            )
        if "generator" in given and given["generator"] is None:
            bound.arguments["generator"] = self.generators
        stop = self.steps == self._stop
        clean = (
            clean_prediction(self.pipe.scheduler, given["model_output"], given["timestep"], sample) if stop else None
        )
        before = _random_states(sample.device)
        result = self._step(*bound.args, **bound.kwargs)
        if not all(map(torch.equal, before, _random_states(sample.device))):
            raise UnsupportedError(
                f"{type(self.pipe.scheduler).__name__} draws noise from PyTorch's global generator, so candidates "
                "could not be made again from their seeds; use another scheduler or setting, or a newer diffusers."
            )
        if not stop:
            return result
        latents = result[0]
        self._outputs = len(result) if isinstance(result, tuple) else 1
        self.snapshot = Snapshot(
            self.steps,
            latents,
            row_state(self.pipe.scheduler),
            [generator.get_state() for generator in self.generators],
            dict(self._answers),
            self._outputs,
        )
        self._skipping = True
        return self._answer(clean.to(latents.dtype), as_dict)

    def _returns(self, sample: Tensor) -> bool:
        """Is this the last of the skipped steps of a resumed call?"""
        return self.resume is not None and self.steps == self.resume.steps_done

    def _restore(self, sample: Tensor) -> Tensor:
        self._skipping = False
        vars(self.pipe.scheduler).update(self.resume.state)
        for generator, state in zip(self.generators, self.resume.generators, strict=True):
            generator.set_state(state)
        return self.resume.latents

    def _answer(self, latents: Tensor, as_dict: bool) -> Any:
        if not as_dict:
            return (latents,) * self._outputs
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(prev_sample=latents, pred_original_sample=latents)


def _random_states(device: torch.device) -> list[Tensor]:
    """State of the global generators that noise on this device may be drawn from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
