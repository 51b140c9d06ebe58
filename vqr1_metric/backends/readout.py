"""One forward pass, the whole distribution over a closed set of answers: the answer trie.

The replies of interest are known beforehand: an opening (``<answer>``), one of the answers (a score d, d.d or d.dd from
1 to 5), and perhaps a closing. Tokenised with the model's own tokenizer they form a small tree. Its inner nodes are
appended to the prompt; an attention mask lets every node see the prompt and its own ancestors only, and its position is
that of its depth. The logits at the last prompt token and at the nodes then hold the probability of every branch, hence
of every answer, without decoding a single token. Answers of one token that follow a given opening need no node at all.

What P(answer) means. Let the reply begin with the opening; all probabilities are given that.

- An answer that is not the beginning of another one, such as d.dd: the mass of all replies that begin so, whatever
  follows.
- Any other: the mass of replies in which the closing begins right after it (its first ``<``), so that "3" is not
  counted again with 3.4 or 3.42. 3, 3.0 and 3.00 are one score, their masses add up.
- 5.01 to 5.99, 0.x, words and unusual spellings lie outside; what lies inside adds up to ``coverage``.

A *spelling* is the blank space before the answer: none, a blank, or a line break.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from vqr1_metric.backends.base import Model
from vqr1_metric.backends.windows import replace_forward
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import VISUALQUALITY_R1, Question, score_texts

__all__ = ["SPELLINGS", "AnswerTrie", "ReadoutError", "build_answer_trie", "read_distribution", "score_texts"]

SPELLINGS: tuple[str, ...] = VISUALQUALITY_R1.spellings
#: Spellings that hold less than this share of the tag's mass on the calibration picture are dropped from the trie.
NEGLIGIBLE = 1e-4

_VOCABULARY_CHUNK = 16_384


class ReadoutError(ValueError):
    """The tokenizer or the model cannot be read out in one pass; the message says why and what to use instead."""


@dataclass(frozen=True)
class AnswerTrie:
    """The tree of answer tokens.

    Row 0 of the readout stands for the last prompt token, row ``n + 1`` for node ``n``; parents come before children.

    Args:
        tokens: token id of each node, shape ``(nodes,)``.
        parents: row of each node's parent, shape ``(nodes,)``.
        depths: how many tokens after the prompt each node stands, from 1, shape ``(nodes,)``.
        leaf_rows, leaf_tokens, leaf_scores, leaf_spellings: each leaf is a token read off the logits of a row; its
            score is an index into the question's values, its spelling an index into ``spellings``.
        tag_rows, tag_tokens: the tokens that complete the opening, and where they are read; none where the prompt ends
            with the opening.
        spellings: blank space before the answer that the trie knows.
        prefix: tokens of the opening that are given, to be written behind the prompt.
        question: whose answers these are.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    leaf_rows: Tensor
    leaf_tokens: Tensor
    leaf_scores: Tensor
    leaf_spellings: Tensor
    tag_rows: Tensor
    tag_tokens: Tensor
    spellings: tuple[str, ...]
    prefix: tuple[int, ...] = ()
    question: Question = VISUALQUALITY_R1

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> Tensor:
        """Boolean ``(nodes, nodes)``: may node (row) see node (column)? Itself and its ancestors."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents.tolist()):
            if parent > 0:
                seen[node] |= seen[parent - 1]
        return seen


def build_answer_trie(
    tokenizer: Any, spellings: Sequence[str] | None = None, question: Question = VISUALQUALITY_R1
) -> AnswerTrie:
    """Build the trie from a (fast) tokenizer.

    Args:
        tokenizer: with ``encode`` and ``decode``.
        spellings: of the question's, those to build; None for all.
        question: whose answers to read.

    Raises:
        ReadoutError: if a token straddles the end of an answer, so that its mass cannot be read, or if the tokenizer
            does not reproduce the text.
    """
    spellings = tuple(question.spellings if spellings is None else spellings)
    paths: dict[tuple[int, ...], tuple[int, int]] = {}
    tags: set[tuple[int, ...]] = set()
    for spelling_index, spelling in enumerate(spellings):
        for text, value in question.texts():
            whole = text not in question.beginnings
            # An answer that has to be closed may be so with its own spelling's blank or with none.
            for before_close in {""} if whole else {spelling, ""}:
                answered = question.opening + spelling + text + before_close
                tokens, ends = _tokenise(tokenizer, answered + question.closing)
                tags.add(tuple(tokens[: _tokens_until(ends, len(question.opening))]))
                path = tuple(tokens[: _tokens_until(ends, len(answered) + (not whole))])
                if whole and ends[len(path) - 1] != len(answered):
                    raise ReadoutError(
                        f"This tokenizer joins the end of the {'score' if question.reads_scores else 'answer'} {text} "
                        "with what follows it, so its distribution cannot be read in one pass. Use mode='sample'."
                    )
                paths[path] = (value, spelling_index)

    given = _common_beginning(tags, paths) if question.opening_given else 0
    prefix = next(iter(paths))[:given]
    leaves: list[tuple[int, int, int, int]] = []
    nodes: list[tuple[int, int, int]] = []
    rows: dict[tuple[int, ...], int] = {(): 0}

    def row_of(path: tuple[int, ...]) -> int:
        if path not in rows:
            parent = row_of(path[:-1])
            nodes.append((path[-1], parent, len(path)))
            rows[path] = len(nodes)
        return rows[path]

    for path, (value, spelling_index) in paths.items():
        leaves.append((row_of(path[given:-1]), path[-1], value, spelling_index))
    overlapping = [path for path in paths if path[given:] in rows]
    if overlapping:
        raise ReadoutError(
            f"This tokenizer gives one score the tokens {list(overlapping[0])} that begin another, so they cannot be "
            "told apart in one pass. Use mode='sample'."
        )
    tag_reads = [(row_of(tag[given:-1]), tag[-1]) for tag in sorted(tags) if len(tag) > given]
    node_tokens, parents, depths = _columns(nodes, 3)
    leaf_rows, leaf_tokens, leaf_scores, leaf_spellings = _columns(leaves, 4)
    tag_rows, tag_tokens = _columns(tag_reads, 2)
    return AnswerTrie(
        node_tokens,
        parents,
        depths,
        leaf_rows,
        leaf_tokens,
        leaf_scores,
        leaf_spellings,
        tag_rows,
        tag_tokens,
        spellings,
        prefix,
        question,
    )


def _common_beginning(tags: set[tuple[int, ...]], paths: Iterable[tuple[int, ...]]) -> int:
    """How many tokens all openings have in common, but for the last token of any answer."""
    most = min(*(len(path) - 1 for path in paths), *map(len, tags))
    first, *others = tags
    while any(tag[:most] != first[:most] for tag in others):
        most -= 1
    return most


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> list[Tensor]:
    return [torch.tensor([row[column] for row in rows], dtype=torch.long) for column in range(count)]


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each the number of characters of ``text`` that it and those before it cover."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ends = [len(tokenizer.decode(tokens[: i + 1], clean_up_tokenization_spaces=False)) for i in range(len(tokens))]
    if tokenizer.decode(tokens, clean_up_tokenization_spaces=False) != text:
        raise ReadoutError(
            f"This tokenizer does not reproduce {text!r} from its tokens, so answers cannot be matched with it. "
            "Use mode='sample'."
        )
    return tokens, ends


def _tokens_until(ends: list[int], length: int) -> int:
    return next((count for count, end in enumerate([0, *ends]) if end >= length))


def tree_attention(prompt_mask: Tensor, trie: AnswerTrie) -> Tensor:
    """Who sees whom, for left-padded prompts followed by the nodes.

    Args:
        prompt_mask: ``(B, P)``, true at prompt tokens, false at padding.

    Returns:
        Boolean ``(B, 1, P + nodes, P + nodes)``, true where the row may see the column. A padding row sees itself,
        since a softmax over nothing is NaN.
    """
    batch, prompt = prompt_mask.shape
    total = prompt + len(trie)
    mask = torch.zeros(total, total, dtype=torch.bool, device=prompt_mask.device)
    mask[:prompt, :prompt] = torch.ones(prompt, prompt, dtype=torch.bool, device=mask.device).tril()
    mask[prompt:, :prompt] = True
    mask[prompt:, prompt:] = trie.ancestors().to(mask.device)
    visible = torch.cat([prompt_mask.bool(), prompt_mask.new_ones(batch, len(trie), dtype=torch.bool)], dim=1)
    return (mask & visible[:, None, :] | torch.eye(total, dtype=torch.bool, device=mask.device))[:, None]


def suffix_attention(seen: Tensor, suffix: int, tries: Sequence[AnswerTrie], nodes: int) -> Tensor:
    """Who sees whom where a remembered prompt goes on: text, left-padded, then the nodes of a trie, right-padded.

    Args:
        seen: ``(R, P + suffix)``, true at tokens, false at padding, of the remembered prompt and the text.
        suffix: length of the text.
        tries: of each row.
        nodes: how many nodes each row has room for.

    Returns:
        Boolean ``(R, 1, suffix + nodes, P + suffix + nodes)``.
    """
    prompt, rows = seen.shape[1] - suffix, suffix + nodes
    masks: dict[int, Tensor] = {}
    for trie in tries:
        if id(trie) not in masks:
            mask = torch.zeros(rows, prompt + rows, dtype=torch.bool)
            mask[:, :prompt] = True
            mask[:suffix, prompt : prompt + suffix] = torch.ones(suffix, suffix, dtype=torch.bool).tril()
            mask[suffix : suffix + len(trie), prompt : prompt + suffix] = True
            start, end = suffix, suffix + len(trie)
            mask[start:end, prompt + start : prompt + end] = trie.ancestors()
            masks[id(trie)] = mask
    visible = pad(seen, (0, nodes), value=True)
    of_rows = torch.stack([masks[id(trie)] for trie in tries]).to(seen.device)
    itself = pad(torch.eye(rows, dtype=torch.bool, device=seen.device), (prompt, 0))
    return (of_rows & visible[:, None, :] | itself)[:, None]


def read_rows_of(layer: torch.nn.Module) -> bool:
    """Let the last decoder layer run its MLP on the rows that are read: no layer comes after it.

    How many of the last rows those are comes with each call, as ``read_rows`` among the keyword arguments that the
    models of transformers hand on; the others then leave the layer as 0. Nothing on the module changes during a call,
    so threads may share it, and a recomputation in the backward pass does the same again.

    Returns:
        Whether the layer is built as expected. If not, it stays as it is and must not be given ``read_rows``.
    """
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    fits = all(isinstance(getattr(layer, part, None), torch.nn.Module) for part in parts)
    if fits:
        replace_forward(layer, _forward_of_read_rows)
    return fits


def _forward_of_read_rows(
    self: Model, hidden_states: Tensor, *args: Any, read_rows: int | None = None, **kwargs: Any
) -> Tensor:
    if read_rows is None:
        return cast(Tensor, type(self).forward(self, hidden_states, *args, **kwargs))
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    read = (hidden_states + attended)[:, -read_rows:]
    read = read + self.mlp(self.post_attention_layernorm(read))
    return pad(read, (0, 0, hidden_states.shape[1] - read.shape[1], 0))


def read_distribution(hidden: Tensor, head: torch.nn.Module, trie: AnswerTrie) -> ScoreDistribution:
    """The score distribution from the final hidden states at the rows of the trie.

    Args:
        hidden: ``(B, 1 + nodes, D)``, at the last prompt token and at every node.
        head: the language model head.

    Returns:
        Distributions with leading shape ``(B,)``, in float32 or wider, over the values of the trie's question.
    """
    question = trie.question
    leaf_log_probs, tag_log_prob = _leaf_log_probabilities(hidden, head, trie)
    given_tag = leaf_log_probs - tag_log_prob[:, None]
    log_probs = _grouped_logsumexp(given_tag, trie.leaf_scores, len(question.values))
    tag = torch.ones_like(tag_log_prob) if question.opening_given else tag_log_prob.exp()
    if question.reads_scores:
        return ScoreDistribution.from_log_probabilities(log_probs, tag)
    return ScoreDistribution.from_log_probabilities(log_probs, tag, question.values, question.labels)


def spelling_shares(hidden: Tensor, head: torch.nn.Module, trie: AnswerTrie) -> Tensor:
    """Probability of each spelling given the tag, averaged over the batch; shape ``(spellings,)``."""
    leaf_log_probs, tag_log_prob = _leaf_log_probabilities(hidden, head, trie)
    given_tag = leaf_log_probs - tag_log_prob[:, None]
    return _grouped_logsumexp(given_tag, trie.leaf_spellings, len(trie.spellings)).exp().mean(0)


def _leaf_log_probabilities(hidden: Tensor, head: torch.nn.Module, trie: AnswerTrie) -> tuple[Tensor, Tensor]:
    """Log-probability of every leaf ``(B, leaves)`` and of the tag ``(B,)``, from the start of the reply."""
    device = hidden.device
    node_rows, node_tokens = trie.parents.to(device), trie.tokens.to(device)
    leaf_rows, leaf_tokens = trie.leaf_rows.to(device), trie.leaf_tokens.to(device)
    tag_rows, tag_tokens = trie.tag_rows.to(device), trie.tag_tokens.to(device)
    logits, normaliser = _logits(
        hidden, head, torch.cat([node_tokens, leaf_tokens, tag_tokens]).unique(return_inverse=True)
    )
    columns = torch.arange(len(node_tokens) + len(leaf_tokens) + len(tag_tokens), device=device)
    node_columns, leaf_columns, tag_columns = columns.split([len(node_tokens), len(leaf_tokens), len(tag_tokens)])

    def step(rows: Tensor, columns: Tensor) -> Tensor:
        return logits[:, rows, columns] - normaliser[:, rows]

    node_step = step(node_rows, node_columns)
    # Log-probability of reaching each row: every node adds its own step to its parent's, ancestors first.
    of_rows = [normaliser.new_zeros(len(normaliser))]
    for node, parent in enumerate(trie.parents.tolist()):
        of_rows.append(of_rows[parent] + node_step[:, node])
    reached = torch.stack(of_rows, dim=1)
    tag_log_prob = reached[:, 0]
    if len(tag_rows):
        tag_log_prob = torch.logsumexp(reached[:, tag_rows] + step(tag_rows, tag_columns), dim=1)
    return reached[:, leaf_rows] + step(leaf_rows, leaf_columns), tag_log_prob


def _logits(hidden: Tensor, head: torch.nn.Module, wanted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the wanted tokens ``(B, R, wanted)`` and the log-sum-exp over the whole vocabulary ``(B, R)``.

    In float32 at least (bf16 logits cost .1 to .2 in log-probability), over chunks of the vocabulary so that a head of
    150,000 rows is never held in float32 at once. A head without a plain weight (quantised, offloaded) is called as it
    is.
    """
    unique, inverse = wanted
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.is_meta or weight.shape[-1] != hidden.shape[-1]:
        logits = head(hidden).to(dtype)
        return logits[..., unique][..., inverse], torch.logsumexp(logits, dim=-1)

    hidden = hidden.to(device=weight.device, dtype=dtype)
    bias = getattr(head, "bias", None)

    def project(rows: Tensor, offset: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(hidden, rows.to(dtype), None if offset is None else offset.to(dtype))

    def chunk_normaliser(start: int) -> Tensor:
        chunk = slice(start, start + _VOCABULARY_CHUNK)
        return torch.logsumexp(project(weight[chunk], None if bias is None else bias[chunk]), dim=-1)

    # With gradients, recompute a chunk in the backward pass rather than keep its logits and its float32 weights.
    starts = range(0, weight.shape[0], _VOCABULARY_CHUNK)
    if hidden.requires_grad and len(starts) > 1:
        parts = [checkpoint(chunk_normaliser, start, use_reentrant=False) for start in starts]
    else:
        parts = [chunk_normaliser(start) for start in starts]
    unique = unique.to(weight.device)
    logits = project(weight[unique], None if bias is None else bias[unique])
    return logits[..., inverse.to(weight.device)], torch.logsumexp(torch.stack(parts), dim=0)


def _grouped_logsumexp(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Log-sum-exp of ``values (B, N)`` over the members of each of ``count`` groups; every group has a member.

    By gathering, not scattering, which on a GPU adds in whatever order its threads come.
    """
    order = groups.argsort(stable=True)
    sizes = groups.bincount(minlength=count)
    place = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups[order]]
    members = torch.full((count, int(sizes.max())), len(groups))  # by default the column added below: nothing
    members[groups[order], place] = order
    nothing = values.new_full((values.shape[0], 1), -torch.inf)
    return torch.cat([values, nothing], dim=1)[:, members.to(values.device)].logsumexp(-1)
