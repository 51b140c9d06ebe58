"""nano's architecture, its starting weights, and the folder it is stored in."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .tokenizer import build_tokenizer

PATCH = 16
MERGE = 2
MAX_PIXELS = 384 * 384
MIN_PIXELS = 64 * 64
# Pixels enter as (x + 1) / 0.5, from 2 to 4: the patch embedding has no bias and the norms after it forget scale, so
# the constant part must ride on the pixels for contrast to be measured against.
IMAGE_MEAN = -1.0
IMAGE_STD = 0.5
TOKEN_SPREAD = 0.3
"""Spread over pictures of the mean visual token when the language model first sees it."""


def build_config(tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of nano for its tokenizer."""

    def token_id(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    vision = {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_heads": 8,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "window_size": 128,
        "out_hidden_size": 192,
        "fullatt_block_indexes": [3],
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


def _dct_basis(size: int) -> Tensor:
    """Orthonormal 2-D DCT basis (size, size, size, size): vertical and horizontal frequency, then rows and columns."""
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (n + 0.5)[None] * n[:, None] / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return torch.einsum("ui,vj->uvij", basis, basis)


def dct_patch_weights(width: int, seed: int = 0) -> Tensor:
    """Starting weights (width, 3, 1, 16, 16) of the patch embedding: a DCT in place of noise.

    The first block after it then sees band energies at once. Each coefficient is divided by its usual size in
    photographs (which falls a little faster than 1 / frequency), so that fine detail, which quality lives in, is not
    drowned by coarse shapes.
    """
    basis = _dct_basis(PATCH)
    u, v = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    order = torch.argsort((u * u + v * v).flatten().double(), stable=True).tolist()
    radius = (u * u + v * v).double().sqrt().flatten()
    flat = basis.reshape(PATCH * PATCH, PATCH, PATCH)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    chroma = torch.tensor([[0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]], dtype=torch.float64)

    def scale(index: int) -> float:
        return float(0.75 * radius[index] ** 1.5)

    rows = [flat[0][None] * luma[:, None, None] * 0.25, *(flat[0][None] * c[:, None, None] for c in chroma)]
    for c in chroma:
        rows += [flat[i][None] * c[:, None, None] * scale(i) * 3 for i in order[1:15]]
    left = width - len(rows)
    kept = left - 24
    rows += [flat[i][None] * luma[:, None, None] * scale(i) for i in order[1 : kept + 1]]
    generator = torch.Generator().manual_seed(seed)
    rest = order[kept + 1 :]
    for _ in range(24):  # the finest frequencies share the remaining units
        signs = torch.randint(0, 2, (len(rest),), generator=generator).double() * 2 - 1
        mixed = sum(s * flat[i] * scale(i) for s, i in zip(signs, rest, strict=True)) / math.sqrt(len(rest))
        rows.append(mixed[None] * luma[:, None, None])
    return torch.stack(rows)[:, :, None].float()


@torch.no_grad()
def standardise_tokens(visual: torch.nn.Module, norm: torch.nn.BatchNorm1d) -> None:
    """Fold the statistics of the pooled tokens into the merger, so that the language model sees what differs."""
    last = visual.merger.mlp[2]
    scale = TOKEN_SPREAD / (norm.running_var + norm.eps).sqrt()
    last.weight *= scale[:, None]
    last.bias.copy_((last.bias - norm.running_mean) * scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(TOKEN_SPREAD**2)


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
        model.model.language_model.embed_tokens.weight.normal_(std=0.05)
        visual.patch_embed.proj.weight.copy_(dct_patch_weights(visual.config.hidden_size, seed))
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
