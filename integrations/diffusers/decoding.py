"""Latents to pictures in the middle of a run, where the pipe cannot be asked to decode; for known families only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError

_PLAIN = {
    "LatentConsistencyModelPipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLModularPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
    "ZImagePipeline",
}
_PACKED = {"FluxPipeline", "QwenImagePipeline"}
_FLUX2 = {"Flux2KleinPipeline", "Flux2Pipeline"}
DECODED = _PLAIN | _PACKED | _FLUX2


def check_decoding(pipe: Any) -> None:
    """Raise where :func:`decode` does not know the pipeline."""
    name = type(pipe).__name__
    if name not in DECODED:
        raise UnsupportedError(
            f"There is no preview inside a run of {name}; use BestOfN, whose previews the pipe decodes itself, or pass "
            "decode=, a function of the pipe and latents that gives pictures."
        )


def decode(pipe: Any, latents: Tensor, call: Mapping[str, Any]) -> list:
    """Pictures (for Wan: lists of frames) as PIL, decoded one after the other to save memory.

    Args:
        pipe: of one of the families in ``DECODED``.
        latents: shape ``(candidates, ...)``, as they leave the scheduler.
        call: local variables of the pipe's running call: ``height``, ``width``, ``latent_ids``.
    """
    check_decoding(pipe)
    name = type(pipe).__name__
    vae, config = pipe.vae, pipe.vae.config
    if name in _PACKED:
        latents = pipe._unpack_latents(latents, call["height"], call["width"], pipe.vae_scale_factor)
    if name in _FLUX2:
        latents = pipe._unpack_latents_with_ids(latents, call["latent_ids"][: len(latents)])
        variance = vae.bn.running_var + config.batch_norm_eps
        mean, std = (v.view(1, -1, 1, 1).to(latents) for v in (vae.bn.running_mean, variance.sqrt()))
        latents = pipe._unpatchify_latents(latents * std + mean)
    else:
        latents = latents / config.get("scaling_factor", 1.0)
        if config.get("latents_mean") is not None:
            shape = (1, -1, *(1,) * (latents.ndim - 2))
            mean, std = (torch.tensor(config[key]).view(shape).to(latents) for key in ("latents_mean", "latents_std"))
            latents = latents * std + mean
        elif config.get("shift_factor") is not None:
            latents = latents + config.shift_factor
    upcast = vae.dtype == torch.float16 and config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        with torch.no_grad():
            decoded = [vae.decode(row.to(vae.dtype), return_dict=False)[0] for row in latents.split(1)]
    finally:
        if upcast:
            vae.to(torch.float16)
    if name == "WanPipeline":
        return [pipe.video_processor.postprocess_video(video, output_type="pil")[0] for video in decoded]
    pictures = [picture[:, :, 0] if picture.ndim == 5 else picture for picture in decoded]
    return [pipe.image_processor.postprocess(picture, output_type="pil")[0] for picture in pictures]
