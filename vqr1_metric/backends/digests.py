"""Hashes of what model files, weights and settings hold."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vqr1_metric.backends.base import ModelError, told
from vqr1_metric.backends.pixels import PixelConfig

#: Files up to this size are hashed whole, larger ones by samples of every tensor (reading 16 GB would delay every
#: start).
_HASH_WHOLE_BELOW = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 4, 16 << 10
#: A file that changed so recently may change again without a new time stamp, so its hash is not kept.
_SETTLED_NS = 2_000_000_000


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
        raise ModelError(f"{path}: cannot be read ({told(error)}).") from None
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


def digest_of_tensors(tensors: Mapping[str, Tensor], values: int = 1024) -> str:
    """A hash of names, shapes and up to so many values of each tensor, spread over it."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        if not tensor.is_meta:  # as accelerate leaves weights that are offloaded
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // values)].cpu().contiguous()
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


def _tensors(file: BinaryIO, size: int, digest: hashlib._Hash) -> list[tuple[int, int]]:
    """Begin and end of every tensor of a safetensors file, whose header goes into the hash; of 64 parts of another."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, 100 << 20))
    digest.update(header)
    try:
        entries = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return sorted((8 + length + int(start), min(size, 8 + length + int(end))) for start, end in entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [(size * part // 64, size * (part + 1) // 64) for part in range(64)]
