"""The files of a model: where they are, and a hash of what they hold.

A model is known by its content, never by its path: two copies are one model, and a checkpoint that was overwritten is
another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.hub import fetch
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.spec import ModelSpec

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
#: Keys of :meth:`ModelFiles.content`.
CONTENT = ("weights", "adapter", "config", "generation", "tokenizer", "chat_template", "preprocessor")
#: Entries of config.json and adapter_config.json that tell where a file came from, not what it computes.
_NO_CONTENT = ("_name_or_path", "transformers_version", "_attn_implementation", "_attn_implementation_autoset")
_NO_ADAPTER_CONTENT = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

#: Weight files up to this size are hashed whole, larger ones by samples of every tensor (reading 16 GB would delay
#: every start).
_HASH_WHOLE_BELOW = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 4, 16 << 10
#: A file that changed so recently may change again without a new time stamp, so its hash is not kept.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are, all of them on this machine.

    Args:
        name: as the user wrote it, for messages.
        base: folder of configuration, tokenizer and weights.
        adapter: folder of a LoRA adapter laid over the base, or None.
        commit: commit on the Hub that was asked for, or None for a local folder.
    """

    name: str
    base: Path
    adapter: Path | None
    commit: str | None

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelFiles:
        """Find the files of ``spec``; those of a model on the Hub are downloaded if need be.

        Raises:
            ModelError: says what was looked for and what to use instead.
        """
        if spec.revision is not None and spec.folder is not None:
            raise ModelError(
                f"Expected a revision only with a name on the Hub, but got {spec.revision!r} with the local model "
                f"{spec.model!r}: a folder holds one state, whose hash is recorded as its revision."
            )
        folder = spec.folder or fetch(spec.model, spec.revision)
        commit = folder.name if spec.folder is None else None
        if not (folder / ADAPTER_CONFIG).is_file():
            return cls(spec.model, folder, None, commit)
        settings = read_json(folder / ADAPTER_CONFIG)
        base = settings.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG}: expected the name of the adapter's base model under "
                f"base_model_name_or_path, but got {base!r}."
            )
        under = ModelSpec(base, device="cpu").folder
        return cls(spec.model, under or fetch(base, settings.get("revision")), folder, commit)

    def find(self, names: tuple[str, ...]) -> Path | None:
        """The first of these files that the base has."""
        return next((path for name in names if (path := self.base / name).is_file()), None)

    def weights(self) -> list[Path]:
        """The files with the base's weights."""
        if (self.base / WEIGHTS).is_file():
            return [self.base / WEIGHTS]
        if not (self.base / INDEX).is_file():
            raise ModelError(f"{self.name}: expected safetensors weights, but there is no {WEIGHTS} (or {INDEX}).")
        shards = read_json(self.base / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(f"{self.base / INDEX}: expected the file of each tensor under weight_map.")
        return [self._shard(name) for name in sorted(set(shards.values()))]

    def _shard(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not name or "\\" in name or ":" in name or name.startswith("/") or ".." in parts:
            raise ModelError(f"{self.base / INDEX}: expected names of files in this folder, but got {name!r}.")
        if not (self.base / name).is_file():
            raise ModelError(
                f"{self.name}: expected the weights {name!r} that {INDEX} names, but there is no such file."
            )
        return self.base / name

    def weight_bytes(self) -> int:
        """Size of the base's weights on the disk."""
        return sum(path.stat().st_size for path in self.weights())

    def pixel_config(self) -> PixelConfig:
        """The model's own preprocessing."""
        path = self.find(PREPROCESSORS)
        if path is None:
            raise ModelError(f"{self.name}: expected {PREPROCESSORS[0]} beside the weights, but there is none.")
        return PixelConfig.from_file(path)

    def content(self) -> dict[str, str | None]:
        """Hashes of all that decides what this model computes. Reads no weights into memory."""
        if not (self.base / "config.json").is_file():
            also = "" if self.adapter else f" (or {ADAPTER_CONFIG})"
            raise ModelError(f"{self.base}: expected a model in this folder, but it holds no config.json{also}.")
        template = self.find(CHAT_TEMPLATES)
        generation = self.base / "generation_config.json"
        hashes = {
            "weights": digest_of(*map(file_digest, self.weights())),
            "adapter": self._adapter_content(),
            "config": _settings_digest(self.base / "config.json", _NO_CONTENT),
            "generation": _settings_digest(generation, _NO_CONTENT) if generation.is_file() else None,
            "tokenizer": digest_of(
                *(f"{name}:{file_digest(self.base / name)}" for name in TOKENIZER_FILES if (self.base / name).is_file())
            ),
            "chat_template": None if template is None else file_digest(template),
            "preprocessor": preprocessor_digest(self.pixel_config()),
        }
        return {name: hashes[name] for name in CONTENT}

    def _adapter_content(self) -> str | None:
        if self.adapter is None:
            return None
        weights = self.adapter / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise ModelError(f"{self.name}: expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}.")
        settings = _settings_digest(self.adapter / ADAPTER_CONFIG, _NO_ADAPTER_CONTENT)
        return digest_of(file_digest(weights), settings)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: if the file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON, but it cannot be read ({_short(error)}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, but got {type(value).__name__}.")
    return value


def file_digest(path: Path) -> str:
    """A hash of a file's content, kept as long as the file's time stamps and size stay."""
    try:
        stat = path.stat()
        key, mark = str(path.resolve()), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        with _lock:
            known = _digests.get(key)
        if known is not None and known[0] == mark:
            return known[1]
        digest = _hash(path, stat.st_size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({_short(error)}).") from None
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        with _lock:
            _digests[key] = mark, digest
    return digest


def preprocessor_digest(config: PixelConfig) -> str:
    """A hash of a model's preprocessing without its pixel limits, which a scorer may set."""
    told = [config.patch_size, config.merge_size, config.temporal_patch_size, [*config.mean], [*config.std]]
    return digest_of(json.dumps(told))


def digest_of(*parts: str) -> str:
    """A hash of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and up to 1,024 values of each tensor, spread over it."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // 1024)].cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


_digests: dict[str, tuple[tuple[int, ...], str]] = {}
_lock = threading.Lock()


def _hash(path: Path, size: int) -> str:
    digest = hashlib.sha256(f"{size}:".encode())
    with path.open("rb") as file:
        if size <= _HASH_WHOLE_BELOW:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
            return digest.hexdigest()
        for start, end in _tensors(file, size, digest):
            step = max(_SAMPLE_BYTES, (end - start - _SAMPLE_BYTES) // (_SAMPLES - 1))
            for offset in range(start, end, step):
                file.seek(offset)
                digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


def _tensors(file, size: int, digest) -> list[tuple[int, int]]:
    """Begin and end of every tensor of a safetensors file, whose header goes into the hash; of 64 parts of another."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, 100 << 20))
    digest.update(header)
    try:
        entries = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return sorted((8 + length + int(start), min(size, 8 + length + int(end))) for start, end in entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [(size * part // 64, size * (part + 1) // 64) for part in range(64)]


def _settings_digest(path: Path, ignored: tuple[str, ...]) -> str:
    settings = {key: value for key, value in read_json(path).items() if key not in ignored}
    return digest_of(json.dumps(settings, sort_keys=True))


def _short(error: BaseException) -> str:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(reason.split())[:200] or type(error).__name__
