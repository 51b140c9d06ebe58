"""Rewards of sampled replies: do their scores order the images as people do, and have they the asked-for form?

:func:`batch_rewards` is a plain function of a whole batch, for any engine; :class:`RankingReward` is the same in the
form that TRL calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from vqr1_metric.functional.reward import EPSILON, Rule, Variance, ranking_reward
from vqr1_metric.functional.thurstone import GAMMA
from vqr1_metric.protocol import has_form, parse_reply

Scope = Literal["process", "global"]
#: A reply as engines give it: its text, or a chat of one message.
Reply = str | Sequence[dict[str, Any]]

#: Rewards of one image that differ by less have no spread.
_NO_SPREAD = 1e-6


def batch_rewards(
    replies: Sequence[str],
    images: Sequence[Hashable],
    quality: Sequence[float],
    data_sets: Sequence[Hashable] | None = None,
    comparisons: Sequence[Hashable] | None = None,
    shares: Sequence[float | None] | None = None,
    *,
    rule: Rule = "fidelity",
    variance: Variance = "estimated",
    gamma: float = GAMMA,
    eps: float = EPSILON,
) -> list[float]:
    """The ranking reward of every reply of a batch, in any order.

    Args:
        replies: texts, of which the stated score is read.
        images: which image each reply is about; replies about one image form its group (K may differ).
        quality: MOS of each reply's image, higher is better.
        data_sets: of each reply's image; MOS of different data sets are never compared. By default one.
        comparisons: of each reply's image: images are compared only where this is equal. By default all of a data set.
        shares: share of the votes that an image won in its comparison, None for an image with a MOS.
        rule, variance, gamma, eps: see :func:`~vqr1_metric.functional.reward.ranking_reward`.

    Returns:
        Rewards in [0, 1], one for each reply; NaN where no score could be read or the image has no partner.
    """
    one: list[Hashable] = [None] * len(replies)
    sets, within = list(data_sets or one), list(comparisons or one)
    votes = [math.nan if share is None else share for share in shares or [None] * len(replies)]
    rows: dict[tuple[Hashable, Hashable, Hashable], list[int]] = {}
    for i, key in enumerate(zip(sets, within, images, strict=True)):
        rows.setdefault(key, []).append(i)
    scores_BK = torch.full((len(rows), max(map(len, rows.values()), default=1)), torch.nan, dtype=torch.float64)
    for b, indices in enumerate(rows.values()):
        if len({quality[i] for i in indices}) > 1 and math.isnan(votes[indices[0]]):
            raise ValueError(f"Expected one MOS for an image, but got several for {images[indices[0]]!r}.")
        for k, i in enumerate(indices):
            scores_BK[b, k] = parse_reply(replies[i]).score
    first = [indices[0] for indices in rows.values()]
    groups = {key: n for n, key in enumerate(dict.fromkeys((sets[i], within[i]) for i in first))}
    reward_BK = ranking_reward(
        scores_BK,
        torch.tensor([quality[i] for i in first], dtype=torch.float64),
        gamma,
        eps,
        variance,
        rule,
        group_B=torch.tensor([groups[sets[i], within[i]] for i in first]),
        share_B=torch.tensor([votes[i] for i in first], dtype=torch.float64),
    )
    rewards = [math.nan] * len(replies)
    for earned, indices in zip(reward_BK.tolist(), rows.values(), strict=True):
        for k, i in enumerate(indices):
            rewards[i] = earned[k]
    return rewards


class RankingReward:
    """The ranking reward as a TRL reward function.

    It sees the replies of one process, K consecutive ones for each image. Consecutive images form comparison sets.
    With ``scope="global"`` the replies of all processes are gathered first, so that a comparison set may span them and
    the rewards equal those of one process that does the whole batch.

    Args:
        images_per_comparison: images compared with each other.
        num_generations: K.
        scope: ``"process"`` (as the authors) or ``"global"``.
        rule, variance, gamma, eps: see :func:`batch_rewards`.
        on_replies: called with ``(step, rows)`` after each batch; a row tells picture, score, reward, reply.
    """

    __name__ = "ranking"

    def __init__(
        self,
        images_per_comparison: int,
        num_generations: int,
        scope: Scope = "process",
        rule: Rule = "fidelity",
        variance: Variance = "estimated",
        gamma: float = GAMMA,
        eps: float = EPSILON,
        on_replies: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ) -> None:
        if scope not in ("process", "global"):
            raise ValueError(f"Expected scope 'process' or 'global', but got {scope!r}.")
        self.images_per_comparison, self.num_generations, self.scope = images_per_comparison, num_generations, scope
        self.options: dict[str, Any] = {"rule": rule, "variance": variance, "gamma": gamma, "eps": eps}
        self.on_replies = on_replies

    def __call__(
        self,
        completions: Sequence[Reply],
        data_set: Sequence[str],
        quality: Sequence[float],
        share: Sequence[float | None],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        image: Sequence[str] = (),
        **_: Any,
    ) -> list[float | None]:
        texts = [text_of(reply) for reply in completions]
        rows: list[tuple[str, str, float, float | None]] = list(zip(texts, data_set, quality, share, strict=True))
        start, k, size = 0, self.num_generations, self.images_per_comparison
        if self.scope == "global":
            from accelerate import PartialState
            from accelerate.utils import gather_object

            start = PartialState().process_index * len(rows)
            rows = gather_object(rows)
        if len(rows) % (size * k):
            raise ValueError(f"Expected a multiple of {size} pictures x {k} replies, but got {len(rows)} replies.")
        for at in range(0, len(rows), size * k):
            names = sorted({row[1] for row in rows[at : at + size * k]})
            if len(names) > 1:
                raise ValueError(f"Expected a comparison set of one data set, but got {', '.join(names)}.")
        everyone, names_of, quality_of, share_of = zip(*rows, strict=True)
        rewards = batch_rewards(
            everyone,
            [i // k for i in range(len(rows))],
            quality_of,
            names_of,
            comparison_groups([share_of[i] is not None for i in range(0, len(rows), k)], size, k),
            share_of,
            **self.options,
        )
        scores = [parse_reply(text).score for text in texts]
        if log_metric is not None:
            all_scores = torch.tensor([parse_reply(text).score for text in everyone], dtype=torch.float64)
            shape = (-1, size, k)
            each = zip(all_scores.view(shape), torch.tensor(rewards, dtype=torch.float64).view(shape), strict=True)
            for scores_BK, reward_BK in each:
                for name, value in set_metrics(scores_BK, reward_BK).items():
                    if not math.isnan(value):  # the mean over processes and steps would be NaN too
                        log_metric(name, value)
            log_metric("readable", sum(map(math.isfinite, scores)) / len(scores))
        if log_extra is not None:
            log_extra("score", scores)
        mine = rewards[start : start + len(texts)]
        if self.on_replies is not None and trainer_state is not None:
            told = zip(image, data_set, quality, scores, mine, texts, strict=True)
            columns = ("picture", "data_set", "quality", "score", "reward", "reply")
            self.on_replies(trainer_state.global_step, [dict(zip(columns, row, strict=True)) for row in told])
        return [None if math.isnan(reward) else reward for reward in mine]


def text_of(reply: Reply) -> str:
    """The text of a reply, whichever form it has."""
    return reply if isinstance(reply, str) else cast(str, reply[0]["content"])


def comparison_groups(preferred: Sequence[bool], size: int, repeats: int = 1) -> list[int]:
    """Which images are compared: those of one number.

    Args:
        preferred: of each image: is it one of two that were voted on, side by side, rather than rated?
        size: images of a comparison set; consecutive ones form it.
        repeats: how often each image follows itself.
    """
    # A pair's number is its first image, a set's is negative: no two are alike.
    groups = [i - i % 2 if pair else -1 - i // size for i, pair in enumerate(preferred)]
    return [group for group in groups for _ in range(repeats)]


def set_metrics(scores_BK: Tensor, reward_BK: Tensor) -> dict[str, float]:
    """What to watch of a comparison set; NaN where nothing could be read.

    ``fidelity``: mean reward. ``spread``: standard deviation of the pictures' mean scores, which falls to 0 when the
    model says the same of every picture. ``score_std``: mean standard deviation of one picture's scores.
    ``zero_spread``: share of pictures whose replies all earned the same, from which nothing is learnt.
    """
    mean_B = scores_BK.nanmean(1)
    centred = (scores_BK - mean_B[:, None]) ** 2
    count = torch.isfinite(scores_BK).sum(1)
    std_B = (centred.nansum(1) / (count - 1).clamp(min=1)).sqrt()[count > 1]
    seen = mean_B[torch.isfinite(mean_B)]
    low = torch.where(reward_BK.isnan(), torch.inf, reward_BK).amin(1)
    high = torch.where(reward_BK.isnan(), -torch.inf, reward_BK).amax(1)
    return {
        "fidelity": float(reward_BK.nanmean()),
        "spread": float(seen.std()) if len(seen) > 1 else math.nan,
        "score_std": float(std_B.mean()) if len(std_B) else math.nan,
        "zero_spread": float((~(high - low > _NO_SPREAD)).double().mean()),
    }


class FormatReward:
    """1 for a reply of the asked-for form that states a readable score, else 0.

    The form is that of the authors' code: with thinking the two blocks of tags and nothing else, without it the answer
    alone. Unlike theirs, an answer without a score from 1 to 5 earns nothing.

    Args:
        thinking: which of the two questions was asked.
    """

    __name__ = "format"

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking

    def __call__(self, completions: Sequence[Reply], **_: Any) -> list[float]:
        texts = [text_of(reply) for reply in completions]
        return [float(has_form(text, self.thinking) and math.isfinite(parse_reply(text).score)) for text in texts]


def __getattr__(name: str) -> object:
    moved = {"comparison_reward": "ranking_reward", "pair_labels": "comparison_labels"}
    if name in moved:
        raise ImportError(f"{__name__}.{name} of version 0.1.0 is now vqr1_metric.functional.reward.{moved[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
