"""Sampled replies: the picture goes through the model once, its K replies share what the model remembers of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from vqr1_metric.backends.base import Model, Sampling
from vqr1_metric.backends.inputs import with_cache


@torch.no_grad()
def sample_tokens(
    model: Model,
    inputs: dict[str, Tensor],
    sampling: Sampling,
    seeds: Sequence[int],
    never_sampled: Sequence[int],
    end_tokens: Sequence[int],
    pad_token: int,
) -> Tensor:
    """Tokens of K replies for each prompt, ``(B * K, length)``, padded behind their end.

    ``generate`` would put K copies of every picture through the vision tower and the prompt through the language model.

    Args:
        model: a Qwen-VL model with its head.
        inputs: of the left-padded prompts, position_ids ``(3, B, P)`` included.
        sampling: K, the distribution's shape, the longest reply.
        seeds: of every reply, the K of the first picture first; see :meth:`~vqr1_metric.backends.base.Sampling.seeds`.
        never_sampled: tokens that no reply may hold.
        end_tokens: tokens that end a reply.
        pad_token: what follows them.
    """
    replies = sampling.num_samples
    pictures = len(inputs["input_ids"])
    memory = DynamicCache(config=model.config.get_text_config())
    output = model.model(**inputs, **with_cache(model.model, memory))
    order = torch.arange(pictures, device=inputs["input_ids"].device).repeat_interleave(replies)
    memory.reorder_cache(cast(torch.LongTensor, order))
    hidden = output.last_hidden_state[:, -1].repeat_interleave(replies, dim=0)
    mask = inputs["attention_mask"].repeat_interleave(replies, dim=0)
    position = inputs["position_ids"][:, :, -1:].repeat_interleave(replies, dim=1)
    sampler = SeededSampler(sampling, seeds, never_sampled)
    ends = torch.tensor(list(end_tokens), device=mask.device)
    finished = torch.zeros(pictures * replies, dtype=torch.bool, device=mask.device)
    tokens: list[Tensor] = []
    while True:
        logits = model.get_output_embeddings()(hidden)
        chosen = sampler(logits.to(torch.promote_types(logits.dtype, torch.float32))).to(mask.device)
        tokens.append(chosen.masked_fill(finished, pad_token))
        finished = finished | torch.isin(tokens[-1], ends)
        if len(tokens) == sampling.max_new_tokens or bool(finished.all()):
            return torch.stack(tokens, dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        output = model.model(
            input_ids=tokens[-1][:, None],
            attention_mask=mask,
            position_ids=position,
            **with_cache(model.model, memory),
        )
        hidden = output.last_hidden_state[:, -1]


class SeededSampler:
    """Samples one token per row, with one generator per reply.

    The arg max of logits plus Gumbel noise is a sample of their softmax, so a reply depends on its own generator and
    not, as with a shared one, on which other pictures are in the batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], never_sampled: Sequence[int]) -> None:
        self.sampling = sampling
        self.never_sampled = list(never_sampled)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids ``(rows,)`` for logits ``(rows, vocabulary)``."""
        logits = logits.double() / self.sampling.temperature
        logits[:, self.never_sampled] = -torch.inf
        if self.sampling.top_k:
            smallest = logits.topk(min(self.sampling.top_k, logits.shape[1]), dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.sampling.top_p < 1:
            ordered, index = logits.sort(dim=1, descending=True)
            mass_before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
            outside = (mass_before >= self.sampling.top_p).scatter(1, index, mass_before >= self.sampling.top_p)
            logits = logits.masked_fill(outside, -torch.inf)
        uniform = torch.stack([torch.rand(logits.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -(-uniform.clamp(min=1e-300).log()).log()
        return (logits + gumbel.to(logits.device)).argmax(dim=1)
