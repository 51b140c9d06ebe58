"""The K replies of a picture share its way through the vision tower, and their prompt's through the language model.

TRL hands the model the patches of a picture and its prompt once for each reply. The tower's hooks let it see each
picture of a forward pass once and copy its visual tokens; the language model reads each prompt once and lets the
replies share its keys and values: in sampling, in the log-probabilities of both models and in the backward pass, where
the gradients of the copies add up. Results are those without sharing, up to the rounding of another batch.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vqr1_metric.backends.inputs import cache_argument

#: Arguments of a language model that go with the rows of a batch and are not cut up here (Qwen3-VL, older releases).
_ROW_BY_ROW = ("visual_pos_masks", "deepstack_visual_embeds", "cache_position")
#: Every two rows are compared, token by token: at 128 rows of 1,500 tokens 25 million comparisons.
_MOST_ROWS = 128
#: Two smaller passes for a large one: only where so small a share of the tokens is left.
_WORTH_IT = 0.8


def share_pictures(visual: torch.nn.Module) -> None:
    """Let this vision tower (of any Qwen-VL) run once over equal pictures of one forward pass."""
    if not hasattr(visual, "_copies"):
        visual._copies = None
        visual.register_forward_pre_hook(_first_of_each, with_kwargs=True)
        visual.register_forward_hook(_copy_tokens)


def equal_pictures(patches: Tensor, grid_thw: Tensor) -> list[int]:
    """For each picture the number of the first one that equals it, ``[0, 1, 0, 3, ...]``.

    Args:
        patches: of all pictures, one after the other, shape ``(P, D)``.
        grid_thw: shape ``(N, 3)``.
    """
    pictures = patches.split(grid_thw.prod(-1).tolist())
    # Only pictures of the same size and the same sum are compared value by value.
    sums = torch.stack([picture.sum(dtype=torch.float64) for picture in pictures]).tolist()
    seen: dict[tuple, list[int]] = {}
    first = []
    for i, key in enumerate(zip(map(tuple, grid_thw.tolist()), sums, strict=True)):
        alike = seen.setdefault(key, [])
        found = next((j for j in alike if torch.equal(pictures[i], pictures[j])), i)
        if found == i:
            alike.append(i)
        first.append(found)
    return first


def _first_of_each(visual: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    patches = args[0] if args else kwargs["hidden_states"]
    grid_thw = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    first = equal_pictures(patches, grid_thw)
    kept = sorted(set(first))
    visual._copies = None
    if len(kept) == len(first):
        return args, kwargs
    pictures = patches.split(grid_thw.prod(-1).tolist())
    sizes = [len(pictures[i]) // visual.spatial_merge_size**2 for i in kept]
    visual._copies = sizes, [kept.index(i) for i in first]
    return (torch.cat([pictures[i] for i in kept]),), {**kwargs, "grid_thw": grid_thw[kept]}


def _copy_tokens(visual: torch.nn.Module, args: tuple, output: Any) -> Any:
    if visual._copies is None:
        return
    sizes, order = visual._copies

    def copies(tokens: Tensor) -> Tensor:
        parts = tokens.split(sizes)
        return torch.cat([parts[i] for i in order])

    output.pooler_output = copies(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL
        output.deepstack_features = [copies(tokens) for tokens in output.deepstack_features]
    output.last_hidden_state = None  # of fewer pictures than were given; nothing in the model reads it


def share_prompts(language_model: torch.nn.Module) -> None:
    """Let this language model (of any Qwen-VL) read what rows begin with once, where they begin alike.

    The K replies of a picture are rows that begin with the same prompt. Its keys and values are computed once and
    serve all of them, in sampling and in the log-probabilities, gradients included. Not while activations are
    recomputed in the backward pass: that goes without keys and values to share.
    """
    if not hasattr(language_model, "_read_every_row"):
        # Bound methods, so that a deep copy reads with its own weights.
        language_model._read_every_row = language_model.forward
        language_model.forward = MethodType(_read_beginnings_once, language_model)


def _read_beginnings_once(
    language_model,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    inputs_embeds=None,
    use_cache=None,
    **kwargs,
):
    read, plan = language_model._read_every_row, None
    name = cache_argument(type(language_model))
    given = kwargs.pop(name, None)
    if (
        isinstance(inputs_embeds, Tensor)
        and isinstance(position_ids, Tensor)
        and position_ids.ndim == 3
        and (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2))
        and (given is None or given.get_seq_length() == 0)
        and not any(kwargs.get(name) is not None for name in _ROW_BY_ROW)
        and not _recomputes(language_model)
    ):
        plan = common_beginnings(inputs_embeds, position_ids, attention_mask)
    if plan is None:
        return read(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
            **{name: given},
        )
    length, readers, order = plan
    memory = DynamicCache(config=language_model.config) if given is None else given
    kwargs |= {name: memory, "use_cache": True}
    output = read(
        inputs_embeds=inputs_embeds[readers, :length],
        position_ids=position_ids[:, readers, :length],
        attention_mask=None if attention_mask is None else attention_mask[readers, :length],
        **kwargs,
    )
    memory.reorder_cache(order)
    hidden = output.last_hidden_state[order]
    if length < inputs_embeds.shape[1]:
        output = read(
            inputs_embeds=inputs_embeds[:, length:],
            position_ids=position_ids[:, :, length:],
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden = torch.cat([hidden, output.last_hidden_state], dim=1)
    output.last_hidden_state = hidden
    output[name] = memory if use_cache else None
    return output


def common_beginnings(embeds: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[int, Tensor, Tensor] | None:
    """How far, and by which rows, the beginnings of all rows are best read; None where that saves little.

    Args:
        embeds: shape ``(N, L, D)``.
        positions: shape ``(3 or 4, N, L)``.
        mask: which tokens are there, shape ``(N, L)``; None for all.

    Returns:
        The length of the beginnings; the rows that read them, shape ``(U,)``; for each row the place of its reader
        among those, shape ``(N,)``.
    """
    rows, length = embeds.shape[:2]
    if rows < 2 or rows > _MOST_ROWS:
        return None
    with torch.no_grad():
        # A sum for each token finds the candidates; they are compared value by value below.
        sums = embeds.sum(-1, dtype=torch.float32)
        differ = sums[:, None] != sums[None]
        for other in [*positions, *([] if mask is None else [mask])]:
            differ |= other[:, None] != other[None]
        # So many tokens any two rows have in common, and each row with the nearest of those before it.
        common = torch.where(differ.any(-1), differ.int().argmax(-1), length).cpu()
        nearest = common.tril(-1).amax(1)
        costs = {int(t): int(t) * int((nearest < t).sum()) + rows * (length - int(t)) for t in nearest.unique() if t}
        best = min(costs, key=costs.get, default=0)
        if not best or costs[best] > _WORTH_IT * rows * length:
            return None
        first = (common >= best).int().argmax(1)  # a row has itself in common
        readers, order = first.unique(return_inverse=True)
        if any(not torch.equal(embeds[i, :best], embeds[j, :best]) for i, j in enumerate(first.tolist()) if i != j):
            return None
    return best, readers.to(embeds.device), order.to(embeds.device)


def _recomputes(language_model: torch.nn.Module) -> bool:
    return language_model.training and any(
        getattr(layer, "gradient_checkpointing", False) for layer in language_model.layers
    )
