"""Load a Qwen-VL model with transformers, strictly: what does not fit, or cannot be right, is an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqr1_metric.backends.adapters import merge_adapter
from vqr1_metric.backends.base import Model, ModelError, as_model_error
from vqr1_metric.backends.files import CHAT_TEMPLATES, CONFIG, GENERATION, ModelFiles, read_json
from vqr1_metric.backends.packing import use_packing
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.shared import cached, model_identity, revision_of
from vqr1_metric.backends.spec import EMBEDDED, TREE_ATTENTION, ModelSpec
from vqr1_metric.backends.templates import render_chat
from vqr1_metric.backends.windows import speed_up
from vqr1_metric.nano import MODEL_TYPE
from vqr1_metric.protocol import messages, write_reply

__all__ = ["EMBEDDED", "SUPPORTED_TYPES", "TREE_ATTENTION", "LoadedModel", "ModelSpec", "cached", "load_model"]

SUPPORTED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", MODEL_TYPE)
#: On a CPU, weights up to this size are searched for NaN and infinity; larger ones would be read from the disk for it
#: alone, and the readout notices what spoils a score.
_SEARCHED_BYTES = 4 << 30
#: Entries of config.json that would choose code or files: those are chosen by ModelSpec and the folder's own names.
_NO_CHOICE = ("auto_map", "transformers_weights", "attn_implementation", "experts_implementation")
_LAYER = re.compile(r"(?:^|\.)(layers|blocks)\.(\d+)\.")


@dataclass
class LoadedModel:
    """Weights, tokenizer and preprocessing of one model.

    Args:
        identity: of :func:`~vqr1_metric.backends.shared.model_identity`; None for weights that are in memory only, or
            were changed there.
    """

    model: Model
    tokenizer: Any
    pixel_config: PixelConfig
    chat_template: str
    revision: str
    identity: dict[str, object] | None = None


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a model strictly: a missing or unexpected tensor, pickled weights or remote code are errors.

    Raises:
        ModelError: says what was looked for, what went wrong and what to use instead.
    """
    files = ModelFiles.of(spec)
    identity = model_identity(spec, files)
    config, pixel_config = _config(files), files.pixel_config()
    _check_pixels(files, config, pixel_config)
    tokenizer = _tokenizer(files, config)
    template = _chat_template(files, tokenizer)
    render_chat(tokenizer, template, messages(thinking=False), name=files.name)

    model = _load_weights(spec, files, config)
    if files.adapter is not None:
        model = merge_adapter(model, files)
    _check_finite(files, model)
    if spec.attn_implementation != "eager":
        speed_up(model)
    if spec.attn_implementation == "packed":
        use_packing(model)
    model.requires_grad_(False).eval()
    return LoadedModel(model, tokenizer, pixel_config, template, revision_of(files, identity), identity)


def _config(files: ModelFiles) -> Any:
    path = files.need(CONFIG)
    told = read_json(path)
    model_type = told.get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise ModelError(
            f"{files.base}: expected a model of type {', '.join(SUPPORTED_TYPES)}, but got {model_type!r}."
        )
    from transformers import CONFIG_MAPPING

    import vqr1_metric.nano.modeling  # noqa: F401  makes the embedded model known to transformers

    with as_model_error(path, "expected the configuration of a Qwen-VL model"):
        config = CONFIG_MAPPING[model_type].from_dict(_without_choices(told))
        text, vision = config.get_text_config(), config.vision_config
        layers, blocks = text.num_hidden_layers, getattr(vision, "depth", 0)
        sliding = getattr(text, "use_sliding_window", False)
    if sliding:
        raise ModelError(
            "The one-pass readout needs full attention, but this model's config has use_sliding_window=true."
        )
    found = _layers(files)  # before a model of any other size is built
    for name, stated, held in (("num_hidden_layers", layers, found["layers"]), ("depth", blocks, found["blocks"])):
        if not isinstance(stated, int) or stated > held:
            raise ModelError(f"{path}: says {name} = {stated!r}, but the weights hold {held} layers.")
    return config


def _without_choices(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {
            name: _without_choices(value)
            for name, value in settings.items()
            if name not in _NO_CHOICE and not name.startswith("_")
        }
    return settings


def _layers(files: ModelFiles) -> dict[str, int]:
    """How many layers the language model and blocks the vision tower have, by the names of the stored tensors."""
    from safetensors import safe_open

    counts = {"layers": 0, "blocks": 0}
    for path in files.weights():
        damaged = as_model_error(files.name, "the weights are damaged; download or copy them again")
        with damaged, safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for kind, number in (match.groups() for name in names if (match := _LAYER.search(name))):
            counts[kind] = max(counts[kind], int(number) + 1)
    return counts


def _check_pixels(files: ModelFiles, config: Any, pixels: PixelConfig) -> None:
    vision = config.vision_config
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    got = (pixels.patch_size, pixels.merge_size, pixels.temporal_patch_size)
    if wanted != got:
        raise ModelError(
            f"{files.name}: expected the preprocessor of this model, with patch, merge and temporal patch sizes "
            f"{wanted}, but its preprocessor_config.json has {got}."
        )


def _tokenizer(files: ModelFiles, config: Any) -> Any:
    if files.find("tokenizer.json") is None and (files.find("vocab.json") is None or files.find("merges.txt") is None):
        raise ModelError(f"{files.name}: expected a tokenizer (tokenizer.json) beside the weights, but there is none.")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path := files.find(name)) is not None:
            read_json(path)
    from transformers import AutoTokenizer

    with as_model_error(files.name, "its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(str(files.base), trust_remote_code=False, local_files_only=True)
        rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values(), default=-1)
        placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)
        reply = write_reply(3.5)
        round_trip = tokenizer.decode(
            tokenizer.encode(reply, add_special_tokens=False), clean_up_tokenization_spaces=False
        )
    if placeholder is None or largest >= rows or round_trip != reply:
        raise ModelError(
            f"{files.name}: expected this model's tokenizer, but it has {largest + 1} tokens for {rows} embeddings, "
            f"{placeholder!r} as the token of images, and reads {reply} as {round_trip[:40]!r}."
        )
    return tokenizer


def _load_weights(spec: ModelSpec, files: ModelFiles, config: Any) -> Model:
    from transformers import AutoModelForImageTextToText

    if (generation := files.find(GENERATION)) is not None:
        _check_generation(generation)
    dtype = spec.resolved_dtype(files.weight_bytes())
    attention = "eager" if spec.attn_implementation == "eager" else "sdpa"
    options: dict[str, Any] = {}
    if spec.quantization:
        options["quantization_config"] = _quantization_config(spec, dtype)
    if spec.device_map:
        options["device_map"] = spec.device_map
    elif spec.quantization:
        options["device_map"] = {"": spec.resolved_device()}
    with as_model_error(files.name, "the model could not be loaded"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(files.base),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=attention,
            **options,
        )
        model, info = loaded  # two, with output_loading_info
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            some = ", ".join(str(key) for key in sorted(info[kind], key=str)[:3])
            raise ModelError(
                f"{spec.model}: expected weights that fit the model exactly, but {len(info[kind])} tensors are "
                f"{kind.removesuffix('_keys')} ({some}, ...)."
            )
    used = {part._attn_implementation for part in (model.config, model.config.get_text_config())}
    if used != {attention}:
        raise ModelError(f"{files.name}: expected {attention} attention, but transformers chose {sorted(used)}.")
    return model if "device_map" in options else model.to(spec.resolved_device())


def _check_generation(path: Path) -> None:
    ends = read_json(path).get("eos_token_id")
    numbers: Iterable[Any] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ModelError(f"{path}: expected token numbers as eos_token_id, but got {ends!r}.")


def _check_finite(files: ModelFiles, model: Model) -> None:
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    on_cpu = sum(t.numel() * t.element_size() for t in tensors.values() if t.device.type == "cpu")
    for name, tensor in tensors.items():
        if tensor.is_meta or (tensor.device.type == "cpu" and on_cpu > _SEARCHED_BYTES):
            continue
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):  # reads it once, copies nothing
            raise ModelError(
                f"{files.name}: expected finite weights, but {name} holds NaN or infinity in {model.dtype}. The file "
                "is damaged, or its training diverged."
            )


def _quantization_config(spec: ModelSpec, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            f"quantization={spec.quantization!r} needs bitsandbytes: pip install 'vqr1-metric[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig

    # It says at every product of every layer that inputs are cast, which is how 8 bits work.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _chat_template(files: ModelFiles, tokenizer: Any) -> str:
    path = files.find(*CHAT_TEMPLATES)
    template = tokenizer.chat_template
    if path is not None and path.suffix == ".json":
        template = read_json(path).get("chat_template")
    elif path is not None:
        with as_model_error(path, "expected a text"):
            template = path.read_text(encoding="utf-8")
    if not isinstance(template, str) or not template.strip():
        raise ModelError(f"{files.name}: expected a chat template (chat_template.jinja), but there is none.")
    return template
