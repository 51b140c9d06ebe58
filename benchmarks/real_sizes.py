"""SDXL and the 7B scoring model in their real sizes with random weights, for timing; and the same in small numbers.

Sizes of stabilityai/stable-diffusion-xl-base-1.0 (UNet 2.6 B, VAE 84 M; prompts are random embeddings) and of
TianheWu/VisualQuality-R1-7B (8.3 B). Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from vqr1_metric.backends.loading import LoadedModel, ModelSpec, load_model
from vqr1_metric.backends.transformers import TransformersBackend

_UNET = {
    "full": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "small": {
        "sample_size": 8,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
_VAE_CHANNELS = {"full": (128, 256, 512, 512), "small": (32, 32, 32, 32)}
_TEXT = {
    "full": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    },
}
_SECTIONS = {"full": [16, 24, 24], "small": [4, 6, 6]}
_VISION = {
    "full": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "small": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
}
_FULL_ATTENTION = {"full": [7, 15, 23, 31], "small": [1]}


def sdxl(sizes: str, device: str) -> tuple[diffusers.StableDiffusionXLPipeline, dict[str, Any]]:
    """A pipe, and the random embeddings to call it with instead of a prompt.

    Args:
        sizes: ``"full"`` or ``"small"``.
        device: of all weights; bfloat16 on a GPU, float32 on a CPU.
    """
    settings = _UNET[sizes]
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            **settings,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=_VAE_CHANNELS[sizes],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=False,
        )
    # The pooled prompt shares its input with six sizes of the picture.
    pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae.eval().to(dtype),
        unet=unet.eval().to(dtype),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 1, 77, settings["cross_attention_dim"], generator=generator).to(device, dtype)
    pooled_prompt, pooled_negative = torch.randn(2, 1, pooled, generator=generator).to(device, dtype)
    return pipe, {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled_prompt,
        "negative_pooled_prompt_embeds": pooled_negative,
    }


def scoring_model(sizes: str, device: str) -> TransformersBackend:
    """A scoring model with random weights; its tokenizer and prompt are those of nano.

    Args:
        sizes: ``"full"`` or ``"small"``.
        device: of the weights; bfloat16 on a GPU, float32 on a CPU.
    """
    nano = load_model(ModelSpec("nano", device="cpu"))
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = _VISION[sizes] | {
        "fullatt_block_indexes": _FULL_ATTENTION[sizes],
        "out_hidden_size": _TEXT[sizes]["hidden_size"],
        "patch_size": 14,
        "window_size": 112,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = _TEXT[sizes] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _SECTIONS[sizes]},
        "bos_token_id": None,
        "eos_token_id": nano.model.config.text_config.eos_token_id,
        "tie_word_embeddings": False,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: getattr(nano.model.config, name) for name in tokens},
    )
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        )
    model.generation_config.eos_token_id = nano.model.generation_config.eos_token_id
    pixels = replace(
        nano.pixel_config,
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        min_pixels=3136,
        max_pixels=12_845_056,
    )
    loaded = LoadedModel(
        model.requires_grad_(False).eval(), nano.tokenizer, pixels, nano.chat_template, f"random, {sizes} sizes"
    )
    return TransformersBackend(ModelSpec("random", device=device), loaded)
