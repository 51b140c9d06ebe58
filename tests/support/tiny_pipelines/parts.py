"""Parts of tiny pipelines: real but small encoders, tokenizers, autoencoders and networks with random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

FAMILIES: dict[str, Callable[[], "TinyPipe"]] = {}
SIZE = 32
COMMON = {"prompt": "a lighthouse", "num_inference_steps": 6, "height": SIZE, "width": SIZE}
#: Pipelines that take the picture's size from an input picture, or have no choice.
SIZELESS = {"prompt": "a lighthouse", "num_inference_steps": 6}


@dataclass
class TinyPipe:
    """A pipe and what to call it with."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)


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


def mistral(width: int) -> tuple[Any, Any]:
    """Text encoder and tokenizer of Flux.2, one token a letter."""
    text = {
        "model_type": "mistral",
        "vocab_size": 32,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=31)
    letters = {letter: 2 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1} | letters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    return Mistral3ForConditionalGeneration(config).eval(), tokenizer


def vae(channels: int = 4, **options: Any) -> Any:
    return d.AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    ).eval()


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


def picture(channels: int = 3) -> Image.Image:
    values = torch.rand(SIZE, SIZE, channels, generator=torch.Generator().manual_seed(5)).mul(255).byte().numpy()
    return Image.fromarray(values if channels == 3 else values[..., 0])


def embedding(width: int, number: int, tokens: int = 7) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(number))
