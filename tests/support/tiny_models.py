"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints for tests: real classes, real tokenizer, no download.

A folder made here is what ``AutoModelForImageTextToText.from_pretrained`` gets from a hub, small: 2 language and 2
vision layers, about 0.2 M weights. What could hide an error is kept as in the released models: the M-RoPE sections, one
windowed and one full vision layer (Qwen2.5-VL), deepstack features and 16-pixel patches (Qwen3-VL), legacy generation
settings that are nearly greedy, and how Qwen's vocabulary cuts the answer. Weights are drawn so that activations stay
near 1 and logits differ by several units: a wrong mask or position then shows in every figure.
"""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
#: Qwen3.5-VL: half of its layers have linear attention.
HYBRID = "qwen3_5"

# Qwen2's pre-tokenizer: every digit is a word, punctuation takes the line breaks that follow it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CORPUS = """system user assistant You are a helpful assistant. Picture:
You are doing the image quality assessment task. Here is the question: What is your overall rating on the quality of
this picture? The rating should be a float between 1 and 5, rounded to two decimal places, with 1 representing very poor
quality and 5 representing excellent quality. First output the thinking process in < think> </think> tags and then
output the final answer with only one score in < answer> </answer> tags. Please only output the final answer.
answer think The picture is sharp, well exposed and free of noise: its quality is good.
answer think It is blurred and full of compression artefacts, so the overall quality is poor.

answer

think

""" + "".join(
    f"{left}{middle}{right}\n"
    for left in ("think>", "answer>")
    for middle in ("", "\n", "\n\n")
    for right in ("3.5</answer>", "< think>", "</think>", "4 </answer>\n")
)
_TEMPLATE = """\
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
DEFAULT_SYSTEM
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
{%- set images.count = images.count + 1 -%}
{%- if add_vision_id %}Picture {{ images.count }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
_SYSTEM_TURN = """\
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}"""


def build_tiny_model(
    folder: str | Path,
    family: str = "qwen2_5_vl",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write a checkpoint folder of one of ``FAMILIES`` and return its path; the same seed gives the same weights."""
    if family not in (*FAMILIES, HYBRID):
        raise ValueError(f"Expected family to be one of {(*FAMILIES, HYBRID)} but got {family!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(_tokenizer_json(family))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _config(family, tokenizer, tie_word_embeddings)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config)
        _draw_weights(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(folder)
    for name, content in _side_files(family, tokenizer).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    return folder


def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every weight random, biases and norms too; 3 is the standard deviation of the logits, 1.3 a layer's gain."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            elif "embed_tokens" in name or "pos_embed" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * (3.0 if "lm_head" in name else 1.3) / weight[0].numel() ** 0.5)


def _config(family: str, tokenizer: Tokenizer, tie_word_embeddings: bool):
    token = tokenizer.token_to_id
    sections = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [3, 3, 2], HYBRID: [3, 3, 2]}[family]
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        # Qwen2-VL calls the tower's width embed_dim and the width of its output hidden_size.
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 14}
        vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
    else:
        text |= {"head_dim": 16}
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 16}
        vision |= {"num_position_embeddings": 64}
        if family == HYBRID:
            text["rope_parameters"] |= {"partial_rotary_factor": 1.0}
            text |= {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4}
            text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        else:
            vision |= {"deepstack_visual_indexes": [0, 1]}
    return CONFIG_MAPPING[family](
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )


@cache
def _tokenizer_json(family: str) -> str:
    """Byte-level BPE with Qwen's words, trained on the prompts; the tests of this module list what must hold."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The corpus writes "< answer>": a word "<answer" would become one token, and in Qwen's vocabulary it is two.
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS] * 2, trainer)
    tokenizer.add_special_tokens(list(_SPECIAL))
    if family in ("qwen3_vl", HYBRID):  # Qwen3 has the two tags as tokens of their own, not special ones
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return tokenizer.to_str()


def _side_files(family: str, tokenizer: Tokenizer) -> dict[str, object]:
    qwen3 = family in ("qwen3_vl", HYBRID)
    clip = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    # As released: Qwen2-VL and Qwen2.5-VL name the limits min_pixels and max_pixels, Qwen3-VL only size.
    limits = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    if not qwen3:
        limits = {"min_pixels": 3136, "max_pixels": 12845056}
    processor = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    processor[HYBRID] = "Qwen3VLProcessor"
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast" if qwen3 else "Qwen2VLImageProcessor",
            "processor_class": processor[family],
            "patch_size": 16 if qwen3 else 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **limits,
            **(half if qwen3 else clip),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": processor[family],
            "model_max_length": 4096,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(_SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
        },
        "chat_template.jinja": _TEMPLATE.replace("DEFAULT_SYSTEM\n", "" if qwen3 else _SYSTEM_TURN + "\n"),
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1e-6,
            "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
        },
    }


def build_tiny_nano(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a folder of the embedded model's class, tiny and random, with the tokenizer of the Qwen2.5-VL above."""
    from vqr1_metric.nano.configuration import NanoConfig
    from vqr1_metric.nano.modeling import NanoForConditionalGeneration

    folder = build_tiny_model(folder, "qwen2_5_vl", seed=seed)
    qwen = json.loads((folder / "config.json").read_text())
    blocks = [(8, 3, 1, 8), (16, 3, 2, 8), (24, 5, 2, 12), (24, 3, 1, 12), (24, 5, 2, 16), (32, 3, 2, 24)]
    vision = {"stem": 8, "blocks": blocks, "taps": (1, 3, 5), "filters": 4, "projection": 64, "out_hidden_size": 64}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    config = NanoConfig(
        text_config=qwen["text_config"] | {"intermediate_size": 128},  # what 4-bit kernels take
        vision_config=vision,
        **{name: qwen[name] for name in names if name in qwen},
    )
    with torch.random.fork_rng(devices=[]):
        model = NanoForConditionalGeneration(config)
        _draw_weights(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.model.visual.scale.fill_(1.0)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 32,
        "temporal_patch_size": 1,
        "merge_size": 1,
        "min_pixels": 64 * 64,
        "max_pixels": 1024 * 768,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder
