"""What is known of pipelines: which carry on from a saved step with the same pictures, and how each is called."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vqr1_metric.integrations.diffusers.schedulers import KNOWN_SCHEDULERS, UnsupportedError
from vqr1_metric.integrations.diffusers.steering import DENOISERS

#: Pipelines whose survivors were checked to come out the same when they carry on from a saved step (docs/diffusers.md).
CARRIES_ON = {
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxImg2ImgPipeline",
    "FluxPipeline",
    "LTXPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLModularPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
    "ZImagePipeline",
}
#: Pipelines that give a seed's picture also for that seed's noise passed as ``latents``.
TAKES_NOISE = {
    "FluxPipeline",
    "LTXPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
    "ZImagePipeline",
}
#: Arguments that say how many pictures one prompt gives.
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
#: Arguments that may hold one entry for each prompt of a list of prompts.
_TEXTS = {"prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"}
_PICTURES = {"image", "mask_image", "control_image"}
#: Pipelines to which a list of pictures is all for one prompt.
_SEVERAL_PICTURES = {"Flux2KleinPipeline", "Flux2Pipeline"}

#: Given one picture for several candidates, these pipelines draw its encoding from the first candidate's generator, so
#: the others would not be what they are alone. Given one picture for each candidate they draw from each one's own.
_REPEATED = {
    "FluxImg2ImgPipeline": ("image",),
    "StableDiffusionInpaintPipeline": ("image", "mask_image"),
    "StableDiffusionXLInpaintPipeline": ("image", "mask_image"),
}


class PipeInterface:
    """How a pipe is called, found out once, with errors for pipes that cannot be used."""

    def __init__(self, pipe: Any) -> None:
        self.name = type(pipe).__name__
        if not callable(pipe) or not hasattr(getattr(pipe, "scheduler", None), "step"):
            raise UnsupportedError(f"Expected a diffusers pipeline with a scheduler, but got {self.name}.")
        if not any(getattr(pipe, name, None) is not None for name in DENOISERS):
            raise UnsupportedError(f"Expected a pipeline with one of {', '.join(DENOISERS)}, but {self.name} has none.")
        self.modular = _is_modular(pipe)
        self.defaults = _modular_inputs(pipe) if self.modular else _call_inputs(pipe)
        if "generator" not in self.defaults:
            raise UnsupportedError(f"{self.name} takes no generator, so its candidates could not be made again.")
        self.count = next((name for name in _COUNTS if name in self.defaults), None)
        self.batches = self.count is not None and self.name in CARRIES_ON

    def check_arguments(self, arguments: dict[str, Any]) -> None:
        """Raise for arguments that the pipe does not take, or that cannot go with candidates of their own seeds."""
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

    def of_prompt(self, pipe: Any, arguments: dict[str, Any], place: int, prompts: int) -> dict[str, Any]:
        """``arguments`` of one of several prompts: what is listed once a prompt is shared out."""
        several = self.name in _SEVERAL_PICTURES or self.name not in CARRIES_ON
        several |= hasattr(getattr(pipe, "controlnet", None), "nets")

        def own(name: str, value: Any) -> Any:
            if not isinstance(value, list) or name not in _TEXTS | _PICTURES:
                return value
            if name in _TEXTS and len(value) != prompts:
                raise ValueError(f"Expected one {name} for each of {prompts} prompts, but got {len(value)}.")
            nested = all(isinstance(entry, list) for entry in value)
            whole = name in _PICTURES and (len(value) != prompts or (several and not nested))
            return value if whole else value[place]

        return {name: own(name, value) for name, value in arguments.items()}

    def remembers(self, pipe: Any) -> str | None:
        """What in the pipe carries over from step to step beside latents and scheduler, or None."""
        for name in DENOISERS:
            module = getattr(pipe, name, None)
            if getattr(module, "is_cache_enabled", False) or _has_stateful_hooks(module):
                return f"{name} caches activations from step to step"
        guider = getattr(pipe, "guider", None)  # of modular pipelines; some keep a moving average
        if guider is not None and type(guider).__name__ != "ClassifierFreeGuidance":
            return f"{type(guider).__name__} was not tested for it"
        return None

    def check_noise(self) -> None:
        """Raise where the first noise of a candidate may not be what the pipe takes as ``latents``."""
        if self.name not in TAKES_NOISE:
            raise UnsupportedError(
                f"Searching needs one of {', '.join(sorted(TAKES_NOISE))}, which take noise as latents, "
                f"but got {self.name}; use a larger n."
            )

    def reason_to_restart(self, pipe: Any, arguments: dict[str, Any]) -> str | None:
        """Why carrying on from a saved step is not known to be exact here, or None where it is."""
        scheduler = type(pipe.scheduler).__name__
        if self.name not in CARRIES_ON:
            return f"{self.name} was not tested for it"
        if scheduler not in KNOWN_SCHEDULERS:
            return f"{scheduler} was not tested for it"
        if arguments.get("callback_on_step_end") is not None or arguments.get("callback") is not None:
            return "a callback of yours may change the run"
        return self.remembers(pipe)

    def call(self, pipe: Any, arguments: dict[str, Any], count: int, generators: list) -> tuple[list, list[bool]]:
        """Run the pipe for ``count`` candidates.

        Returns:
            The pictures (for a video: lists of frames), and which of them a safety checker has blanked.
        """
        arguments = dict(arguments, generator=generators)
        for name in _REPEATED.get(self.name, ()):
            if name in arguments:
                given = arguments[name]
                arguments[name] = (given if isinstance(given, list) and len(given) == 1 else [given]) * count
        if self.count is not None:
            arguments[self.count] = count
        if self.modular:
            pictures, blanked = pipe(output="images", **arguments), None
        else:
            output = pipe(**arguments)
            pictures = getattr(output, "frames", None)
            pictures = getattr(output, "images", None) if pictures is None else pictures
            if pictures is None:
                raise UnsupportedError(f"Expected pictures or videos, but {self.name} gave {type(output).__name__}.")
            blanked = getattr(output, "nsfw_content_detected", None)
        return list(pictures), list(blanked) if blanked else [False] * count


def _has_stateful_hooks(module: Any) -> bool:
    """Does it hold hooks of diffusers that remember earlier calls (caches applied without ``enable_cache``)?"""
    if not isinstance(module, torch.nn.Module):
        return False
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook._is_stateful for registry in registries if registry for hook in registry.hooks.values())


def _is_modular(pipe: Any) -> bool:
    from diffusers import ModularPipeline

    return isinstance(pipe, ModularPipeline)


def _modular_inputs(pipe: Any) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in pipe.blocks.inputs if parameter.name}


def _call_inputs(pipe: Any) -> dict[str, Any]:
    parameters = inspect.signature(pipe.__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
