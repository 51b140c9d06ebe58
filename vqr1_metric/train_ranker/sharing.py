"""The K replies of a picture share its way through the vision tower.

TRL hands the model the patches of a picture once for each reply. The tower's hooks let it see each picture of a forward
pass once and copy its visual tokens; in the backward pass the gradients of the copies add up. Results are those without
sharing, up to the rounding of another batch, and every process makes as many passes as without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_pictures(visual: Any) -> None:
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
    pictures = torch.split(patches, grid_thw.prod(-1).tolist())
    # Only pictures of the same size and the same sum are compared value by value.
    sums = torch.stack([picture.sum(dtype=torch.float64) for picture in pictures]).tolist()
    seen: dict[tuple[Any, ...], list[int]] = {}
    first = []
    for i, key in enumerate(zip(map(tuple, grid_thw.tolist()), sums, strict=True)):
        alike = seen.setdefault(key, [])
        found = next((j for j in alike if torch.equal(pictures[i], pictures[j])), i)
        if found == i:
            alike.append(i)
        first.append(found)
    return first


def _first_of_each(
    visual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    patches: Tensor = args[0] if args else kwargs["hidden_states"]
    grid_thw = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    first = equal_pictures(patches, grid_thw)
    kept = sorted(set(first))
    visual._copies = None
    if len(kept) == len(first):
        return args, kwargs
    pictures = torch.split(patches, grid_thw.prod(-1).tolist())
    sizes = [len(pictures[i]) // visual.spatial_merge_size**2 for i in kept]
    visual._copies = sizes, [kept.index(i) for i in first]
    return (torch.cat([pictures[i] for i in kept]),), {**kwargs, "grid_thw": grid_thw[kept]}


def _copy_tokens(visual: Any, args: tuple[Any, ...], output: Any) -> None:
    if visual._copies is None:
        return
    sizes, order = visual._copies

    def copies(tokens: Tensor) -> Tensor:
        parts = torch.split(tokens, sizes)
        return torch.cat([parts[i] for i in order])

    output.pooler_output = copies(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL
        output.deepstack_features = [copies(tokens) for tokens in output.deepstack_features]
    output.last_hidden_state = None  # of fewer pictures than were given; nothing in the model reads it
