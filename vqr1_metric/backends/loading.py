"""Load a Qwen-VL model with transformers, strictly; one copy of each per process."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.files import CHAT_TEMPLATES, CONTENT, ModelFiles, read_json
from vqr1_metric.backends.packing import use_packing
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.spec import EMBEDDED, TREE_ATTENTION, ModelSpec
from vqr1_metric.backends.windows import speed_up
from vqr1_metric.nano import MODEL_TYPE

if TYPE_CHECKING:
    from vqr1_metric.backends.transformers import TransformersBackend

__all__ = ["EMBEDDED", "TREE_ATTENTION", "LoadedModel", "ModelSpec", "SharedModel", "cached", "load_model", "shared"]

SUPPORTED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", MODEL_TYPE)


@dataclass
class LoadedModel:
    """Weights, tokenizer and preprocessing of one model.

    Args:
        identity: of :func:`model_identity`; None for weights that are in memory only, or were changed there.
    """

    model: torch.nn.Module
    tokenizer: object
    pixel_config: PixelConfig
    chat_template: str
    revision: str
    identity: dict[str, object] | None = None


def model_identity(spec: ModelSpec, files: ModelFiles) -> dict[str, object]:
    """All that decides the scores of a model loaded by ``spec``, by content and as resolved; loads no weights."""
    return {
        **files.content(),
        "dtype": str(spec.resolved_dtype(files.weight_bytes())).removeprefix("torch."),
        "quantization": spec.quantization,
        "attention": spec.attn_implementation or "sdpa",
    }


class SharedModel:
    """One model with one content, whose weights all scorers of a process share that ask for it.

    ``identity``, ``revision`` and ``pixel_config`` are known before the weights load. They never change: a folder that
    was overwritten gives another object, and this one then refuses to load.
    """

    def __init__(self, spec: ModelSpec, files: ModelFiles, identity: dict[str, object]) -> None:
        self.spec, self.identity = spec, identity
        self.revision = _revision(files, identity)
        self.pixel_config = files.pixel_config()
        self.backend: TransformersBackend | None = None

    def load(self, build: Callable[[ModelSpec], TransformersBackend]) -> TransformersBackend:
        """The model, built by ``build(spec)`` at the first call.

        Raises:
            ModelError: if the files are no longer those that this object stands for.
        """
        with _lock:
            if self.backend is None:
                self._check_unchanged()
                backend = build(self.spec)
                self._check_unchanged()  # loading takes a while
                self.backend = backend
            return self.backend

    def _check_unchanged(self) -> None:
        if model_identity(self.spec, ModelFiles.of(self.spec)) != self.identity:
            raise ModelError(
                f"{self.spec.model}: the files of this model have changed since this scorer was first used, and scores "
                "of both must not be mixed. Make a new QualityScorer for the new ones."
            )


_newest: dict[ModelSpec, SharedModel] = {}
_lock = threading.RLock()


def shared(spec: ModelSpec) -> SharedModel:
    """The model that ``spec`` means now. Loads no weights."""
    with _lock:
        files = ModelFiles.of(spec)
        identity = model_identity(spec, files)
        model = _newest.get(spec)
        if model is None or model.identity != identity:
            model = _newest[spec] = SharedModel(spec, files, identity)
        return model


def cached(spec: ModelSpec, build: Callable[[ModelSpec], TransformersBackend]) -> TransformersBackend:
    """The backend of this spec, built by ``build(spec)`` at the first call."""
    return shared(spec).load(build)


def newest(spec: ModelSpec) -> SharedModel | None:
    """What :func:`shared` returned last, without a look at the files."""
    return _newest.get(spec)


def forget(spec: ModelSpec) -> None:
    """Drop the weights of this spec; the next use loads them again."""
    with _lock:
        model = _newest.pop(spec, None)
        if model is not None:
            model.backend = None


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a model strictly: a missing or unexpected tensor, pickled weights or remote code are errors.

    Raises:
        ModelError: says what was looked for, what went wrong and what to use instead.
    """
    files = ModelFiles.of(spec)
    identity = model_identity(spec, files)
    model_type = read_json(files.base / "config.json").get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise ModelError(
            f"{files.base}: expected a model of type {', '.join(SUPPORTED_TYPES)}, but got {model_type!r}."
        )

    model = _load_weights(spec, files)
    if files.adapter is not None:
        model = _merge_adapter(model, files)
    _check_attention(model)
    if spec.attn_implementation != "eager":
        speed_up(model)
    if spec.attn_implementation == "packed":
        use_packing(model)
    model.requires_grad_(False).eval()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files.base), trust_remote_code=False)
    template = _chat_template(files, tokenizer)
    return LoadedModel(model, tokenizer, files.pixel_config(), template, _revision(files, identity), identity)


def _load_weights(spec: ModelSpec, files: ModelFiles):
    from transformers import AutoModelForImageTextToText

    import vqr1_metric.nano.modeling  # noqa: F401  makes the embedded model known to transformers

    dtype = spec.resolved_dtype(files.weight_bytes())
    options: dict = {"attn_implementation": "eager" if spec.attn_implementation == "eager" else "sdpa"}
    if spec.quantization:
        options["quantization_config"] = _quantization_config(spec, dtype)
    if spec.device_map:
        options["device_map"] = spec.device_map
    elif spec.quantization:
        options["device_map"] = {"": spec.resolved_device()}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            str(files.base),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
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


def _quantization_config(spec: ModelSpec, dtype: torch.dtype):
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


def _merge_adapter(model, files: ModelFiles):
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            f"{files.name} is a LoRA adapter, which needs peft: pip install 'vqr1-metric[train]'"
        ) from None
    adapted = PeftModel.from_pretrained(model, str(files.adapter), use_safetensors=True)
    return adapted.merge_and_unload()


def _check_attention(model) -> None:
    if getattr(model.config.get_text_config(), "use_sliding_window", False):
        raise ModelError(
            "The one-pass readout needs full attention, but this model's config has use_sliding_window=true."
        )


def _chat_template(files: ModelFiles, tokenizer) -> str:
    path = files.find(CHAT_TEMPLATES)
    if path is not None:
        text = path.read_text(encoding="utf-8")
        return text if path.suffix == ".jinja" else json.loads(text)["chat_template"]
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise ModelError(f"{files.name}: expected a chat template (chat_template.jinja), but there is none.")


def _revision(files: ModelFiles, identity: dict[str, object]) -> str:
    """The Hub commit, or a hash of all that a local folder and its adapter's base hold."""
    if files.commit is not None:
        return files.commit
    content = json.dumps({name: identity[name] for name in CONTENT})
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
