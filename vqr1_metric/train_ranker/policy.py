"""The model to train: loading it, and loading it again from a checkpoint, both strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.loading import LoadedModel, ModelSpec, load_model
from vqr1_metric.train_ranker.config import RankerConfig


def load_policy(config: RankerConfig) -> LoadedModel:
    """The start model with trainable weights (frozen ones under LoRA), on this process's device, in training mode."""
    from accelerate import PartialState

    device = PartialState().device
    spec = ModelSpec(
        config.model,
        config.revision,
        dtype=config.dtype or default_dtype(config, device.type),
        device=str(device),
        quantization=config.quantization,
        attn_implementation=config.attn_implementation,
    )
    if spec.folder is not None and (spec.folder / "adapter_config.json").is_file():
        raise ModelError(
            f"Expected a full model to start from, but {config.model} is a LoRA adapter. Merge it into its base first: "
            "train with merge=True, or PeftModel.merge_and_unload."
        )
    loaded = load_model(spec)
    model: Any = loaded.model
    if not config.lora_rank:
        model.requires_grad_(True)
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    model.train()
    return loaded


def default_dtype(config: RankerConfig, device: str) -> str:
    """float32 weights for the optimiser's small steps; bfloat16 for weights that LoRA leaves as they are."""
    return "bfloat16" if config.lora_rank and device != "cpu" else "float32"


def lora_config(config: RankerConfig) -> Any:
    """PEFT's settings: every linear layer but the head, the vision tower too unless it is frozen."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=r".*\bvisual\b.*" if config.freeze_vision else None,
        task_type="CAUSAL_LM",
        revision=config.revision,
    )


def base_model(model: Any) -> Any:
    """The Qwen-VL model, inside PEFT's wrapper or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_checkpoint(model: Any, folder: str | Path) -> None:
    """Load a checkpoint's weights into a model in place; every tensor must be there and none may be left over.

    transformers' own resuming goes by the names in the file with ``strict=False``, and those are not the model's for
    Qwen-VL (huggingface/transformers#43701): it would load next to nothing and say so in a log line.
    """
    folder = Path(folder)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        saved = load_file(folder / "adapter_model.safetensors")
        wanted = get_peft_model_state_dict(model)
        _check_names(folder, set(wanted), set(saved))
        left_over = set_peft_model_state_dict(model, saved).unexpected_keys
        if left_over:
            raise ModelError(f"{folder}: the adapter holds tensors that the model has not ({left_over[0]}, ...).")
        return
    fresh, info = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    _check_names(folder, set(info["missing_keys"]), set(info["unexpected_keys"]))
    model.load_state_dict(fresh.state_dict(), strict=True)


def _check_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    different = wanted ^ found
    if different:
        raise ModelError(
            f"{folder}: expected a checkpoint of this very model, but {len(different)} tensors are missing or left "
            f"over ({sorted(different)[0]}, ...)."
        )
