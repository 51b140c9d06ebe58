"""The pipelines of tests/support/diffusers_matrix.py: the only table of names. Everything else is asked of the pipe."""

from __future__ import annotations

from typing import Any

from vqr1_metric.integrations.diffusers.schedulers import is_of_diffusers

#: Pipelines whose survivors were checked to come out the same when they carry on from a saved step, several in a call.
#: ``decodes``: what the callback decodes in the middle of a run was checked to be what the pipe decodes.
#: ``packs``: it takes no noise as its scheduler sees it. ``several``: a list of pictures is all for one prompt.
#: ``repeat``: one picture for several candidates would be encoded with the first one's generator: each gets its own.
#: ``single``: that is so, and it does not take one for each either: one candidate a call.
TESTED = {
    "Flux2KleinPipeline": "decodes packs several",
    "Flux2Pipeline": "decodes packs several",
    "FluxFillPipeline": "decodes repeat",
    "FluxImg2ImgPipeline": "repeat",
    "FluxKontextPipeline": "decodes",
    "FluxPipeline": "decodes",
    "LTXPipeline": "",
    "LatentConsistencyModelPipeline": "decodes",
    "PixArtAlphaPipeline": "",
    "PixArtSigmaPipeline": "",
    "QwenImageEditPipeline": "decodes",
    "QwenImagePipeline": "decodes",
    "SanaPipeline": "decodes",
    "StableDiffusion3Pipeline": "decodes",
    "StableDiffusionControlNetImg2ImgPipeline": "decodes",
    "StableDiffusionControlNetPipeline": "decodes",
    "StableDiffusionImg2ImgPipeline": "decodes",
    "StableDiffusionInpaintPipeline": "decodes repeat",
    "StableDiffusionInstructPix2PixPipeline": "decodes",
    "StableDiffusionLatentUpscalePipeline": "",
    "StableDiffusionPipeline": "decodes",
    "StableDiffusionUpscalePipeline": "single",
    "StableDiffusionXLControlNetImg2ImgPipeline": "decodes",
    "StableDiffusionXLControlNetPipeline": "decodes",
    "StableDiffusionXLImg2ImgPipeline": "",
    "StableDiffusionXLInpaintPipeline": "repeat",
    "StableDiffusionXLModularPipeline": "decodes",
    "StableDiffusionXLPipeline": "decodes",
    "WanPipeline": "decodes",
    "ZImagePipeline": "decodes",
}


def tested(pipe: Any) -> set[str] | None:
    """What was tested of this pipeline, None for one that was not: by its class, not by the class's name."""
    kind = type(pipe)
    if kind.__name__ not in TESTED or not is_of_diffusers(kind):
        return None
    if hasattr(pipe, "blocks") and not _all_of_diffusers(pipe.blocks):
        return None
    return set(TESTED[kind.__name__].split())


def _all_of_diffusers(blocks: Any) -> bool:
    """Are these blocks of a modular pipeline, and all within, those of diffusers or of this package?"""
    own = type(blocks).__module__.startswith(("diffusers.", "vqr1_metric."))
    return own and all(map(_all_of_diffusers, (getattr(blocks, "sub_blocks", None) or {}).values()))
