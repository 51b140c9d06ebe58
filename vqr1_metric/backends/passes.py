"""Forward passes that end in an answer tree, each of which gives the hidden states where answers are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from vqr1_metric.backends import packing
from vqr1_metric.backends.base import Model, ModelError
from vqr1_metric.backends.inputs import left_pad, with_cache
from vqr1_metric.backends.readout import AnswerTrie, read_rows_of, suffix_attention, tree_attention


class TreePasses:
    """The passes of one model.

    Each takes the inputs of B left-padded prompts, pixels included, and returns hidden states at the last prompt token
    and at every node of the trie, ``(B, 1 + nodes, D)``.

    Args:
        model: a Qwen-VL model with its head.
        pad_token, image_token: ids.
    """

    def __init__(self, model: Model, pad_token: int, image_token: int) -> None:
        self._model, self._pad_token, self._image_token = model, pad_token, image_token
        self._cuts_rows = read_rows_of(model.model.language_model.layers[-1])
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
        #: May every row see whom a mask lets it see? Then a tree takes one pass, and texts share a prompt.
        self.full_attention = set(kinds) == {"full_attention"}

    def read(self, inputs: dict[str, Tensor], trie: AnswerTrie, *, padded: bool = True) -> Tensor:
        """By the way that suits the model. ``padded``: are some prompts shorter than others?"""
        if not self.full_attention:
            return self.level_by_level(inputs, trie)
        if self._model.config.get_text_config()._attn_implementation == packing.ATTENTION:
            return self.packed(inputs, trie)
        return self.dense(inputs, trie, padded=padded)

    def dense(self, inputs: dict[str, Tensor], trie: AnswerTrie, *, padded: bool) -> Tensor:
        """One pass, prompts padded on the left, the nodes behind them."""
        prompt_mask, positions = inputs.pop("attention_mask"), inputs.pop("position_ids")
        batch = len(prompt_mask)
        node_positions = positions[:, :, -1:] + trie.depths.to(positions.device)
        nodes = trie.tokens.to(positions.device).expand(batch, -1)
        of_rows = prompt_mask if padded else prompt_mask[:1]  # without padding one mask serves all
        mask = self._as_attention_takes_it(tree_attention(of_rows, trie))
        output = self._model.model(
            input_ids=torch.cat([inputs.pop("input_ids"), nodes], dim=1),
            attention_mask=mask.expand(batch, -1, -1, -1),
            position_ids=torch.cat([positions, node_positions], dim=2),
            mm_token_type_ids=torch.cat([inputs.pop("mm_token_type_ids"), torch.zeros_like(nodes)], dim=1),
            use_cache=False,
            **inputs,
            **self._reading(len(trie) + 1),
        )
        return cast(Tensor, output.last_hidden_state[:, -(len(trie) + 1) :])

    def packed(self, inputs: dict[str, Tensor], trie: AnswerTrie) -> Tensor:
        """As :meth:`dense`, without padding."""
        read = len(inputs["input_ids"]), len(trie) + 1
        packed = inputs | packing.pack(inputs, trie)
        output = self._model.model(**packed, use_cache=False, **self._reading(math.prod(read)))
        return cast(Tensor, output.last_hidden_state[0, -math.prod(read) :].unflatten(0, read))

    def level_by_level(self, inputs: dict[str, Tensor], trie: AnswerTrie) -> Tensor:
        """As :meth:`dense`, for layers that take no mask of a tree: each level branches on copies of the cache.

        One token at a time, which every release of transformers does right where a layer keeps a state.
        """
        batch, device = len(inputs["input_ids"]), inputs["input_ids"].device
        if not len(trie):
            return cast(Tensor, self._model.model(**inputs, use_cache=False).last_hidden_state[:, -1:])
        if torch.is_grad_enabled() and inputs["pixel_values"].requires_grad:
            raise ModelError(
                "This model has layers without full attention: gradients pass through answers of one token "
                "(question='levels'), not through those of several."
            )
        memory = DynamicCache(config=self._model.config.get_text_config())
        output = self._model.model(**inputs, **with_cache(self._model.model, memory))
        hidden = [output.last_hidden_state[:, -1]]  # of every row of the readout, (B, D) each
        mask, last = inputs["attention_mask"], inputs["position_ids"][:, :, -1:]
        places = {0: 0}  # of the rows that the cache holds
        for depth in range(1, int(trie.depths.max()) + 1):
            level = (trie.depths == depth).nonzero()[:, 0].tolist()
            parents = torch.tensor([places[int(trie.parents[node])] for node in level])
            order = (torch.arange(batch)[:, None] * len(places) + parents).flatten().to(device)
            memory.reorder_cache(cast(torch.LongTensor, order))
            mask = torch.cat([mask[order], mask.new_ones(len(order), 1)], dim=1)
            output = self._model.model(
                input_ids=trie.tokens[level].to(device).repeat(batch)[:, None],
                attention_mask=mask,
                position_ids=(last + depth).repeat_interleave(len(level), dim=1),
                **with_cache(self._model.model, memory),
            )
            hidden += output.last_hidden_state[:, -1].unflatten(0, (batch, len(level))).unbind(1)
            places = {node + 1: place for place, node in enumerate(level)}
        by_depth = [0, *(node + 1 for node in trie.depths.argsort(stable=True).tolist())]
        return torch.stack(hidden, dim=1)[:, torch.tensor(by_depth).argsort().to(device)]

    def after_prompts(
        self, inputs: dict[str, Tensor], suffixes: Sequence[Sequence[Sequence[int]]], tries: Sequence[AnswerTrie]
    ) -> Tensor:
        """Hidden states where several texts follow each prompt, which goes through once.

        Args:
            inputs: of B prompts.
            suffixes: for each prompt its R texts, as tokens, at least one each.
            tries: of each of the R texts.

        Returns:
            At the last token of each text and at the nodes of its trie, ``(B, R, 1 + most nodes, D)``.
        """
        device, batch, each = inputs["input_ids"].device, len(suffixes), len(tries)
        memory = DynamicCache(config=self._model.config.get_text_config())
        self._model.model(**inputs, **with_cache(self._model.model, memory))
        order = torch.arange(batch, device=device).repeat_interleave(each)
        memory.reorder_cache(cast(torch.LongTensor, order))
        texts = [text for of_prompt in suffixes for text in of_prompt]
        padded = left_pad(texts, self._pad_token, self._image_token)
        steps = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        nodes, of_rows = max(map(len, tries)), list(tries) * batch
        tokens = torch.full((len(texts), nodes), self._pad_token)
        depths = torch.zeros(len(texts), nodes, dtype=torch.long)
        for row, trie in enumerate(of_rows):
            tokens[row, : len(trie)], depths[row, : len(trie)] = trie.tokens, trie.depths
        ahead = torch.cat([steps, steps[:, -1:] + depths], dim=1).to(device)
        seen = torch.cat([inputs["attention_mask"][order], padded["attention_mask"].to(device)], dim=1).bool()
        mask = suffix_attention(seen, steps.shape[1], of_rows, nodes)
        output = self._model.model(
            input_ids=torch.cat([padded["input_ids"], tokens], dim=1).to(device),
            attention_mask=self._as_attention_takes_it(mask),
            position_ids=inputs["position_ids"][:, order, -1:] + 1 + ahead,
            **with_cache(self._model.model, memory),
            **self._reading(nodes + 1),
        )
        return cast(Tensor, output.last_hidden_state[:, -(nodes + 1) :].unflatten(0, (batch, each)))

    def _reading(self, rows: int) -> dict[str, int]:
        """What tells the last layer how many of the last rows are read."""
        return {"read_rows": rows} if self._cuts_rows else {}

    def _as_attention_takes_it(self, mask: Tensor) -> Tensor:
        """Eager attention adds its mask to the logits; a boolean one would be added as 0 and 1."""
        if self._model.config.get_text_config()._attn_implementation != "eager":
            return mask
        dtype = self._model.get_input_embeddings().weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
