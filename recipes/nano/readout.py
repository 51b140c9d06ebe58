"""From visual tokens to score distributions and written replies, in one pass of the language model, for training.

The layout is that of scoring: prompt, picture, question, answer trie. Beside the nodes of the trie every row carries a
written reply, which teaches the wording to its end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqr1_metric import protocol
from vqr1_metric.backends.readout import build_answer_trie, read_distribution
from vqr1_metric.functional.distribution import ScoreDistribution


class Readout:
    """The language model of a nano over visual tokens ``(B, T, D)`` of a grid of rows and columns."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.trie = build_answer_trie(tokenizer, ("",))
        self.prompts = {thinking: self._prompt(thinking) for thinking in (False, True)}
        self._positions: dict[tuple, Tensor] = {}

    def _prompt(self, thinking: bool) -> tuple[list[int], list[int]]:
        """Token ids before and after the picture."""
        text = self.tokenizer.apply_chat_template(
            protocol.messages(thinking), tokenize=False, add_generation_prompt=True
        )
        ids = self.encode(text)
        at = ids.index(self.model.config.image_token_id)
        return ids[:at], ids[at + 1 :]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answers(self, scores: Tensor) -> list[list[int]]:
        """Written answers of scores, to the end of the reply."""
        end = self.tokenizer.eos_token
        return [self.encode(f"<answer>{score:.2f}</answer>{end}") for score in scores.clamp(1, 5).tolist()]

    def _prompt_positions(self, grid: tuple[int, int], thinking: bool) -> Tensor:
        if (grid, thinking) not in self._positions:
            before, after = self.prompts[thinking]
            ids = torch.tensor([[*before, *[self.model.config.image_token_id] * (grid[0] * grid[1]), *after]])
            self._positions[grid, thinking], _ = self.model.model.get_rope_index(
                input_ids=ids, mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                image_grid_thw=torch.tensor([[1, *grid]]), attention_mask=torch.ones_like(ids),
            )  # fmt: skip
        return self._positions[grid, thinking]

    def hidden(self, visual: Tensor, grid: tuple[int, int], thinking: bool, tail: Tensor, depths: Tensor, mask: Tensor):
        """Hidden states ``(B, 1 + A, D)`` at the last token of the prompt and at those of the tail ``(B, A)``.

        ``depths (A,)`` says how many tokens after the prompt each stands, ``mask (A, A)`` who in the tail sees whom.
        """
        language, count, length = self.model.model.language_model, len(visual), tail.shape[1]
        before, after = (
            language.embed_tokens(torch.tensor(ids)).expand(count, -1, -1) for ids in self.prompts[thinking]
        )
        positions = self._prompt_positions(grid, thinking)
        positions = torch.cat([positions, positions[:, :, -1:] + depths], dim=2)
        prompt = positions.shape[2] - length
        seen = torch.ones(prompt + length, prompt + length, dtype=torch.bool).tril()
        seen[prompt:, prompt:] = mask
        hidden = language(
            inputs_embeds=torch.cat([before, visual, after, language.embed_tokens(tail)], dim=1),
            attention_mask=seen[None, None].expand(count, 1, -1, -1),
            position_ids=positions.expand(3, count, -1),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -(1 + length) :].float()

    def read(self, visual: Tensor, grid: tuple[int, int], answers: list[list[int]]) -> tuple[ScoreDistribution, Tensor]:
        """Distributions ``(B,)`` for the question without thinking, and the cross entropy of the written answers."""
        written, nodes = torch.tensor(answers), len(self.trie)
        length = written.shape[1]
        mask = torch.zeros(nodes + length, nodes + length, dtype=torch.bool)
        mask[:nodes, :nodes] = self.trie.ancestors()
        mask[nodes:, nodes:] = torch.ones(length, length, dtype=torch.bool).tril()
        tail = torch.cat([self.trie.tokens.expand(len(visual), -1), written], dim=1)
        depths = torch.cat([self.trie.depths, torch.arange(1, length + 1)])
        hidden = self.hidden(visual, grid, False, tail, depths, mask)
        head = self.model.lm_head
        with torch.autocast("cpu", enabled=False):
            distribution = read_distribution(hidden[:, : 1 + nodes], head, self.trie)
            writing = torch.cat([hidden[:, :1], hidden[:, 1 + nodes : -1]], dim=1)
            reply = F.cross_entropy(head(writing).flatten(0, 1), written.flatten())
        return distribution, reply

    def reply_loss(
        self, visual: Tensor, grid: tuple[int, int], replies: list[list[int]], given: list[tuple[int, int]]
    ) -> Tensor:
        """Cross entropy of replies to the thinking question, but for the span of tokens of each that is only given."""
        longest = max(map(len, replies))
        tail = torch.tensor([reply + [0] * (longest - len(reply)) for reply in replies])
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        hidden = self.hidden(visual, grid, True, tail, torch.arange(1, longest + 1), causal)[:, :-1]
        places = torch.arange(longest)
        starts, ends = torch.tensor(given)[:, :, None].unbind(1)
        taught = (places < torch.tensor([len(reply) for reply in replies])[:, None]) & (
            (places < starts) | (places >= ends)
        )
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(self.model.lm_head(hidden[taught]), tail[taught])

    @torch.no_grad()
    def go_on(self, visual: Tensor, grid: tuple[int, int], start: str, most: int) -> list[str]:
        """The most probable continuations of ``start`` for the thinking question, up to the first full stop."""
        begun = self.encode(start)
        tail = torch.tensor([begun] * len(visual))
        for _ in range(most):
            length = tail.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            following = self.hidden(visual, grid, True, tail, torch.arange(1, length + 1), causal)[:, -1]
            tail = torch.cat([tail, self.model.lm_head(following).argmax(-1)[:, None]], dim=1)
        return [self.tokenizer.decode(row[len(begun) :].tolist()).split(".")[0].strip() for row in tail]
