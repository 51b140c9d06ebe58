"""Second stage: tower and language model together, through the one-pass readout that scoring uses.

The layout is that of `backends/transformers.py` (prompt, picture, question, answer trie), for crops of one size, so
that the prompt is tokenised and numbered once. Beside the nodes of the trie every row carries one written-out answer,
which teaches the format to the end of the reply.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqr1_metric import protocol
from vqr1_metric.backends.readout import build_answer_trie, read_distribution
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid

from .objectives import anchor_loss, fidelity_loss, ladder_loss
from .pretrain import TOWER_SHARE, Average, Clock, PooledHead, make_optimizer, set_rate
from .tower import FastTower

TARGET_STD = 0.3
"""Spread, on the scale 1 to 5, of the opinions that a mean opinion score stands for (30 observers, rounded up)."""
SPELLED = "<answer>{:.2f}</answer><|im_end|>"


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the second stage."""

    fidelity: float = 1.0
    anchor: float = 0.4
    ladder: float = 1.0
    distribution: float = 0.1
    outside: float = 0.02
    reply: float = 0.05
    pooled: float = 0.5
    targets: float = 2.0


class ReadoutForward(nn.Module):
    """Pictures of one size to score distributions, over the parameters of a whole nano.

    `forward(images, answers)`: uint8 (B, 3, S, S) and answer tokens (B, A) to the distributions, the visual tokens
    (B, T, D) and the mean cross entropy of the answer tokens. With `grid=(rows, columns)` the language model is shown
    a random rows x columns of the tokens as if the picture had that shape: trained on one number of tokens alone it
    forgets how to answer for any other.
    """

    def __init__(self, model: nn.Module, tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.tower = FastTower(model.model.visual)
        self.fast = self.tower
        self.trie = build_answer_trie(tokenizer, ("",))
        text = tokenizer.apply_chat_template(protocol.messages(False), tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        at = ids.index(model.config.image_token_id)
        self.before, self.after = ids[:at], ids[at + 1 :]
        self._layouts: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def compile(self) -> None:
        """Compile the tower's forward (worth its minute from a few hundred steps on)."""
        self.fast = torch.compile(self.tower)

    def answers(self, scores: Tensor) -> Tensor:
        """Answer tokens (B, A) of scores (B,), clamped to the scale."""
        texts = [SPELLED.format(score) for score in scores.clamp(1, 5).tolist()]
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False) for text in texts])

    def _layout(self, rows: int, columns: int, answer: int) -> tuple[Tensor, Tensor]:
        """Positions (3, 1, L) and visibility (1, 1, L, L) of prompt, a grid of visual tokens, trie and answer."""
        if (rows, columns, answer) not in self._layouts:
            config = self.model.config
            ids = torch.tensor([[*self.before, *[config.image_token_id] * (rows * columns), *self.after]])
            merge = config.vision_config.spatial_merge_size
            positions, _ = self.model.model.get_rope_index(
                input_ids=ids,
                mm_token_type_ids=(ids == config.image_token_id).int(),
                image_grid_thw=torch.tensor([[1, rows * merge, columns * merge]]),
                attention_mask=torch.ones_like(ids),
            )
            nodes, prompt = len(self.trie), ids.shape[1]
            depths = torch.cat([self.trie.depths, torch.arange(1, answer + 1)])
            positions = torch.cat([positions, positions[:, :, -1:] + depths], dim=2)
            mask = torch.ones(prompt + nodes + answer, prompt + nodes + answer, dtype=torch.bool).tril()
            mask[prompt:, prompt:] = False
            mask[prompt : prompt + nodes, prompt : prompt + nodes] = self.trie.ancestors()
            mask[prompt + nodes :, prompt + nodes :] = torch.ones(answer, answer, dtype=torch.bool).tril()
            self._layouts[rows, columns, answer] = positions, mask[None, None]
        return self._layouts[rows, columns, answer]

    def forward(
        self, images: Tensor, answers: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[ScoreDistribution, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            visual = self.fast(images)
        visual = visual.float()
        distribution, reply = self.read(visual, answers, grid)
        return distribution, visual, reply

    def read(
        self,
        visual: Tensor,
        answers: Tensor,
        grid: tuple[int, int] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> tuple[ScoreDistribution, Tensor]:
        """As `forward`, from the visual tokens (B, T, D) on; `shape` is their rows and columns, by default a square."""
        language, head = self.model.model.language_model, self.model.lm_head
        batch, count, _ = visual.shape
        side = round(count**0.5)
        rows, columns = grid or shape or (side, side)
        shown = visual if grid is None else visual[:, torch.randperm(count)[: rows * columns].sort().values]
        positions, mask = self._layout(rows, columns, answers.shape[1])

        def embed(ids: list[int] | Tensor) -> Tensor:
            return language.embed_tokens(torch.as_tensor(ids)).expand(batch, -1, -1)

        inputs = [
            embed(self.before),
            shown,
            embed(self.after),
            embed(self.trie.tokens),
            language.embed_tokens(answers),
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            hidden = language(
                inputs_embeds=torch.cat(inputs, dim=1),
                attention_mask=mask.expand(batch, 1, -1, -1),
                position_ids=positions.expand(3, batch, -1),
                use_cache=False,
            ).last_hidden_state.float()
        tail = hidden[:, -(1 + len(self.trie) + answers.shape[1]) :]
        distribution = read_distribution(tail[:, : 1 + len(self.trie)], head, self.trie)
        writing = torch.cat([tail[:, :1], tail[:, 1 + len(self.trie) : -1]], dim=1)
        reply = F.cross_entropy(head(writing).float().flatten(0, 1), answers.flatten())
        return distribution, reply


def random_grid(tokens: int) -> tuple[int, int] | None:
    """None (the picture as it is) for half of the draws, else rows and columns of at most `tokens` visual tokens."""
    if torch.rand(()) < 0.5:
        return None
    count = tokens * (0.1 + 0.9 * torch.rand(()).item())
    rows = max(1, min(tokens, round((count * math.exp(0.6 * torch.randn(()).item())) ** 0.5)))
    return rows, max(1, min(tokens // rows, round(count / rows)))


def distribution_loss(distribution: ScoreDistribution, scores: Tensor) -> Tensor:
    """Cross entropy of the score grid against a normal one of `TARGET_STD` round each score (B,)."""
    target = torch.softmax(-0.5 * ((score_grid() - scores.clamp(1, 5)[:, None]) / TARGET_STD) ** 2, dim=1)
    return -(target * distribution.probabilities.clamp(min=1e-9).log()).sum(1).mean()


def finetune(
    model,
    tokenizer,
    batches,
    head: PooledHead,
    clock: Clock,
    rate=7e-4,
    weights=Weights(),
    report=print,
    every=100,
    checkpoint=None,
):
    """Train the whole model through the readout, in place; returns the average of a dict of `readout` and `head`.

    `report` gets a line every `every` steps, with the spread of the predictions: near zero means a collapse.
    """
    stage = nn.ModuleDict({"readout": ReadoutForward(model, tokenizer), "head": head}).train()
    optimizer = make_optimizer([(model.model.visual, TOWER_SHARE), (stage, 1.0)])
    average = Average(stage)
    if clock.steps > 500:
        stage["readout"].compile()
    sums, spread, began = torch.zeros(9), 0.0, time.monotonic()
    for batch in batches:
        set_rate(optimizer, rate * clock.factor())
        rated, scores, scene = batch["rated"], batch["scores"], batch["scene"]
        written = stage["readout"].answers(scores + TARGET_STD * torch.randn(scores.shape))
        grid = random_grid((batch["images"].shape[-1] // 32) ** 2)
        distribution, tokens, reply = stage["readout"](batch["images"], written, grid)
        pooled, told = head(tokens)
        mean = distribution.mean
        terms = {
            "fidelity": fidelity_loss(mean[:rated], distribution.variance[:rated], scores[:rated]),
            "anchor": anchor_loss(mean, scores, scene),
            "ladder": ladder_loss(mean, scene, batch["level"]),
            "distribution": distribution_loss(distribution[:rated], scores[:rated]),
            "outside": -(distribution.coverage * distribution.tag_probability).clamp(min=1e-9).log().mean(),
            "reply": reply,
            "pooled": anchor_loss(pooled, scores, scene),
            "targets": F.smooth_l1_loss(told, batch["targets"]),
        }
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.parameters(), 2.0)
        optimizer.step()
        average.update(stage)
        sums[: len(terms) + 1] += torch.stack([*[term.detach() for term in terms.values()], norm])
        spread += float(mean[:rated].detach().std())
        go_on = clock.tick()
        if clock.step % every == 0 or not go_on:
            count = (clock.step - 1) % every + 1
            values = " ".join(f"{n} {v:.3f}" for n, v in zip([*terms, "norm"], (sums / count).tolist(), strict=False))
            report(f"step {clock.step} {(time.monotonic() - began) / count:.2f}s spread {spread / count:.2f} {values}")
            sums, spread, began = torch.zeros(9), 0.0, time.monotonic()
            if checkpoint is not None:
                checkpoint(average.model)
        if not go_on:
            break
    return average.model
