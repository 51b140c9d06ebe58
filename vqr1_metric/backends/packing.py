"""Pictures of unequal size in one row of the language model, without padding; an alternative to the dense mask.

The row holds the prompts but for their last tokens, one after the other, then a tree for each picture: the last token
of its prompt and the nodes of the answer trie. Prompts are attended to causally, each by itself, as equal windows or by
torch's variable-length attention (:func:`~vqr1_metric.backends.windows.windowed_attention`); the rows of a tree see
their whole prompt and their ancestors, one call for all trees. Only the keys of that call are padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vqr1_metric.backends.base import Model
from vqr1_metric.backends.readout import AnswerTrie
from vqr1_metric.backends.windows import windowed_attention

#: Its name among the attentions of transformers.
ATTENTION = "vqr1_packed_tree"


@dataclass(frozen=True)
class Packing:
    """Who sees whom in a packed row of B pictures.

    Args:
        starts: where each prompt begins and where the trees begin, int32 ``(B + 1,)``.
        keys: rows that the tree of each picture may see, padded, ``(B, longest prompt + tree)``.
        mask: which of those each row of a tree sees, ``(B, 1, tree, longest prompt + tree)``.
        prompt_rows: the last of ``starts``, known without waiting for a GPU.
    """

    starts: Tensor
    keys: Tensor
    mask: Tensor
    prompt_rows: int


def use_packing(model: Model) -> None:
    """Let a loaded model's language model take a :class:`Packing`; without one it attends as with ``"sdpa"``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation({"text_config": ATTENTION})


def pack(inputs: dict[str, Tensor], trie: AnswerTrie) -> dict[str, object]:
    """Inputs of the model for left-padded prompts followed by the answer trie, without the padding.

    Args:
        inputs: ``attention_mask`` and what else one pass takes, position_ids ``(3, B, P)`` included.
        trie: whose nodes come after each prompt.
    """
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    nodes = pad(trie.tokens.to(ids.device).expand(len(ids), -1), (1, 0))
    nodes[:, 0] = ids[:, -1]
    depths = pad(trie.depths.to(ids.device), (1, 0))
    in_prompt = inputs["attention_mask"].bool()
    in_prompt = torch.cat([in_prompt[:, :-1], torch.zeros_like(in_prompt[:, :1])], dim=1)  # the last is in the tree
    lengths = in_prompt.sum(1)
    starts = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    prompt_rows, longest, size = int(starts[-1]), ids.shape[1] - 1, len(trie) + 1

    place = torch.arange(longest, device=ids.device)
    of_prompts = (starts[:-1, None] + place).clamp(max=prompt_rows)
    of_trees = prompt_rows + torch.arange(nodes.numel(), device=ids.device).view(nodes.shape)
    in_tree = pad(trie.ancestors().to(ids.device), (1, 0, 1, 0), value=True)
    in_tree[0, 1:] = False  # the prompt's last token comes before the nodes
    sees_prompt = (place < lengths[:, None])[:, None].expand(-1, size, -1)
    mask = torch.cat([sees_prompt, in_tree.expand(len(ids), -1, -1)], dim=2)[:, None]
    in_row = torch.cat([ids[in_prompt], nodes.flatten()])[None]
    types = torch.cat([inputs["mm_token_type_ids"][in_prompt], torch.zeros_like(nodes).flatten()])[None]
    tree_positions = positions[:, :, -1:] + depths
    return {
        "input_ids": in_row,
        "mm_token_type_ids": types,
        "position_ids": torch.cat([positions[:, in_prompt], tree_positions.flatten(1)], dim=1)[:, None],
        "attention_mask": mask.new_ones(1, 1, 1, 1),  # four dimensions, which the model hands on as they are
        "packing": Packing(starts, torch.cat([of_prompts, of_trees], dim=1), mask, prompt_rows),
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: ``(1, heads, S, dim)`` in, ``(1, S, heads, dim)`` out."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query[0].transpose(0, 1)
    groups = query.shape[1] // key.shape[1]  # grouped queries share a key and a value
    key, value = (x[0].transpose(0, 1).repeat_interleave(groups, dim=1) for x in (key, value))
    rows = slice(packing.prompt_rows)
    of_prompts = windowed_attention(query[rows], key[rows], value[rows], packing.starts, scaling, causal=True)
    trees = query[packing.prompt_rows :].unflatten(0, (len(packing.keys), -1))
    trees, key, value = (x.transpose(1, 2) for x in (trees, key[packing.keys], value[packing.keys]))
    of_trees = scaled_dot_product_attention(trees, key, value, attn_mask=packing.mask, scale=scaling)
    return torch.cat([of_prompts, of_trees.transpose(1, 2).flatten(0, 1)])[None], None
