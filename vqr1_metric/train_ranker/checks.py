"""Are the settings of a run of the right types, in their ranges, and do they go together? Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import json
import math
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from vqr1_metric.train_ranker.config import RankerConfig


class ConfigError(ValueError):
    """Settings that do not go together; the message begins with "Expected" and says what to change."""


class TrainingError(RuntimeError):
    """A run that is broken or learns nothing; the message says what was seen and what to try."""


_TRUE, _FALSE, _NOTHING = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")


def as_type(name: str, value: Any, kind: Any) -> Any:
    """The value as the type of its setting; texts are read, as files and command lines give them.

    Raises:
        ConfigError: a value of another type, or none of the choices.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() in _NOTHING):
            return None
        (kind,) = (arg for arg in args if arg is not NoneType)
        return as_type(name, value, kind)
    if origin is Literal:
        if value not in args:
            raise _wrong(name, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin is list:
        value = _from_json(value, "[")
        values = value if isinstance(value, list | tuple) else [value]
        return [as_type(name, one, args[0]) for one in values]
    if origin is dict:
        value = _from_json(value, "{")
        if not isinstance(value, dict):
            raise _wrong(name, "names and values", value)
        return dict(value)
    if kind is bool:
        return _as_bool(name, value)
    if kind in (int, float):
        return _as_number(name, value, kind)
    if not isinstance(value, str):
        if hasattr(value, "__fspath__"):
            return str(value)
        raise _wrong(name, "text", value)
    return value


def _as_bool(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _as_number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, str):
        try:
            value = float(value) if kind is float or "." in value or "e" in value.lower() else int(value)
        except ValueError:
            raise _wrong(name, expected, value) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(name, expected, value)
    if kind is int and value != int(value):
        raise _wrong(name, expected, value)
    return kind(value)


def _from_json(value: Any, opening: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _wrong(name: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"Expected {name} to be {expected}, but got {value!r}.")


#: Setting -> smallest value, largest value, and whether the smallest is allowed.
_RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(
        ("images_per_device", "micro_batch", "max_new_tokens", "eval_steps", "save_steps", "logging_steps",
         "num_iterations", "save_total_limit", "lora_alpha", "min_pixels", "max_pixels"),
        (1, math.inf, True),
    ),
    **dict.fromkeys(
        ("learning_rate", "cold_start_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "kl_weight",
         "top_k", "gamma", "eps", "format_weight", "cold_start_steps", "lora_rank", "collapse_spread",
         "collapse_patience", "unreadable_patience", "validation_drop", "seed", "rating_weight"),
        (0, math.inf, True),
    ),
    **dict.fromkeys(("epochs", "clip", "temperature"), (0, math.inf, False)),
    "top_p": (0, 1, False),
    "validation_fraction": (0, 0.9, True),
    "max_steps": (-1, math.inf, True),
}  # fmt: skip


def check_numbers(config: RankerConfig) -> None:
    """Complain about numbers outside their range."""
    for name, (low, high, allowed) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low < value <= high or (allowed and value == low)):
            bound = f"{'at least' if allowed else 'above'} {low:g}" + (
                "" if high == math.inf else f", at most {high:g}"
            )
            raise ConfigError(f"Expected {name} of {bound}, but got {value}.")
    if config.max_steps == 0:
        raise ConfigError("Expected max_steps of at least 1, or -1 for whole epochs, but got 0.")
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        raise ConfigError(f"Expected min_pixels up to max_pixels, but got {config.min_pixels} and {config.max_pixels}.")


def check_together(config: RankerConfig, processes: int) -> None:
    """Complain about settings that do not go together."""
    if config.objective == "distill":
        if not config.teacher:
            raise ConfigError("Expected a teacher (--teacher) with objective='distill', but got none.")
    elif config.teacher:
        raise ConfigError(f"Expected a teacher only with objective='distill', but got objective={config.objective!r}.")
    elif not config.data:
        raise ConfigError("Expected at least one file of ratings (--data), but got none.")
    if not config.output_dir:
        raise ConfigError("Expected an output folder (--output), but got none.")
    size = config.comparison_size(processes)
    if size < 2:
        raise ConfigError("Expected at least 2 pictures in a comparison set: one alone has no order.")
    whole = config.images_per_device * (processes if config.comparison_scope == "global" else 1)
    if whole % size:
        raise ConfigError(
            f"Expected comparison sets of {size} pictures to divide the {whole} pictures of a step "
            f"({config.comparison_scope}), but they do not. Change images_per_device."
        )
    if config.objective == "sampled":
        _check_sampled(config)
    else:
        _check_readout(config)
    if config.quantization and not config.lora_rank:
        raise ConfigError("Expected lora_rank above 0 with quantization: quantised weights cannot be trained.")
    if config.cold_start_steps and (processes > 1 or config.quantization):
        raise ConfigError(
            "Expected one process and unquantised weights with cold_start_steps, but got "
            f"{processes} processes and quantization={config.quantization!r}: run the cold start by itself first "
            "(max_steps=1, learning_rate=0) and start from its model."
        )


def _check_sampled(config: RankerConfig) -> None:
    if config.num_generations < 2:
        raise ConfigError(f"Expected num_generations of at least 2, but got {config.num_generations}.")
    replies = config.images_per_device * config.num_generations
    if replies % min(config.micro_batch, replies):
        raise ConfigError(
            f"Expected micro_batch to divide images_per_device x num_generations = {replies}, but got "
            f"{config.micro_batch}."
        )
    if config.revision and config.kl_weight and not config.lora_rank:
        raise ConfigError(
            f"Expected a folder as the model, but got revision {config.revision!r} of {config.model}: the KL penalty "
            "loads the start model a second time, by name alone. Download the revision and give its folder, or "
            "train with lora_rank above 0."
        )
    if config.save_steps % config.num_iterations:
        raise ConfigError(
            f"Expected save_steps to be a multiple of num_iterations ({config.num_iterations}), but got "
            f"{config.save_steps}: resuming in the middle of a batch of replies would not be exact."
        )
    if config.kl_direction != "forward":
        raise ConfigError(
            "Expected kl_direction='forward' with objective='sampled': the penalty on sampled replies is that one."
        )
    if config.loss == "luspo" and config.importance_sampling != "sequence":
        raise ConfigError("Expected importance_sampling='sequence' with loss='luspo', but got 'token'.")
    if config.reward_weights and len(config.reward_weights) != len(config.rewards):
        raise ConfigError(
            f"Expected a weight for each of the {len(config.rewards)} rewards, but got {len(config.reward_weights)}."
        )


def _check_readout(config: RankerConfig) -> None:
    why = f"with objective={config.objective!r}"
    if config.drop_zero_spread:
        raise ConfigError("Expected drop_zero_spread only with objective='sampled': elsewhere nothing is sampled.")
    if config.rewards:
        raise ConfigError(
            f"Expected no further rewards {why}: there are no replies to reward. Use objective='sampled'."
        )
    if config.use_vllm:
        raise ConfigError(f"Expected use_vllm=False {why}: nothing is sampled.")
    if config.thinking:
        raise ConfigError(
            f"Expected thinking=False {why}: without sampling there is no reasoning to condition the score on. Use "
            "objective='sampled', or ask the non-thinking question."
        )
    if config.images_per_device % min(config.micro_batch, config.images_per_device):
        raise ConfigError(
            f"Expected micro_batch to divide images_per_device ({config.images_per_device}), but got "
            f"{config.micro_batch}."
        )


_INSTALL = dict.fromkeys(("trl", "peft", "datasets"), "pip install 'vqr1-metric[train]'")
_INSTALL |= {"bitsandbytes": "pip install 'vqr1-metric[quant]'", "vllm": "pip install 'vqr1-metric[train,vllm]'"}


def check_packages(config: RankerConfig) -> None:
    """Complain about packages that these settings need and that are not installed."""
    needed = {
        "trl": config.objective == "sampled",
        "datasets": config.objective == "sampled",
        "peft": config.lora_rank > 0,
        "bitsandbytes": config.quantization is not None,
        "vllm": config.use_vllm and config.vllm_mode == "colocate",
        "deepspeed": "deepspeed" in config.trainer,
        **{str(name): True for name in config.report_to},
    }
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"Expected {package} to be installed: {_INSTALL.get(package, f'pip install {package}')}")
