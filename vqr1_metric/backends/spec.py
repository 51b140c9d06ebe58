"""Which model, and how it is loaded: the options that decide what weights a process holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vqr1_metric.backends.base import ModelError, told

#: Names that stand for a model shipped with the package.
EMBEDDED = {"nano": Path(__file__).resolve().parent.parent / "nano"}
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
        if not isinstance(self.model, str | os.PathLike) or not str(self.model):
            raise ModelError(f"Expected the name or the folder of a model, but got {self.model!r}.")
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
        try:
            path = EMBEDDED.get(self.model) or Path(self.model).expanduser()
            return path if path.is_dir() else None
        except PermissionError as error:
            raise ModelError(f"{self.model}: cannot be read ({told(error)}).") from None
        except (OSError, ValueError, RuntimeError):  # no path at all: too long, a byte 0, the home of nobody
            return None

    def resolved_device(self) -> str:
        """The device asked for, or the best there is."""
        if self.device:
            return self.device
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def resolved_dtype(self, weight_bytes: int) -> torch.dtype:
        """The dtype asked for, or the one that suits the device and weights of this size."""
        if self.dtype:
            return _DTYPES[self.dtype]
        if self.device_map or torch.device(self.resolved_device()).type != "cpu":
            return torch.bfloat16
        return torch.float32 if weight_bytes < _WIDEN_BELOW_BYTES else torch.bfloat16
