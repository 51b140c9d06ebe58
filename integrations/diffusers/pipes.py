"""Who makes the candidates: a pipe, called as its own signature says, or any function of a seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import diffusers
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from vqr1_metric.integrations.diffusers import private
from vqr1_metric.integrations.diffusers.calls import DENOISERS, Call, Snapshot
from vqr1_metric.integrations.diffusers.schedulers import (
    KNOWN_SCHEDULERS,
    UnsupportedError,
    is_of_diffusers,
    scheduler_class,
)
from vqr1_metric.integrations.diffusers.scoring import BLANKED, NOT_FINITE
from vqr1_metric.integrations.diffusers.tested import tested as flags_of

#: Arguments that say how many pictures one prompt gives.
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
#: Arguments that may hold one entry for each prompt of a list of prompts.
_TEXTS = {"prompt_2", "prompt_3", "prompt_4", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
          "negative_prompt_4"}  # fmt: skip
_PICTURES = {"image", "mask_image", "control_image", "control_mask", "masked_image_latents", "image_latents"}


@dataclass
class Made:
    """Pictures of one call (for a video: lists of frames), each with a reason why it is none, or None."""

    pictures: list[Any]
    reasons: list[str | None]
    call: Call | None = field(default=None, repr=False)


class Maker(Protocol):
    """What makes candidates."""

    name: str

    @property
    def batch_size(self) -> int: ...
    def check_arguments(self, arguments: dict[str, Any], prompts: int) -> None: ...
    def of_prompt(self, arguments: dict[str, Any], place: int, prompts: int) -> dict[str, Any]: ...
    def make(
        self,
        arguments: dict[str, Any],
        seeds: Sequence[int],
        *,
        preview_at: float | None = ...,
        resume: Snapshot | None = ...,
        latents: Tensor | None = ...,
        added_noise: Tensor | None = ...,
        on_rows: Callable[[int], None] = ...,
    ) -> Made: ...
    def about(self) -> dict[str, Any]: ...


class SampleFunction:
    """A function of a seed, or of a list of seeds, that gives a picture, or as many."""

    def __init__(self, sample: Callable[..., Any], batch_size: int | None) -> None:
        self.sample, self.batched, self.batch_size = sample, batch_size is not None, batch_size or 1
        self.name = getattr(sample, "__name__", type(sample).__name__)

    def check_arguments(self, arguments: dict[str, Any], prompts: int) -> None:
        """Whatever the function takes."""

    def of_prompt(self, arguments: dict[str, Any], place: int, prompts: int) -> dict[str, Any]:
        """All arguments are the same for every prompt."""
        return arguments

    def make(self, arguments: dict[str, Any], seeds: Sequence[int], **steer: Any) -> Made:
        """Call it."""
        given = list(seeds) if self.batched else seeds[0]
        pictures = self.sample(given, **{name: v for name, v in arguments.items() if (name, v) != ("prompt", None)})
        made = list(pictures) if self.batched else [pictures]
        return Made(made, [None] * len(made))

    def about(self) -> dict[str, Any]:
        """Its name."""
        return {"function": self.name}


class Pipe:
    """How a pipe is called, found out once, with errors for pipes that cannot be used."""

    def __init__(self, pipe: Any, batch_size: int) -> None:
        self.pipe, self._batch_size = pipe, batch_size
        self.name = type(pipe).__name__
        if not callable(pipe) or not hasattr(getattr(pipe, "scheduler", None), "step"):
            raise UnsupportedError(
                f"Expected a diffusers pipeline with a scheduler, but got {self.name}; for anything else that makes "
                "pictures there is BestOfN.from_function."
            )
        if not any(getattr(pipe, name, None) is not None for name in DENOISERS):
            raise UnsupportedError(f"Expected a pipeline with one of {', '.join(DENOISERS)}, but {self.name} has none.")
        self.modular = isinstance(pipe, diffusers.ModularPipeline)
        self.defaults = _modular_inputs(pipe) if self.modular else _call_inputs(pipe)
        if "generator" not in self.defaults:
            raise UnsupportedError(f"{self.name} takes no generator, so its candidates could not be made again.")
        self.count = next((name for name in _COUNTS if name in self.defaults), None)
        self.tested = flags_of(pipe)
        self.several = bool(self.tested and "several" in self.tested) or hasattr(
            getattr(pipe, "controlnet", None), "nets"
        )

    @property
    def batch_size(self) -> int:
        """Candidates of one call of the pipe as it is now."""
        tested = self.tested is not None and "single" not in self.tested
        batches = self.count is not None and tested and self.remembers() is None
        return self._batch_size if batches else 1

    def about(self) -> dict[str, Any]:
        """Pipe and scheduler."""
        scheduler = self.pipe.scheduler
        config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
        return {"pipe": self.name, "scheduler": type(scheduler).__name__, "scheduler_config": config,
                "diffusers": diffusers.__version__}  # fmt: skip

    def check_arguments(self, arguments: dict[str, Any], prompts: int) -> None:
        """Raise for arguments that the pipe does not take, or that cannot go with candidates of their own seeds.

        Args:
            arguments: of the pipe.
            prompts: number of prompts in a list, 1 for one or none.
        """
        unknown = sorted(set(arguments) - set(self.defaults))
        if unknown:
            raise TypeError(f"{self.name} takes no {', '.join(unknown)}.")
        if arguments.get("generator") is not None:
            raise TypeError("Expected no generator here: pass seed=, the seed of the first candidate.")
        if self.count in arguments:
            raise TypeError(f"Expected n instead of {self.count}.")
        if arguments.get("latents") is not None:
            raise ValueError("Expected no latents: each candidate's seed decides its noise. Pass seed= or seeds=.")
        if arguments.get("output_type") == "latent":
            raise ValueError(
                'Expected pictures to score, but output_type="latent" gives latents; use "pil", "np" or "pt".'
            )
        if arguments.get("return_dict", True) is not True:
            raise ValueError("Expected return_dict to be left alone.")
        for place in range(prompts):
            self.of_prompt(arguments, place, prompts)

    def of_prompt(self, arguments: dict[str, Any], place: int, prompts: int) -> dict[str, Any]:
        """``arguments`` of one of several prompts: texts, pictures and embeddings are shared out, one to each.

        A list of lists of pictures gives each prompt several. What could be meant in two ways is refused.
        """

        def refuse(name: str, got: Any) -> ValueError:
            return ValueError(
                f"Expected one {name} for each of {prompts} prompts, but got {got}." if prompts > 1 else
                f"Expected one {name} for one prompt, but got {got}; pass a list of prompts."
            )  # fmt: skip

        def own(name: str, value: Any) -> Any:
            picture, embedded = name in _PICTURES, "prompt" in name and name not in _TEXTS and name != "prompt"
            count = _entries(name, value)
            if count is None or not (picture or embedded or name in _TEXTS):
                return value
            listed = isinstance(value, (list, tuple))
            if picture and listed and all(isinstance(entry, (list, tuple)) for entry in value):
                if count != prompts:
                    raise refuse(name, f"{count} lists")
                return value[place]
            if picture and self.several:
                return value
            if self.tested is None and picture and count > 1:
                if prompts > 1:
                    raise ValueError(
                        f"Expected {name} as a list of lists, one for each of {prompts} prompts: {self.name} was not "
                        "tested, and may take several pictures for one prompt."
                    )
                return value
            if count == prompts:
                return value[place] if listed and not embedded else value[place : place + 1]
            if count == 1 and name not in _TEXTS:
                return value
            raise refuse(name, count)

        return {name: own(name, value) for name, value in arguments.items()}

    def remembers(self) -> str | None:
        """What in the pipe carries over from step to step beside latents and scheduler, or None."""
        for name in DENOISERS:
            module = getattr(self.pipe, name, None)
            if getattr(module, "is_cache_enabled", False) or private.has_stateful_hooks(module):
                return f"{name} caches activations from step to step"
        guider = getattr(self.pipe, "guider", None)  # of modular pipelines; some keep a moving average
        if guider is not None and type(guider) is not diffusers.ClassifierFreeGuidance:
            return f"{type(guider).__name__} was not tested for it"
        return None

    def reason_to_restart(self, arguments: dict[str, Any]) -> str | None:
        """Why carrying on from a saved step is not known to be exact here, or None where it is."""
        kind = scheduler_class(self.pipe.scheduler)
        if self.tested is None:
            return f"{self.name} was not tested for it"
        if kind.__name__ not in KNOWN_SCHEDULERS or not is_of_diffusers(kind):
            return f"{kind.__name__} was not tested for it"
        if arguments.get("callback_on_step_end") is not None or arguments.get("callback") is not None:
            return "a callback of yours may change the run"
        return self.remembers()

    def make(
        self,
        arguments: dict[str, Any],
        seeds: Sequence[int],
        *,
        preview_at: float | None = None,
        resume: Snapshot | None = None,
        latents: Tensor | None = None,
        added_noise: Tensor | None = None,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> Made:
        """Run the pipe once, for one candidate of each seed; ``on_rows`` is told what it cost, however it ends."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = Call(self.pipe, generators, preview_at=preview_at, resume=resume, noise=added_noise)
        arguments = dict(arguments, generator=generators)
        for name in _PICTURES & set(arguments) if self.tested and "repeat" in self.tested else ():
            given = arguments[name]
            if given is not None:
                arguments[name] = (list(given) if isinstance(given, (list, tuple)) else [given]) * len(seeds)
        if latents is not None:
            arguments["latents"] = latents
        if self.count is not None:
            arguments[self.count] = len(seeds)
        callback = arguments.get("callback_on_step_end")
        if callback is not None:
            arguments["callback_on_step_end"] = call.watching(callback)
            if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
                arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        try:
            output = call.view(**({"output": "images"} if self.modular else {}), **arguments)
        finally:
            on_rows(call.rows)
        pictures, blanked = output, None
        if not self.modular:
            pictures = getattr(output, "frames", None)
            pictures = getattr(output, "images", None) if pictures is None else pictures
            if pictures is None:
                raise UnsupportedError(f"Expected pictures or videos, but {self.name} gave {type(output).__name__}.")
            blanked = getattr(output, "nsfw_content_detected", None)
        if preview_at is not None and call.snapshot is None:
            raise UnsupportedError(
                f"There is no preview of {self.name}, which steps copies of its scheduler; use preview_at_ratio=None."
                if call.rows else
                f"There is no preview of {self.name}: it called none of {', '.join(DENOISERS)} with latents."
            )  # fmt: skip
        flags = zip(list(blanked) if blanked else [False] * len(seeds), call.not_finite(), strict=True)
        reasons = [BLANKED if blank else NOT_FINITE if bad else None for blank, bad in flags]
        return Made(list(pictures), reasons, call)


def _entries(name: str, value: Any) -> int | None:
    """How many prompts an argument has something for; None if it is one thing for all."""
    if isinstance(value, (list, tuple)):
        return len(value)
    shape: tuple[int, ...] = getattr(value, "shape", ())
    if name not in _PICTURES:
        return int(shape[0]) if len(shape) > 1 else None
    masks = "mask" in name and len(shape) == 3 and shape[0] > 1 and shape[-1] not in (1, 3, 4)
    return int(shape[0]) if len(shape) > 3 or masks else None


def _modular_inputs(pipe: Any) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in pipe.blocks.inputs if parameter.name}


def _call_inputs(pipe: Any) -> dict[str, Any]:
    parameters = inspect.signature(pipe.__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
