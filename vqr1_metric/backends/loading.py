"""Find, check and load a Qwen-VL model with transformers; one copy of each per process."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.packing import use_packing
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.windows import speed_up

#: Names that stand for a model shipped with the package.
EMBEDDED = {"nano": Path(__file__).resolve().parent.parent / "nano"}
SUPPORTED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
#: Attention implementations of the language model that take the answer tree's mask.
TREE_ATTENTION = ("sdpa", "eager", "packed")

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
#: On a CPU, checkpoints above this size keep their 16-bit weights instead of being widened to float32.
_WIDEN_BELOW_BYTES = 4 << 30
#: Weight files up to this size are hashed whole, larger ones by samples (a 16 GB read would delay every start).
_HASH_WHOLE_BELOW = 256 << 20


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what is loaded and where; equal specs share one copy of the weights.

    Args:
        model: a Hugging Face Hub name, a local folder, or ``"nano"``.
        revision: Hub branch, tag or commit.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or None for bfloat16 on accelerators and float32 on a CPU
            (checkpoints above 4 GiB keep 16 bits there too).
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``, ...; None takes the best there is.
        device_map: as in transformers, ``"auto"`` to spread the layers over several small GPUs.
        quantization: ``"8bit"`` or ``"4bit"``, through bitsandbytes.
        attn_implementation: ``"sdpa"`` (the default), ``"eager"``, or ``"packed"`` (pictures of unequal size are not
            padded, see :mod:`~vqr1_metric.backends.packing`); others cannot take the readout's mask.
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            if name not in _DTYPES:
                raise ModelError(f"Expected dtype to be one of {', '.join(_DTYPES)}, but got {self.dtype!r}.")
            object.__setattr__(self, "dtype", str(_DTYPES[name]).removeprefix("torch."))
        if self.attn_implementation not in (None, *TREE_ATTENTION):
            raise ModelError(
                "The one-pass readout needs an attention that takes a mask, so attn_implementation must be one of "
                f"{', '.join(TREE_ATTENTION)}, but got {self.attn_implementation!r}."
            )
        if self.quantization not in (None, "8bit", "4bit"):
            raise ModelError(f"Expected quantization None, '8bit' or '4bit', but got {self.quantization!r}.")
        try:
            device = None if self.device is None else str(torch.device(self.device))
        except RuntimeError:
            raise ModelError(f"Expected a device such as 'cuda', 'cuda:1' or 'cpu', but got {self.device!r}.") from None
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            raise ModelError(
                f"Expected a device that is there, but {device!r} was asked for and torch sees no CUDA GPU."
            )
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "model", str(self.model))

    @property
    def folder(self) -> Path | None:
        """The local folder the model is in, None for a Hub name."""
        path = EMBEDDED.get(self.model, Path(self.model).expanduser())
        return path if path.is_dir() else None

    def resolved_device(self) -> str:
        """The device asked for, or the best there is."""
        if self.device:
            return self.device
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass
class LoadedModel:
    """Weights, tokenizer and preprocessing of one model."""

    model: torch.nn.Module
    tokenizer: object
    pixel_config: PixelConfig
    chat_template: str
    revision: str


_cache: dict[ModelSpec, object] = {}
_lock = threading.RLock()


def cached(spec: ModelSpec, build):
    """The object of this spec, built by ``build(spec)`` at the first call; one per process."""
    with _lock:
        if spec not in _cache:
            _cache[spec] = build(spec)
        return _cache[spec]


def is_cached(spec: ModelSpec) -> bool:
    """Have the weights of this spec been loaded?"""
    return spec in _cache


def forget(spec: ModelSpec) -> None:
    """Drop the weights of this spec; the next use loads them again."""
    with _lock:
        _cache.pop(spec, None)


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a model strictly: a missing or unexpected tensor, pickled weights or remote code are errors.

    Raises:
        ModelError: says what was looked for, what went wrong and what to use instead.
    """
    if spec.revision is not None and spec.folder is not None:
        raise ModelError(
            f"Expected a revision only with a name on the Hub, but got {spec.revision!r} with the local model "
            f"{spec.model!r}: a folder holds one state, whose hash is recorded as its revision."
        )
    adapter = _find_file(spec, "adapter_config.json")
    base = spec
    if adapter is not None:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        base = ModelSpec(
            settings["base_model_name_or_path"],
            settings.get("revision"),
            spec.dtype,
            spec.device,
            spec.device_map,
            spec.quantization,
            spec.attn_implementation,
        )
    config_file = _find_file(base, "config.json")
    if config_file is None:
        raise ModelError(_unreachable(base))
    model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise ModelError(
            f"{base.model}: expected a model of type {', '.join(SUPPORTED_TYPES)}, but got {model_type!r}."
        )

    model = _load_weights(base)
    if adapter is not None:
        model = _merge_adapter(model, spec, adapter)
    _check_attention(model)
    if base.attn_implementation != "eager":
        speed_up(model)
    if base.attn_implementation == "packed":
        use_packing(model)
    model.requires_grad_(False).eval()

    from transformers import AutoTokenizer

    location = {"pretrained_model_name_or_path": str(base.folder or base.model), "revision": base.revision}
    tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
    return LoadedModel(model, tokenizer, _pixel_config(base), _chat_template(base, tokenizer), _revision(spec, model))


def _load_weights(spec: ModelSpec):
    from transformers import AutoModelForImageTextToText

    options: dict = {"attn_implementation": "eager" if spec.attn_implementation == "eager" else "sdpa"}
    if spec.quantization:
        options["quantization_config"] = _quantization_config(spec)
    if spec.device_map:
        options["device_map"] = spec.device_map
    elif spec.quantization:
        options["device_map"] = {"": spec.resolved_device()}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            str(spec.folder or spec.model),
            revision=spec.revision,
            dtype=_dtype(spec),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        if spec.folder is None:
            raise ModelError(_unreachable(spec)) from error
        raise ModelError(f"{spec.model}: expected safetensors weights, but could not read them ({error}).") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ModelError(
                f"{spec.model}: the weights are damaged ({error}); download or copy them again."
            ) from error
        if isinstance(error, (RuntimeError, ValueError, ImportError)):
            raise ModelError(f"{spec.model}: the model could not be loaded ({error}).") from error
        raise
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            some = ", ".join(str(key) for key in sorted(info[kind], key=str)[:3])
            raise ModelError(
                f"{spec.model}: expected weights that fit the model exactly, but {len(info[kind])} tensors are "
                f"{kind.removesuffix('_keys')} ({some}, ...)."
            )
    return model if spec.device_map or spec.quantization else model.to(spec.resolved_device())


def _dtype(spec: ModelSpec) -> torch.dtype:
    if spec.dtype:
        return _DTYPES[spec.dtype]
    if spec.device_map or torch.device(spec.resolved_device()).type != "cpu":
        return torch.bfloat16
    size = sum(file.stat().st_size for file in spec.folder.glob("*.safetensors")) if spec.folder else 1 << 62
    return torch.float32 if size < _WIDEN_BELOW_BYTES else torch.bfloat16


def _quantization_config(spec: ModelSpec):
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
        bnb_4bit_compute_dtype=_dtype(spec),
    )


def _merge_adapter(model, spec: ModelSpec, adapter: Path):
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            f"{spec.model} is a LoRA adapter, which needs peft: pip install 'vqr1-metric[train]'"
        ) from None
    if not (adapter.parent / "adapter_model.safetensors").is_file() and spec.folder:
        raise ModelError(f"{spec.model}: expected adapter_model.safetensors beside adapter_config.json.")
    options = {} if spec.folder else {"revision": spec.revision}
    adapted = PeftModel.from_pretrained(model, str(spec.folder or spec.model), use_safetensors=True, **options)
    return adapted.merge_and_unload()


def _check_attention(model) -> None:
    if getattr(model.config.get_text_config(), "use_sliding_window", False):
        raise ModelError(
            "The one-pass readout needs full attention, but this model's config has use_sliding_window=true."
        )


def _pixel_config(spec: ModelSpec) -> PixelConfig:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = _find_file(spec, name)
        if path is not None:
            return PixelConfig.from_file(path)
    raise ModelError(f"{spec.model}: expected preprocessor_config.json beside the weights, but there is none.")


def _chat_template(spec: ModelSpec, tokenizer) -> str:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = _find_file(spec, name)
        if path is not None:
            text = path.read_text(encoding="utf-8")
            return text if path.suffix == ".jinja" else json.loads(text)["chat_template"]
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise ModelError(f"{spec.model}: expected a chat template (chat_template.jinja), but there is none.")


def _find_file(spec: ModelSpec, name: str) -> Path | None:
    """The local path of one file of the model, downloaded if need be; None where the model has none."""
    if spec.folder is not None:
        path = spec.folder / name
        return path if path.is_file() else None
    if Path(spec.model).is_absolute() or spec.model.startswith((".", "~")):
        raise ModelError(f"No model folder at {spec.model!r}.")
    _check_hub(spec)
    from transformers.utils import cached_file

    try:
        found = cached_file(
            spec.model,
            name,
            revision=spec.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:  # not a name the Hub can hold, no such repository or revision
        raise ModelError(_unreachable(spec)) from error
    return None if found is None else Path(found)


@lru_cache
def _check_hub(spec: ModelSpec) -> None:
    """Fail at once where there is no network and nothing was downloaded: the look-up itself retries for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for name in ("config.json", "adapter_config.json"):
            if isinstance(try_to_load_from_cache(spec.model, name, revision=spec.revision), str):
                return
        get_hf_file_metadata(hf_hub_url(spec.model, "config.json", revision=spec.revision), timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # the Hub answered, or need not be asked: the look-up says what is wrong
    except Exception as error:  # whatever the HTTP library of the day calls "no connection"
        raise ModelError(_unreachable(spec)) from error


def _unreachable(spec: ModelSpec) -> str:
    if spec.folder is not None:
        return f"{spec.model}: expected a model in this folder, but it holds no config.json (or adapter_config.json)."
    revision = f" at revision {spec.revision!r}" if spec.revision else ""
    return (
        f"Could not get the model {spec.model!r}{revision}: there is no such folder, and on the Hugging Face Hub it "
        "was not found, or the Hub cannot be reached. Offline, use --model nano (model='nano'), which comes with this "
        "package, or the path of a folder that holds the downloaded model."
    )


def _revision(spec: ModelSpec, model) -> str:
    """The Hub commit, or a hash of a local folder's weights."""
    if spec.folder is None:
        return getattr(model.config, "_commit_hash", None) or spec.revision or "unknown"
    digest = hashlib.sha256()
    for file in sorted([*spec.folder.glob("*.safetensors"), *spec.folder.glob("*config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _HASH_WHOLE_BELOW:
                digest.update(stream.read())
            else:
                for offset in range(0, size, max(1, size // 64)):
                    stream.seek(offset)
                    digest.update(stream.read(1 << 20))
    return f"sha256:{digest.hexdigest()[:16]}"
