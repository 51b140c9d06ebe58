"""LoRA adapters, merged into their base as strictly as the base is loaded: every tensor fits, none is left over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqr1_metric.backends.base import ModelError, as_model_error
from vqr1_metric.backends.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelFiles, read_json

#: Names of modules before transformers 4.52, and after; PEFT writes "base_model.model." before them.
_OLD_NAMES = (
    (re.compile(r"^(base_model\.model\.)?model\.(?=layers\.|embed_tokens\b|norm\b)"), r"\1model.language_model."),
    (re.compile(r"^(base_model\.model\.)?visual\."), r"\1model.visual."),
)
#: Settings that change what an adapter computes in ways that were not tried here.
_UNKNOWN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_PATTERN_SECONDS = 10.0
#: Run in a process of its own, because nothing ends a regular expression from within.
_TRY_PATTERNS = """
import json, re, sys
told = json.load(sys.stdin)
for pattern in told["patterns"]:
    for name in told["names"]:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
        re.match(rf".*\\.[^.]*\\.{pattern}\\.(\\d+)\\.", name)
"""


def merge_adapter(model: nn.Module, files: ModelFiles) -> nn.Module:
    """The base model with the adapter's weights added to its own.

    Raises:
        ModelError: for an adapter that is none, does not fit the base, fits in part or holds more.
    """
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError:
        raise ModelError(
            f"{files.name} is a LoRA adapter, which needs peft: pip install 'vqr1-metric[train]'"
        ) from None
    folder = files.adapter
    assert folder is not None
    settings = _settings(folder / ADAPTER_CONFIG, set(LoraConfig.__dataclass_fields__))
    found = _tensors(folder / ADAPTER_WEIGHTS)
    _check_ranks(files.name, settings, found)
    _check_patterns(folder / ADAPTER_CONFIG, settings, [name for name, _ in model.named_modules()])
    with as_model_error(files.name, "the LoRA adapter cannot be laid over its base"):
        with torch.random.fork_rng(devices=[]):  # an adapter starts at random
            adapted = get_peft_model(model, LoraConfig(**settings))
        _check_fit(files.name, get_peft_model_state_dict(adapted), found)
        left_over = set_peft_model_state_dict(adapted, found).unexpected_keys
        if left_over:
            raise ModelError(f"{files.name}: the adapter's tensor {left_over[0]} has no place in its base.")
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged


def _settings(path: Path, known: set[str]) -> dict[str, Any]:
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{path}: expected a LoRA adapter, but got one of type {settings.get('peft_type')!r}.")
    strange = [name for name, value in settings.items() if value and (name in _UNKNOWN or name not in known)]
    if strange:
        raise ModelError(
            f"{path}: this adapter uses {', '.join(strange)}, which is not known here. Merge it into its base with the "
            "library that made it (PeftModel.merge_and_unload), and name the merged model."
        )
    ranks = [settings.get("r"), *_values(path, settings, "rank_pattern")]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks):
        raise ModelError(f"{path}: expected whole numbers above 0 as r and in rank_pattern, but got {ranks}.")
    scales = [settings.get("lora_alpha"), *_values(path, settings, "alpha_pattern")]
    if not all(isinstance(scale, int | float) and abs(scale) < float("inf") for scale in scales):
        raise ModelError(f"{path}: expected numbers as lora_alpha and in alpha_pattern, but got {scales}.")
    modules = settings.get("target_modules")
    if isinstance(modules, list) and all(isinstance(name, str) for name in modules):
        settings["target_modules"] = [_modern(name) for name in modules]
    settings = {name: value for name, value in settings.items() if name in known}
    return {**settings, "inference_mode": True, "auto_mapping": None, "lora_dropout": 0.0}


def _values(path: Path, settings: Mapping[str, Any], name: str) -> list[Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected an object as {name}, but got {value!r}.")
    return list(value.values())


def _tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors under today's names."""
    from safetensors.torch import load_file

    with as_model_error(path, "the adapter's weights are damaged"):
        stored = load_file(path)
    tensors = {_modern(name): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise ModelError(f"{path}: expected every tensor once, but some are there under an old and a new name.")
    spoiled = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if spoiled:
        raise ModelError(f"{path}: expected finite weights, but {spoiled[0]} holds NaN or infinity.")
    return tensors


def _modern(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = old.sub(new, name)
    return name


def _check_ranks(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Before anything of that size is allocated; whether every tensor fits is seen later."""
    found = [t.shape[0] for key, t in tensors.items() if ("lora_A" in key or "lora_embedding_A" in key) and t.dim()]
    if not found:
        raise ModelError(f"{name}: expected LoRA weights in {ADAPTER_WEIGHTS}, but no tensor in it is one.")
    told = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    if told > max(found):
        raise ModelError(
            f"{name}: expected adapter weights of rank {told}, as {ADAPTER_CONFIG} says, but got {max(found)}."
        )


def _check_patterns(path: Path, settings: Mapping[str, Any], names: list[str]) -> None:
    """Raise for a pattern of module names that is none, or that does not come to an end on the model's names."""
    patterns = [value for key in ("target_modules", "exclude_modules") if isinstance(value := settings.get(key), str)]
    patterns += [*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {})]
    layers = settings.get("layers_pattern") or []
    patterns += [layers] if isinstance(layers, str) else [layer for layer in layers if isinstance(layer, str)]
    patterns = [pattern for pattern in patterns if set(pattern) & set("*+{?|([")]
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", _TRY_PATTERNS]
    told = json.dumps({"patterns": patterns, "names": names})
    try:
        subprocess.run(command, input=told, text=True, check=True, capture_output=True, timeout=_PATTERN_SECONDS)
    except subprocess.TimeoutExpired:
        shown = ", ".join(pattern[:80] for pattern in patterns[:3])
        raise ModelError(f"{path}: a pattern of module names does not come to an end ({shown}).") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:]
        raise ModelError(f"{path}: expected regular expressions of module names ({''.join(reason)[:200]}).") from None


def _check_fit(name: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for problem, keys in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if keys:
            raise ModelError(
                f"{name}: expected an adapter that fits its base exactly, but {len(keys)} of its tensors are {problem} "
                f"({', '.join(sorted(keys)[:2])}, ...)."
            )
    for key, tensor in wanted.items():
        if tensor.shape != found[key].shape:
            raise ModelError(
                f"{name}: expected an adapter that fits its base exactly, but {key} has the shape "
                f"{tuple(found[key].shape)} instead of {tuple(tensor.shape)}."
            )
