"""What goes into the model beside pixels: prompt tokens, positions, padding. The one owner of these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from vqr1_metric.backends.base import Model, ModelError
from vqr1_metric.backends.templates import render_chat
from vqr1_metric.protocol import Question

#: Prompts, and positions of prompts with images of so many different sizes, are kept.
_KEPT = 256

Grid = tuple[int, int, int]


class PromptWriter:
    """Token ids and positions of a model's prompts.

    Args:
        tokenizer: with ``encode`` and ``apply_chat_template``.
        chat_template: of the model.
        model: the inner model, which numbers positions (``get_rope_index``).
        image_token: id of the placeholder.
        name: of the model, for error messages.
    """

    def __init__(self, tokenizer: Any, chat_template: str, model: Model, image_token: int, name: str) -> None:
        self._tokenizer, self._chat_template, self._model = tokenizer, chat_template, model
        self._image_token, self._name = image_token, name
        self._segments: dict[tuple[Question, bool, bool], list[list[int]]] = {}
        self._positions: dict[tuple[object, ...], Tensor] = {}

    def segments(self, question: Question, thinking: bool, add_vision_id: bool = False) -> list[list[int]]:
        """Token ids before the first image, between images, and after the last one."""
        key = (question, thinking, add_vision_id)
        found = self._segments.get(key)
        if found is None:
            found = self._tokenise(question, thinking, add_vision_id)
            _keep(self._segments, key, found)
        return found

    def _tokenise(self, question: Question, thinking: bool, add_vision_id: bool) -> list[list[int]]:
        chat = question.messages(thinking)
        text = render_chat(self._tokenizer, self._chat_template, chat, add_vision_id=add_vision_id, name=self._name)
        segments: list[list[int]] = [[]]
        for token in self._tokenizer.encode(text, add_special_tokens=False):
            if token == self._image_token:
                segments.append([])
            else:
                segments[-1].append(token)
        if len(segments) != question.images + 1:
            raise ModelError(
                f"{self._name}: expected a chat template that writes one placeholder for each of {question.images} "
                f"images, but got {len(segments) - 1} of them."
            )
        return segments

    def row(self, segments: Sequence[Sequence[int]], grids: Sequence[Grid], merge_size: int) -> list[int]:
        """Token ids of one prompt with as many placeholders as the images have visual tokens."""
        row = list(segments[0])
        for grid, following in zip(grids, segments[1:], strict=True):
            row += [self._image_token] * visual_tokens(grid, merge_size)
            row += following
        return row

    def positions(self, segments: Sequence[Sequence[int]], grids: Sequence[Grid], row: Sequence[int]) -> Tensor:
        """Positions of one prompt in time, height and width, ``(3, P)``, on the CPU; kept, as sizes come again."""
        key = (tuple(grids), *map(len, segments))
        found = self._positions.get(key)
        if found is None:
            tokens = torch.tensor([list(row)])
            of_batch, _ = self._model.get_rope_index(
                input_ids=tokens,
                mm_token_type_ids=(tokens == self._image_token).int(),
                image_grid_thw=torch.tensor([list(grid) for grid in grids]),
                attention_mask=torch.ones_like(tokens),
            )
            found = of_batch[:, 0]
            _keep(self._positions, key, found)
        return found


def _keep(kept: dict[Any, Any], key: object, value: object) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def visual_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Visual tokens of one image, whose grid of patches is ``(frames, rows, columns)``."""
    return grid[0] * grid[1] * grid[2] // merge_size**2


def expand_images(ids: Sequence[int], grids: Sequence[Grid], merge_size: int, image_token: int) -> list[int]:
    """Token ids with each image's placeholder repeated as often as the image has visual tokens."""
    left = iter(grids)
    copies = (visual_tokens(next(left), merge_size) if token == image_token else 1 for token in ids)
    return [token for token, times in zip(ids, copies, strict=True) for _ in range(times)]


def left_pad(rows: Sequence[Sequence[int]], pad_token: int, image_token: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` of rows of unequal length, each ``(B, longest)``."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_token] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    # Without the types the model silently numbers the visual tokens as if they were text.
    types = ((ids == image_token) & mask.bool()).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}


def pad_positions(positions: Sequence[Tensor]) -> Tensor:
    """Positions of rows of unequal length, each ``(3, P)``, as ``(3, B, longest)`` with zeros on the left."""
    length = max(p.shape[1] for p in positions)
    return torch.stack([pad(p, (length - p.shape[1], 0)) for p in positions], dim=1)


def continued(positions: Tensor, count: int) -> Tensor:
    """Positions ``(3, P)`` and those of ``count`` tokens of text behind them."""
    return torch.cat([positions, positions[:, -1:] + torch.arange(1, count + 1)], dim=1)


@cache
def cache_argument(model_class: type[torch.nn.Module]) -> str:
    """What a model calls its keys and values: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return "cache" if "cache" in signature(model_class.forward).parameters else "past_key_values"


def with_cache(model: Model, memory: Cache) -> dict[str, Any]:
    """Arguments of a call that continues from ``memory`` and adds to it."""
    name = cache_argument(type(model))  # type: ignore[arg-type]  # classes are hashable, which mypy asks of instances
    return {name: memory, "use_cache": True}
