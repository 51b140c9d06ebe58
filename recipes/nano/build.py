"""nano's architecture with starting weights, and the folder it is stored in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from recipes.nano.tokenizer import build_tokenizer
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.nano.configuration import TOKEN_SIDE, NanoConfig, NanoVisionConfig
from vqr1_metric.nano.modeling import NanoForConditionalGeneration

MIN_PIXELS, MAX_PIXELS = 64 * 64, 1024 * 768
#: EfficientNet-Lite was trained on (value - 127) / 128.
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255


def build_config(tokenizer: PreTrainedTokenizerFast, vision: NanoVisionConfig | None = None) -> NanoConfig:
    """The configuration of nano for its tokenizer, with another tower if one is given."""

    def token_id(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    vision = vision or NanoVisionConfig()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": vision.out_hidden_size,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    return NanoConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


@torch.no_grad()
def build_model(seed: int = 0, vision: NanoVisionConfig | None = None) -> NanoForConditionalGeneration:
    """nano in float32 with random weights, of sizes that suit narrow layers; the tower's own start comes after."""
    torch.manual_seed(seed)
    model = NanoForConditionalGeneration(build_config(build_tokenizer(), vision))
    for module in model.modules():  # 0.02, the default, is meant for wide models
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    for layer in (model.model.visual.hidden, model.model.visual.project):
        layer.weight.normal_(std=layer.in_channels**-0.5)
    model.model.language_model.embed_tokens.weight.normal_(std=0.05)
    return model


def save_folder(model: NanoForConditionalGeneration, folder: str | Path) -> Path:
    """Write a folder that loads with `from_pretrained`: config, fp16 weights, tokenizer, processor settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    half = {name: weight.detach().to(torch.float16) for name, weight in model.state_dict().items()}
    half = {name: weight.contiguous() for name, weight in half.items() if name != "lm_head.weight"}  # tied
    dtype = model.config.dtype
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=half)
    model.config.dtype = dtype
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": TOKEN_SIDE,
        "temporal_patch_size": 1,
        "merge_size": 1,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


def pixel_config() -> PixelConfig:
    """How nano wants its pixels, as the folder says."""
    return PixelConfig(TOKEN_SIDE, 1, 1, MIN_PIXELS, MAX_PIXELS, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)
