"""Pipelines whose denoiser is a UNet."""

from typing import Any

import diffusers as d
import torch
from PIL import Image

from tiny_pipelines.parts import (
    COMMON,
    SIZE,
    SIZELESS,
    TinyPipe,
    clip,
    clip_tokenizer,
    family,
    picture,
    unet,
    vae,
)


def ddim() -> Any:
    return d.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd_parts() -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@family
def sd() -> TinyPipe:
    return TinyPipe(d.StableDiffusionPipeline(**sd_parts()), dict(COMMON))


@family
def img2img() -> TinyPipe:
    arguments = dict(SIZELESS, image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.StableDiffusionImg2ImgPipeline(**sd_parts()), arguments)


@family
def lcm() -> TinyPipe:
    parts = sd_parts() | {"unet": unet(time_cond_proj_dim=8), "scheduler": d.LCMScheduler(clip_sample=False)}
    return TinyPipe(d.LatentConsistencyModelPipeline(**parts), dict(COMMON))


def mask() -> Image.Image:
    left = Image.new("L", (SIZE, SIZE), 0)
    left.paste(255, (0, 0, SIZE // 2, SIZE))
    return left


@family
def inpaint() -> TinyPipe:
    arguments = dict(COMMON, image=picture(), mask_image=mask())
    return TinyPipe(d.StableDiffusionInpaintPipeline(**sd_parts()), arguments)


@family
def inpaint9() -> TinyPipe:
    """Inpainting with a model that sees the mask (nine input channels)."""
    parts = sd_parts() | {"unet": unet(in_channels=9)}
    return TinyPipe(d.StableDiffusionInpaintPipeline(**parts), dict(COMMON, image=picture(), mask_image=mask()))


def control(**options: Any) -> Any:
    net = d.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        **options,
    ).eval()
    for weight in (p for n, p in net.named_parameters() if "controlnet" in n):
        torch.nn.init.normal_(weight, std=0.3)  # zero as released, and then nothing would show
    return net


@family
def controlnet() -> TinyPipe:
    parts = sd_parts() | {"controlnet": control(cross_attention_dim=32, attention_head_dim=4)}
    return TinyPipe(d.StableDiffusionControlNetPipeline(**parts), dict(COMMON, image=picture()))


@family
def controlnet_img2img() -> TinyPipe:
    """What the tile ControlNet is released for."""
    parts = sd_parts() | {"controlnet": control(cross_attention_dim=32, attention_head_dim=4)}
    arguments = dict(SIZELESS, image=picture(), control_image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.StableDiffusionControlNetImg2ImgPipeline(**parts), arguments)


@family
def pix2pix() -> TinyPipe:
    """Edits a picture as the prompt says."""
    parts = sd_parts() | {"unet": unet(in_channels=8), "image_encoder": None}
    return TinyPipe(
        d.StableDiffusionInstructPix2PixPipeline(**parts), dict(SIZELESS, image=picture(), image_guidance_scale=1.5)
    )


@family
def sd_upscale() -> TinyPipe:
    """The upscaler to four times the size, here two: its autoencoder has fewer levels."""
    net = unet(in_channels=7, num_class_embeds=30)
    parts = sd_parts() | {"unet": net, "vae": vae(scaling_factor=0.08333), "low_res_scheduler": d.DDPMScheduler()}
    del parts["requires_safety_checker"]
    pipe = d.StableDiffusionUpscalePipeline(**parts, max_noise_level=30)
    return TinyPipe(pipe, dict(SIZELESS, image=picture(), noise_level=20))


@family
def upscale() -> TinyPipe:
    """Latent upscaling: no callbacks, one candidate a call."""
    net = unet(
        in_channels=8,
        out_channels=5,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=160,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        block_out_channels=(32, 32, 64, 64),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        mid_block_type=None,
        only_cross_attention=False,
        norm_num_groups=None,
        attention_head_dim=8,
    )
    pipe = d.StableDiffusionLatentUpscalePipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=net,
        scheduler=d.EulerDiscreteScheduler(prediction_type="sample"),
    )
    return TinyPipe(pipe, dict(SIZELESS, image=picture()))


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
}


@family
def sdxl() -> TinyPipe:
    pipe = d.StableDiffusionXLPipeline(
        vae=vae(),
        unet=unet(**SDXL),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )
    return TinyPipe(pipe, dict(COMMON))


@family
def sdxl_controlnet() -> TinyPipe:
    parts = sdxl().pipe.components | {"controlnet": control(**SDXL)}
    return TinyPipe(
        d.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False), dict(COMMON, image=picture())
    )


@family
def sdxl_controlnet_img2img() -> TinyPipe:
    parts = sdxl().pipe.components | {"controlnet": control(**SDXL)}
    arguments = dict(SIZELESS, image=picture(), control_image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.StableDiffusionXLControlNetImg2ImgPipeline(**parts, add_watermarker=False), arguments)


@family
def sdxl_img2img() -> TinyPipe:
    pipe = d.StableDiffusionXLImg2ImgPipeline(**sdxl().pipe.components, add_watermarker=False)
    return TinyPipe(pipe, dict(SIZELESS, image=picture(), strength=0.8, num_inference_steps=8))


@family
def sdxl_inpaint() -> TinyPipe:
    pipe = d.StableDiffusionXLInpaintPipeline(**sdxl().pipe.components, add_watermarker=False)
    return TinyPipe(pipe, dict(COMMON, image=picture(), mask_image=mask(), strength=0.99))


@family
def sdxl_modular() -> TinyPipe:
    from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

    parts = sdxl().pipe.components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    return TinyPipe(pipe, dict(COMMON))
