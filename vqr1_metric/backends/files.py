"""The files of a model: where they are, and a hash of what they hold.

A model is known by its content, never by its path: two copies are one model, and a checkpoint that was overwritten is
another one. Files come from anywhere, so nothing they hold is believed: whatever is wrong with one is a
:class:`~vqr1_metric.backends.base.ModelError` of one sentence, and no name in them leads out of their folder.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vqr1_metric.backends.base import ModelError, as_model_error, told
from vqr1_metric.backends.digests import digest_of, file_digest, preprocessor_digest
from vqr1_metric.backends.hub import fetch
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.spec import ModelSpec

CONFIG, GENERATION = "config.json", "generation_config.json"
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
        adapter = file_in(folder, ADAPTER_CONFIG)
        if adapter is None:
            return cls(spec.model, folder, None, commit)
        settings = read_json(adapter)
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        if not isinstance(base, str) or not base or not isinstance(revision, str | None):
            raise ModelError(
                f"{adapter}: expected the name of the adapter's base model under base_model_name_or_path, and its "
                f"revision or null, but got {base!r} and {revision!r}."
            )
        under = ModelSpec(base, device="cpu").folder or fetch(base, revision)
        if file_in(under, ADAPTER_CONFIG) is not None:
            raise ModelError(
                f"{spec.model}: expected a full model under this LoRA adapter, but its base {base!r} is an adapter "
                "itself. Merge the base first (PeftModel.merge_and_unload)."
            )
        return cls(spec.model, under, folder, commit)

    def find(self, *names: str) -> Path | None:
        """The first of these files that the base has."""
        return next((path for name in names if (path := file_in(self.base, name)) is not None), None)

    def need(self, *names: str) -> Path:
        """The first of these files; one must be there."""
        path = self.find(*names)
        if path is None:
            raise ModelError(f"{self.name}: expected {' or '.join(names)} in {self.base}, but there is none.")
        return path

    def weights(self) -> list[Path]:
        """The files with the base's weights."""
        single, index = self.find(WEIGHTS), self.find(INDEX)
        if single is not None:
            return [single]
        if index is None:
            raise ModelError(f"{self.name}: expected safetensors weights, but there is no {WEIGHTS} (or {INDEX}).")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(f"{index}: expected the file of each tensor under weight_map.")
        return [self._shard(name) for name in sorted(set(shards.values()))]

    def _shard(self, name: str) -> Path:
        inside = name and not name.startswith("/") and ".." not in PurePosixPath(name).parts
        if not inside or any(character in name for character in "\\:\0") or not name.endswith(".safetensors"):
            raise ModelError(f"{self.base / INDEX}: expected .safetensors files in its own folder, but got {name!r}.")
        path = file_in(self.base, name)
        if path is None:
            raise ModelError(f"{self.name}: expected the file {name!r} that {INDEX} names, but it is not there.")
        return path

    def weight_bytes(self) -> int:
        """Size of the base's weights on the disk."""
        return sum(path.stat().st_size for path in self.weights())

    def pixel_config(self) -> PixelConfig:
        """The model's own preprocessing."""
        path = self.need(*PREPROCESSORS)
        values = read_json(path)
        values = values.get("image_processor", values)  # processor_config.json, as transformers 5 saves it
        with as_model_error(path, "expected the image processor of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"):
            config = PixelConfig.from_settings(values)
            _check_preprocessing(config, values)
        return config

    def content(self) -> dict[str, str | None]:
        """Hashes of all that decides what this model computes. Reads no weights into memory."""
        config = self.find(CONFIG)
        if config is None:
            also = "" if self.adapter else f" (or {ADAPTER_CONFIG})"
            raise ModelError(f"{self.base}: expected a model in this folder, but it holds no {CONFIG}{also}.")
        template, generation = self.find(*CHAT_TEMPLATES), self.find(GENERATION)
        tokenizer = [path for name in TOKENIZER_FILES if (path := self.find(name)) is not None]
        hashes = {
            "weights": digest_of(*map(file_digest, self.weights())),
            "adapter": self._adapter_content(),
            "config": _settings_digest(config, _NO_CONTENT),
            "generation": None if generation is None else _settings_digest(generation, _NO_CONTENT),
            "tokenizer": digest_of(*(f"{path.name}:{file_digest(path)}" for path in tokenizer)),
            "chat_template": None if template is None else file_digest(template),
            "preprocessor": preprocessor_digest(self.pixel_config()),
        }
        return {name: hashes[name] for name in CONTENT}

    def _adapter_content(self) -> str | None:
        if self.adapter is None:
            return None
        weights, settings = file_in(self.adapter, ADAPTER_WEIGHTS), file_in(self.adapter, ADAPTER_CONFIG)
        if weights is None or settings is None:
            raise ModelError(f"{self.name}: expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}.")
        return digest_of(file_digest(weights), _settings_digest(settings, _NO_ADAPTER_CONTENT))


def file_in(folder: Path, name: str) -> Path | None:
    """A file of a model's folder, None where there is none.

    Raises:
        ModelError: for a link that leads out of the folder. Those of the Hub's cache lead to its own store and are
            followed.
    """
    path = folder / name
    if not path.is_file():
        if path.is_symlink() or path.exists():
            raise ModelError(f"{path}: expected a file, but it is none, or a link to a file that is not there.")
        return None
    if not path.resolve().is_relative_to(folder.resolve()) and not _in_hub_cache(path):
        raise ModelError(
            f"{path}: expected a file in this folder, but it is a link to {path.resolve()}. Copy the file, or name the "
            "folder it is in."
        )
    return path


def _in_hub_cache(path: Path) -> bool:
    """Is this a link of ``snapshots/<commit>/`` to ``blobs/`` beside it, as huggingface_hub makes them?"""
    if not path.is_symlink():
        return False
    target = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    cache = next((folder.parent for folder in path.parent.resolve().parents if folder.name == "snapshots"), None)
    return cache is not None and target.is_relative_to(cache / "blobs")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: if the file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON, but it cannot be read ({told(error)}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, but got {type(value).__name__}.")
    return value


def _check_preprocessing(config: PixelConfig, values: dict[str, Any]) -> None:
    """Raise ValueError for what would give no picture, or another than this package's own preprocessing makes."""
    sizes = (config.patch_size, config.merge_size, config.temporal_patch_size, config.min_pixels, config.max_pixels)
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 40 for size in sizes):
        raise ValueError(f"sizes must be whole numbers above 0, but are {sizes}")
    for name, numbers in (("image_mean", config.mean), ("image_std", config.std)):
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        if len(numbers) != 3 or not finite or (name == "image_std" and not all(x > 0 for x in numbers)):
            positive = " above 0" if name == "image_std" else ""
            raise ValueError(f"{name} must be three numbers{positive}, but is {list(numbers)}")
    expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
    for name, value in expected.items():
        got = values.get(name)
        if got is not None and not (isinstance(got, int | float) and math.isclose(got, value, rel_tol=1e-3)):
            raise ValueError(f"{name} must be {value}, as this package does it, but is {got!r}")
    config.with_limits()


def _settings_digest(path: Path, ignored: tuple[str, ...]) -> str:
    settings = {key: value for key, value in read_json(path).items() if key not in ignored}
    return digest_of(json.dumps(settings, sort_keys=True))
