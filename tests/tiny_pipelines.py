"""Small random pipelines of every family, built from configurations alone: no download, milliseconds a step.

``build(family)`` gives a pipe and the arguments that it is called with. Text encoders and tokenizers are real but tiny
where a pipeline repeats its text for several pictures only if it encodes it itself; elsewhere ready embeddings are
passed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

FAMILIES: dict[str, Callable[[], "TinyPipe"]] = {}
SIZE = 32


@dataclass
class TinyPipe:
    """A pipe and what to call it with."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)


def build(family: str, scheduler: str | None = None, **scheduler_options: Any) -> TinyPipe:
    """A pipe of one of ``FAMILIES`` with seeded weights, on a scheduler of its own or the named one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = FAMILIES[family]()
    if scheduler is not None:
        kind = getattr(d, scheduler)
        if "clip_sample" in inspect.signature(kind).parameters:
            scheduler_options.setdefault(
                "clip_sample", False
            )  # as in the released pipelines: latents are not in [-1, 1]
        tiny.pipe.scheduler = kind.from_config(tiny.pipe.scheduler.config, **scheduler_options)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def family(function: Callable[[], TinyPipe]) -> Callable[[], TinyPipe]:
    FAMILIES[function.__name__] = function
    return function


def clip(width: int = 32, projection: bool = False) -> Any:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    # The end token is not the released 2: transformers takes that for a legacy checkpoint and looks for the largest
    # number.
    return kind(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def clip_tokenizer() -> Any:
    letters = {
        f"{c}{end}": 3 + 2 * i + (end == "") for i, c in enumerate("abcdefghijklmnopqrstuvwxyz") for end in ("", "</w>")
    }
    return CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "!</w>": 2, **letters}, merges=[], model_max_length=16
    )


def t5() -> Any:
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)


def vae(channels: int = 4, **options: Any) -> Any:
    return d.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def unet(**options: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return d.UNet2DConditionModel(**(settings | options)).eval()


def ddim() -> Any:
    return d.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


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


def picture(channels: int = 3) -> Image.Image:
    values = torch.rand(SIZE, SIZE, channels, generator=torch.Generator().manual_seed(5)).mul(255).byte().numpy()
    return Image.fromarray(values if channels == 3 else values[..., 0])


COMMON = {"prompt": "a lighthouse", "num_inference_steps": 6, "height": SIZE, "width": SIZE}
#: Pipelines that take the picture's size from an input picture, or have no choice.
SIZELESS = {"prompt": "a lighthouse", "num_inference_steps": 6}


@family
def sd() -> TinyPipe:
    return TinyPipe(d.StableDiffusionPipeline(**sd_parts()), dict(COMMON))


@family
def img2img() -> TinyPipe:
    arguments = dict(SIZELESS, image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.StableDiffusionImg2ImgPipeline(**sd_parts()), arguments)


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


@family
def controlnet() -> TinyPipe:
    net = d.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    ).eval()  # fmt: skip
    for weight in (p for n, p in net.named_parameters() if "controlnet" in n):
        torch.nn.init.normal_(weight, std=0.3)  # zero as released, and then nothing would show
    parts = sd_parts() | {"controlnet": net}
    return TinyPipe(d.StableDiffusionControlNetPipeline(**parts), dict(COMMON, image=picture()))


@family
def upscale() -> TinyPipe:
    """Latent upscaling: no callbacks, one candidate a call."""
    net = unet(
        in_channels=8, out_channels=5, time_embedding_type="fourier", timestep_post_act="gelu", time_cond_proj_dim=160,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3), block_out_channels=(32, 32, 64, 64),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), resnet_time_scale_shift="scale_shift",
        act_fn="gelu", conv_in_kernel=1,
        conv_out_kernel=1, mid_block_type=None, only_cross_attention=False, norm_num_groups=None, attention_head_dim=8,
    )  # fmt: skip
    pipe = d.StableDiffusionLatentUpscalePipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=net,
        scheduler=d.EulerDiscreteScheduler(prediction_type="sample"),
    )  # fmt: skip
    return TinyPipe(pipe, dict(SIZELESS, image=picture()))


@family
def sdxl() -> TinyPipe:
    net = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80, cross_attention_dim=64, use_linear_projection=True,
        attention_head_dim=(2, 4),
    )  # fmt: skip
    pipe = d.StableDiffusionXLPipeline(
        vae=vae(), unet=net, text_encoder=clip(), text_encoder_2=clip(projection=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), add_watermarker=False,
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading"
        ),
    )  # fmt: skip
    return TinyPipe(pipe, dict(COMMON))


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


@family
def sd3() -> TinyPipe:
    net = d.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    pipe = d.StableDiffusion3Pipeline(
        transformer=net, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.06),
        text_encoder=clip(projection=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip
    return TinyPipe(pipe, dict(COMMON, max_sequence_length=16))


@family
def flux() -> TinyPipe:
    net = d.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    pipe = d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.06), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(), transformer=net,
    )  # fmt: skip
    return TinyPipe(pipe, dict(COMMON, max_sequence_length=16))


@family
def flux_img2img() -> TinyPipe:
    parts = {name: part for name, part in flux().pipe.components.items() if part is not None}
    arguments = dict(COMMON, max_sequence_length=16, image=picture(), strength=0.8, num_inference_steps=8)
    return TinyPipe(d.FluxImg2ImgPipeline(**parts), arguments)


@family
def pixart() -> TinyPipe:
    net = d.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
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


def embedding(width: int, number: int, tokens: int = 7) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(number))


@family
def sana() -> TinyPipe:
    net = d.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    ).eval()  # fmt: skip
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = d.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    pipe = d.SanaPipeline(
        transformer=net, vae=autoencoder, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    ones = torch.ones(1, 7, dtype=torch.long)
    arguments = COMMON | {
        "prompt": None, "use_resolution_binning": False, "clean_caption": False, "prompt_embeds": embedding(8, 1),
        "prompt_attention_mask": ones, "negative_prompt_embeds": embedding(8, 2),
        "negative_prompt_attention_mask": ones,
        "negative_prompt": None,
    }  # fmt: skip
    return TinyPipe(pipe, arguments)


@family
def qwen_image() -> TinyPipe:
    net = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    autoencoder = d.AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = d.QwenImagePipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    ones = torch.ones(1, 7, dtype=torch.long)
    arguments = COMMON | {
        "prompt": None, "prompt_embeds": embedding(16, 1), "prompt_embeds_mask": ones, "true_cfg_scale": 3.0,
        "negative_prompt_embeds": embedding(16, 2, 5), "negative_prompt_embeds_mask": ones[:, :5],
    }  # fmt: skip
    return TinyPipe(pipe, arguments)


@family
def z_image() -> TinyPipe:
    net = d.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4,
        4],
        axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    for name, weight in net.named_parameters():  # the padding tokens are left uninitialised
        if "pad_token" in name:
            torch.nn.init.normal_(weight, std=0.02)
    pipe = d.ZImagePipeline(
        transformer=net, vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159), text_encoder=None, tokenizer=None,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    arguments = COMMON | {
        "prompt": None, "prompt_embeds": [embedding(16, 1)[0]], "negative_prompt_embeds": [embedding(16, 2)[0]],
    }  # fmt: skip
    return TinyPipe(pipe, arguments)


@family
def flux2() -> TinyPipe:
    """Flux.2 klein: the pipeline of Flux.2 without its 24 B text encoder."""
    net = d.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    ).eval()  # fmt: skip
    autoencoder = d.AutoencoderKLFlux2(
        sample_size=32, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,), layers_per_block=1, latent_channels=1,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    pipe = d.Flux2KleinPipeline(
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    arguments = COMMON | {
        "prompt": None, "prompt_embeds": embedding(16, 1), "negative_prompt_embeds": embedding(16, 2), "height": 16,
        "width": 16,
    }  # fmt: skip
    return TinyPipe(pipe, arguments)


@family
def ltx() -> TinyPipe:
    """Video: nine frames."""
    net = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip
    autoencoder = d.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False,
        False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    pipe = d.LTXPipeline(
        transformer=net, vae=autoencoder, scheduler=d.FlowMatchEulerDiscreteScheduler(), text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip
    return TinyPipe(pipe, dict(COMMON, num_frames=9, max_sequence_length=16))


@family
def wan() -> TinyPipe:
    """Video: five frames."""
    net = d.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    video_vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = d.WanPipeline(
        transformer=net, vae=video_vae, text_encoder=t5(), tokenizer=t5_tokenizer(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    return TinyPipe(pipe, dict(COMMON, num_frames=5, max_sequence_length=16))
