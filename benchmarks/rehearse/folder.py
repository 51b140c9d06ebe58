"""A checkpoint folder in the published layout with random weights: real sizes, real vocabulary, legacy tensor names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.rehearse.vocabulary import qwen_tokenizer
from vqr1_metric.nano import FOLDER

GIB = 1 << 30
_SHARD_BYTES = 4 * GIB
#: Random numbers drawn once; every tensor is cut from them, since drawing 8 billion takes minutes.
_POOL = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, as its config.json states them."""

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool


_QWEN2_5_TOWER = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2,
}  # fmt: skip
_QWEN3_TOWER = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17], "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip

SHAPES = {
    # Qwen2.5-VL-7B-Instruct, which VisualQuality-R1-7B is, and its smaller sister.
    "7b": Shape(
        "qwen2_5_vl",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        _QWEN2_5_TOWER | {"out_hidden_size": 3584},
        tied=False,
    ),
    "3b": Shape(
        "qwen2_5_vl",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
         "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        _QWEN2_5_TOWER | {"out_hidden_size": 2048},
        tied=True,
    ),
    # Qwen3-VL-2B-Instruct and Qwen3-VL-8B-Instruct.
    "qwen3-vl-2b": Shape(
        "qwen3_vl",
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5e6,
         "mrope_section": [24, 20, 20]},
        _QWEN3_TOWER | {"out_hidden_size": 2048},
        tied=True,
    ),
    "qwen3-vl-8b": Shape(
        "qwen3_vl",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5e6,
         "mrope_section": [24, 20, 20]},
        _QWEN3_TOWER | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
                        "deepstack_visual_indexes": [8, 16, 24]},
        tied=False,
    ),
    # As deep and as wide as a test needs, with the real vocabulary.
    "tiny": Shape(
        "qwen2_5_vl",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 152064, "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        _QWEN2_5_TOWER | {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                          "fullatt_block_indexes": [1], "out_hidden_size": 64},
        tied=False,
    ),
}  # fmt: skip


def config_of(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json``: flat, as Qwen2.5-VL publishes it, or with a ``text_config``, as Qwen3-VL does."""
    token = tokenizer.token_to_id
    sizes = dict(shape.text)
    sections = sizes.pop("mrope_section")
    text = sizes | {
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    shared = {
        "model_type": shape.model_type,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "vision_config": shape.vision | {"model_type": shape.model_type},
    }
    if shape.model_type == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True}
        text |= {"rope_scaling": rope, "model_type": "qwen3_vl_text", "tie_word_embeddings": shape.tied}
        return shared | {"text_config": text, "architectures": ["Qwen3VLForConditionalGeneration"]}
    return shared | text | {
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": sizes["num_hidden_layers"],
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    }  # fmt: skip


def write_folder(name: str, folder: Path) -> tuple[int, int]:
    """Write the checkpoint; returns its number of tensors and of bytes. A folder that holds it is left alone.

    Raises:
        OSError: if the disk has no room for it, before anything is written.
    """
    shape, qwen3 = SHAPES[name], SHAPES[name].model_type == "qwen3_vl"
    tokenizer = qwen_tokenizer(qwen3)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config_of(shape, tokenizer))
    shapes = dict(_tensor_shapes(folder))
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["metadata"]["total_size"] == size:
        return len(shapes), size
    free = shutil.disk_usage(folder).free
    if free < size + GIB:
        raise OSError(
            f"{folder}: expected {size / GIB:.1f} GiB of free disk and one to spare, but {free / GIB:.1f} are"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(FOLDER / "chat_template.jinja", folder)
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 131072, "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    _write_json(folder / "generation_config.json", {
        "do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "pad_token_id": 151643,
        "bos_token_id": 151643, "eos_token_id": [151645, 151643],
    })  # fmt: skip
    _write_json(folder / "preprocessor_config.json", _preprocessor(qwen3))
    _write_shards(folder, shapes, size)
    return len(shapes), size


def _preprocessor(qwen3: bool) -> dict[str, Any]:
    if qwen3:
        limits = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
        look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    else:
        limits = {"min_pixels": 3136, "max_pixels": 12845056}
        look = {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": 14,
        }
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "merge_size": 2,
        "temporal_patch_size": 2,
        **limits,
        **look,
    }


def _tensor_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, as the published files spell the names."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    legacy = model.config.model_type == "qwen2_5_vl"
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if legacy:
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        yield name, tuple(tensor.shape)


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], size: int) -> None:
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        number = 2 * torch.Size(shape).numel()
        if filled and filled + number > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += number
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(shape, name, pool) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    # Last: a folder with an index is whole.
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _random(shape: tuple[int, ...], name: str, pool: torch.Tensor) -> torch.Tensor:
    """Weights whose activations stay near 1: norms are 1, biases 0, a product keeps the size of what it takes."""
    if len(shape) == 1:
        return (torch.ones if "norm" in name or "ln_q" in name else torch.zeros)(shape, dtype=torch.bfloat16)
    number = torch.Size(shape).numel()
    start = hash(shape) % 997
    flat = pool[start:].repeat(number // (len(pool) - start) + 1)[:number]
    return (flat / torch.Size(shape[1:]).numel() ** 0.5).view(shape)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
