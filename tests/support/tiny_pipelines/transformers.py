"""Pipelines whose denoiser is a transformer."""

from typing import Any

import diffusers as d
import numpy as np
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from tiny_pipelines.parts import (
    COMMON,
    SIZE,
    TinyPipe,
    clip,
    clip_tokenizer,
    embedding,
    family,
    mistral,
    picture,
    t5,
    t5_tokenizer,
    vae,
)


@family
def sd3() -> TinyPipe:
    net = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()
    pipe = d.StableDiffusion3Pipeline(
        transformer=net,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )
    return TinyPipe(pipe, dict(COMMON, max_sequence_length=16))


@family
def flux() -> TinyPipe:
    net = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    pipe = d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=net,
    )
    return TinyPipe(pipe, dict(COMMON, max_sequence_length=16))


@family
def flux_img2img() -> TinyPipe:
    parts = {name: part for name, part in flux().pipe.components.items() if part is not None}
    arguments = dict(COMMON, max_sequence_length=16, image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.FluxImg2ImgPipeline(**parts), arguments)


@family
def flux_fill() -> TinyPipe:
    net = d.FluxTransformer2DModel(
        patch_size=1, in_channels=48, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()  # fmt: skip
    parts = {name: part for name, part in flux().pipe.components.items() if part is not None}
    for name in ("image_encoder", "feature_extractor"):
        parts.pop(name, None)
    half = Image.fromarray(np.repeat(np.uint8([0, 255]), SIZE // 2)[None].repeat(SIZE, 0))
    arguments = dict(COMMON, max_sequence_length=16, image=picture(), mask_image=half)
    return TinyPipe(d.FluxFillPipeline(**parts | {"transformer": net}), arguments)


@family
def flux_kontext() -> TinyPipe:
    parts = {name: part for name, part in flux().pipe.components.items() if part is not None}
    arguments = dict(COMMON, max_sequence_length=16, image=picture(), _auto_resize=False, max_area=SIZE * SIZE)
    return TinyPipe(d.FluxKontextPipeline(**parts), arguments)


@family
def pixart() -> TinyPipe:
    net = d.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    ).eval()
    pipe = d.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=net,
        scheduler=d.DPMSolverMultistepScheduler(),
    )
    return TinyPipe(pipe, dict(COMMON, max_sequence_length=16, use_resolution_binning=False, clean_caption=False))


@family
def pixart_alpha() -> TinyPipe:
    parts = pixart().pipe.components
    return TinyPipe(
        d.PixArtAlphaPipeline(**parts),
        dict(COMMON, max_sequence_length=16, use_resolution_binning=False, clean_caption=False),
    )


@family
def sana() -> TinyPipe:
    net = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    ).eval()
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    pipe = d.SanaPipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None,
        tokenizer=None,
    )
    ones = torch.ones(1, 7, dtype=torch.long)
    arguments = COMMON | {
        "prompt": None,
        "use_resolution_binning": False,
        "clean_caption": False,
        "prompt_embeds": embedding(8, 1),
        "prompt_attention_mask": ones,
        "negative_prompt_embeds": embedding(8, 2),
        "negative_prompt_attention_mask": ones,
        "negative_prompt": None,
    }
    return TinyPipe(pipe, arguments)


@family
def qwen_image() -> TinyPipe:
    net = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    autoencoder = d.AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    pipe = d.QwenImagePipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    ones = torch.ones(1, 7, dtype=torch.long)
    arguments = COMMON | {
        "prompt": None,
        "prompt_embeds": embedding(16, 1),
        "prompt_embeds_mask": ones,
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": embedding(16, 2, 5),
        "negative_prompt_embeds_mask": ones[:, :5],
    }
    return TinyPipe(pipe, arguments)


@family
def qwen_edit() -> TinyPipe:
    # It scales what it edits to a million pixels, and has no argument for that.
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (SIZE, SIZE, None)
    parts = qwen_image()
    pipe = d.QwenImageEditPipeline(**parts.pipe.components, processor=None)
    return TinyPipe(pipe, parts.arguments | {"image": picture()})


@family
def z_image() -> TinyPipe:
    net = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    for name, weight in net.named_parameters():  # the padding tokens are left uninitialised
        if "pad_token" in name:
            torch.nn.init.normal_(weight, std=0.02)
    pipe = d.ZImagePipeline(
        transformer=net,
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=None,
        tokenizer=None,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    arguments = COMMON | {
        "prompt": None,
        "prompt_embeds": [embedding(16, 1)[0]],
        "negative_prompt_embeds": [embedding(16, 2)[0]],
    }
    return TinyPipe(pipe, arguments)


def flux2_parts(text_width: int, guidance_embeds: bool) -> dict[str, Any]:
    net = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    ).eval()
    autoencoder = d.AutoencoderKLFlux2(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    return {"transformer": net, "vae": autoencoder, "scheduler": d.FlowMatchEulerDiscreteScheduler()}


@family
def flux2() -> TinyPipe:
    """With a text encoder like its own of 24 B; hidden states of three of its layers are the prompt."""
    encoder, tokenizer = mistral(16)
    pipe = d.Flux2Pipeline(**flux2_parts(3 * 16, True), text_encoder=encoder, tokenizer=tokenizer)
    pipe.system_message = "draw "
    arguments = dict(COMMON, height=16, width=16, text_encoder_out_layers=(1, 2, 3), max_sequence_length=24)
    return TinyPipe(pipe, arguments)


@family
def flux2_klein() -> TinyPipe:
    pipe = d.Flux2KleinPipeline(**flux2_parts(16, False), text_encoder=None, tokenizer=None)
    arguments = COMMON | {
        "prompt": None,
        "prompt_embeds": embedding(16, 1),
        "negative_prompt_embeds": embedding(16, 2),
        "height": 16,
        "width": 16,
    }
    return TinyPipe(pipe, arguments)


@family
def ltx() -> TinyPipe:
    """Video: nine frames."""
    net = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    autoencoder = d.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    pipe = d.LTXPipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    return TinyPipe(pipe, dict(COMMON, num_frames=9, max_sequence_length=16))


def wan_transformer() -> Any:
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def wan_pipe(**options: Any) -> TinyPipe:
    """Video: five frames."""
    video_vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = d.WanPipeline(
        transformer=wan_transformer(),
        vae=video_vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **options,
    )
    return TinyPipe(pipe, dict(COMMON, num_frames=5, max_sequence_length=16))


@family
def wan() -> TinyPipe:
    return wan_pipe()


@family
def wan22() -> TinyPipe:
    """Wan 2.2 14B: one transformer for the noisy steps, another for the rest, each with its own guidance."""
    tiny = wan_pipe(transformer_2=wan_transformer(), boundary_ratio=0.8)
    tiny.arguments["guidance_scale_2"] = 3.0
    return tiny
