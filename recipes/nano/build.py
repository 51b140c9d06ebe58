"""nano's architecture, its starting weights, and the folder it is stored in."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .start import PATCH, start_tower
from .tokenizer import build_tokenizer

MERGE = 2
MAX_PIXELS = 384 * 384
MIN_PIXELS = 64 * 64
IMAGE_MEAN = 0.5
IMAGE_STD = 0.5


def build_config(tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of nano for its tokenizer."""

    def token_id(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    vision = {
        "depth": 3,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_heads": 8,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "window_size": 128,
        "out_hidden_size": 192,
        "fullatt_block_indexes": [],  # the language model sees the whole picture; the tower need not
        "hidden_act": "silu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
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
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """nano with starting weights, in float32."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(build_tokenizer()))
    visual = model.model.visual
    with torch.no_grad():
        for module in model.modules():  # 0.02, the default, is meant for wide models
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
        for block in [*visual.blocks]:
            block.attn.proj.weight.mul_(0.5)
            block.mlp.down_proj.weight.mul_(0.5)
        start_tower(visual, seed)
        model.model.language_model.embed_tokens.weight.normal_(std=0.05)
    return model


def save_folder(model: Qwen2_5_VLForConditionalGeneration, folder: str | Path, max_pixels: int = MAX_PIXELS) -> Path:
    """Write a folder that loads with `from_pretrained`: config, fp16 weights, tokenizer, processor settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    half = {name: weight.detach().to(torch.float16) for name, weight in model.state_dict().items()}
    half = {name: weight for name, weight in half.items() if name != "lm_head.weight"}  # tied to the embedding
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
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "min_pixels": MIN_PIXELS,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels},
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": MERGE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder
