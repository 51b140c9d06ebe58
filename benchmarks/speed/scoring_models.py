"""The models that the speed of scoring is measured on: nano, or an architecture with random weights on the device.

Speed does not depend on the weights. Random models borrow nano's tokenizer and chat template, whose prompt is about as
long as that of the released models (88 tokens against 110).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.rehearse.folder import SHAPES
from vqr1_metric.backends.loading import EMBEDDED, LoadedModel, ModelSpec
from vqr1_metric.backends.packing import use_packing
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.backends.windows import speed_up
from vqr1_metric.scorer import QualityScorer

_PUBLISHED = SHAPES["7b"]
#: Sizes of Qwen2.5-VL-7B, which VisualQuality-R1-7B is; of one with as many layers and next to no work in them, for the
#: time that calling them takes; and of a model for tests.
ARCHITECTURES = {
    "7b": (_PUBLISHED.text, _PUBLISHED.vision),
    "thin": (
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 28,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1024,
            "mrope_section": [1, 1, 2],
        },
        {
            "hidden_size": 32,
            "intermediate_size": 16,
            "depth": 32,
            "num_heads": 1,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "tiny": (
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "mrope_section": [2, 3, 3],
        },
        {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
    ),
}
PIXELS = PixelConfig(
    14, 2, 2, 3136, 12845056, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def make_backend(name: str, device: str, dtype: str | None) -> TransformersBackend:
    """Nano, a folder or Hub name, or an architecture of this file."""
    if name not in ARCHITECTURES:
        return QualityScorer(name, device=device, dtype=dtype).backend
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLConfig

    text, vision = (dict(sizes) for sizes in ARCHITECTURES[name])
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta", 1e6),
        "mrope_section": text.pop("mrope_section"),
    }
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["nano"])
    special = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text |= {"rope_parameters": rope, "max_position_embeddings": 128_000, "tie_word_embeddings": False}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"], "window_size": 112, "patch_size": 14},
        tie_word_embeddings=False,
        **special,
    )
    wanted = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=wanted, attn_implementation="sdpa")
    model.requires_grad_(False).eval()
    speed_up(model)
    template = (EMBEDDED["nano"] / "chat_template.jinja").read_text(encoding="utf-8")
    loaded = LoadedModel(model, tokenizer, PIXELS, template, "random weights")
    return TransformersBackend(ModelSpec(name, device=device), loaded)


@contextmanager
def stock_tower(model: torch.nn.Module) -> Iterator[None]:
    """The vision tower as transformers has it."""
    replaced = {m: vars(m).pop("forward") for m in model.model.visual.modules() if "forward" in vars(m)}
    attention = model.model.visual.config._attn_implementation
    model.set_attn_implementation({"vision_config": "sdpa"})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": attention})
        for module, forward in replaced.items():
            module.forward = forward


@contextmanager
def packed_prompts(model: torch.nn.Module) -> Iterator[None]:
    """Pictures of unequal size without padding, as with ``attn_implementation="packed"``."""
    attention = model.config.get_text_config()._attn_implementation
    use_packing(model)
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": attention})
