"""Cold start: a supervised warm-up that teaches a base model the form of the reply, so that RL has replies to reward.

The replies are made from the ratings: the score is the picture's rank in its own data set, spread over 1 to 5, plus
noise that keeps the sampled replies of a picture apart; the thinking form names the level of quality. It teaches form
and rough order only; the order itself is learnt from the comparisons afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqr1_metric.backends.base import ModelError
from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE
from vqr1_metric.protocol import question, write_reply
from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.base import TrainingRows
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.policy import load_policy, lora_config
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.sampler import ComparisonSampler

#: Standard deviation of the noise on the taught scores, in score units.
NOISE = 0.5
#: The five levels of ITU-R BT.500, from 1 to 5.
LEVELS = ("bad", "poor", "fair", "good", "excellent")


def teaching_scores(training: TrainingRows) -> list[float]:
    """A score in [1, 5] for each row: its rank within its data set (ties share theirs), or its share of the votes."""
    ranks: dict[str, list[float]] = {}
    for row in training.rows:
        ranks.setdefault(row["data_set"], []).append(row["quality"])
    ranks = {name: sorted(values) for name, values in ranks.items()}
    scores = []
    for row in training.rows:
        values = ranks[row["data_set"]]
        if row["share"] is not None:
            place = row["share"]
        else:
            below = sum(v < row["quality"] for v in values)
            place = (below + (values.count(row["quality"]) - 1) / 2) / max(1, len(values) - 1)
        scores.append(MIN_SCORE + (MAX_SCORE - MIN_SCORE) * place)
    return scores


def reply(score: float, thinking: bool) -> str:
    """The reply that states this score; with thinking it names the level of quality."""
    if not thinking:
        return write_reply(score)
    level = LEVELS[min(len(LEVELS) - 1, int((score - MIN_SCORE) / (MAX_SCORE - MIN_SCORE) * len(LEVELS)))]
    return write_reply(score, f"The overall quality of this picture is {level}.")


def cold_start(config: RankerConfig, sets: Sequence[RatingSet], folder: Path) -> Path:
    """Train ``cold_start_steps`` supervised steps and write the model to ``folder``, from which RL starts.

    The loss is the cross entropy of the reply's tokens, to its end token; AdamW with ``cold_start_learning_rate``.
    """
    loaded = load_policy(config)
    training = TrainingRows.of(sets)
    processor = RankerProcessor(
        loaded, training.pictures, loaded.pixel_config.with_limits(config.min_pixels, config.max_pixels)
    )
    model: Any = loaded.model
    if config.lora_rank:
        from peft import get_peft_model
        from transformers import set_seed

        set_seed(config.seed)  # the adapter starts at random
        model = get_peft_model(model, lora_config(config))
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.cold_start_learning_rate, weight_decay=0.0)
    size = config.comparison_size()
    sampler = ComparisonSampler(training.units, size, mixing=config.mixing, seed=config.seed)
    noise = torch.Generator().manual_seed(config.seed)
    targets = teaching_scores(training)
    step = epoch = 0
    while step < config.cold_start_steps:
        sampler.set_epoch(epoch)
        for rows in sampler.comparison_sets():
            taught = [targets[row] + NOISE * torch.randn((), generator=noise).item() for row in rows]
            replies = [reply(min(MAX_SCORE, max(MIN_SCORE, score)), config.thinking) for score in taught]
            images = [training.rows[row]["image"] for row in rows]
            loss = reply_loss(model, processor, images, replies, config.thinking)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            step += 1
            if step == config.cold_start_steps:
                break
        epoch += 1
    if config.lora_rank:
        model = model.merge_and_unload()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def reply_loss(
    model: Any, processor: RankerProcessor, images: Sequence[str], replies: Sequence[str], thinking: bool
) -> Tensor:
    """Mean cross entropy of the tokens of the replies and their end token."""
    prompts = [processor.apply_chat_template(_chat(image, thinking), add_generation_prompt=True) for image in images]
    end = processor.tokenizer.eos_token
    if not end:
        raise ModelError("Expected a tokenizer with an end token, but got none.")
    texts = [prompt + said + end for prompt, said in zip(prompts, replies, strict=True)]
    inputs = processor(images=[[image] for image in images], text=texts, padding=True)
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    lengths = [len(processor.tokenizer.encode(said + end, add_special_tokens=False)) for said in replies]
    longest = max(lengths)
    logits = model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float()
    tokens = inputs["input_ids"][:, -longest:]
    # Rows are padded on the left, so every reply ends in the last column.
    taught = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
    return F.cross_entropy(logits[taught], tokens[taught])


def _chat(image: str, thinking: bool) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question(thinking)}]
    return [{"role": "user", "content": content}]
