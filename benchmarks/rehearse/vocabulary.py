"""Qwen's real vocabulary as a tokenizer, from the tiktoken file that the package ``dashscope`` ships.

The file holds 151,643 byte strings with their ranks. A byte-pair tokenizer also needs the merges: the two parts that
each string is made of are found by merging its bytes with all strings of lower rank, as training did.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

#: Special tokens of the Qwen2-VL and Qwen2.5-VL tokenizers from 151643 on, in order; Qwen3 adds four.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary_file() -> Path:
    """The tiktoken file; the package is not imported.

    Raises:
        FileNotFoundError: without the package, with the line that installs it.
    """
    found = importlib.util.find_spec("dashscope")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("Expected the package that ships Qwen's vocabulary: pip install --no-deps dashscope")
    return Path(found.submodule_search_locations[0], "resources", "qwen.tiktoken")


def qwen_tokenizer(qwen3: bool = False) -> Tokenizer:
    """The tokenizer of Qwen2.5-VL, or of Qwen3-VL with ``<think>`` and ``</think>`` as tokens of their own."""
    tokenizer = Tokenizer.from_str(_base())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    added = NOT_SPECIAL + (QWEN3 if qwen3 else ())
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


@cache
def _base() -> str:
    ranks = {}
    for line in vocabulary_file().read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    spelled = {token: _spelled(token) for token in ranks}
    merges = [
        tuple(_spelled(part) for part in _parts(token, ranks))
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two strings whose merge is ``token``: all merges of lower rank done, lowest first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@cache
def _letters() -> dict[int, str]:
    """The printable letter that a byte-level tokenizer writes for each byte (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


def _spelled(token: Iterable[int]) -> str:
    return "".join(_letters()[byte] for byte in token)
