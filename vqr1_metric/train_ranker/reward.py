"""Rewards of sampled replies: do their scores order the pictures as people do, and have they the asked-for form?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vqr1_metric.functional.fidelity import EPSILON, fidelity, preference_label, ranking_reward
from vqr1_metric.functional.thurstone import GAMMA, comparison_probability
from vqr1_metric.protocol import parse_reply

Scope = Literal["process", "global"]
Rule = Literal["fidelity", "binary", "averaged"]

_THINKING = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_NON_THINKING = re.compile(r"\s*<answer>.*?</answer>", re.DOTALL)
#: Rewards of one picture that differ by less have no spread.
_NO_SPREAD = 1e-6


def comparison_reward(
    scores_BK: Tensor,
    label_BB: Tensor,
    rule: Rule = "fidelity",
    variance: Literal["estimated", "fixed"] = "estimated",
    gamma: float = GAMMA,
    eps: float = EPSILON,
) -> Tensor:
    r"""Reward of each of K scores of B pictures, given who was preferred to whom.

    With ``rule="fidelity"`` and labels made of MOS it equals :func:`~vqr1_metric.functional.fidelity.ranking_reward`.
    The other rules are ablations of VisualQuality-R1 (arXiv 2505.14460):

    - ``"binary"``: 1 where the more probable order is that of the label (equal with equal), else 0.
    - ``"averaged"``: the score is compared with each of the partner's scores, and the probabilities are averaged, in
      place of one comparison with the partner's mean:
      :math:`\hat p_k = \frac1K \sum_l \Phi\big((q_k(x_i) - q_l(x_j)) / \sqrt{\sigma_i^2 + \sigma_j^2 + \gamma}\big)`.

    Args:
        scores_BK: sampled scores, NaN where a reply could not be read; such a reply takes no part and earns NaN.
        label_BB: probability that the row's picture is better than the column's; NaN where they are not compared.
        rule, variance, gamma, eps: see above and ``ranking_reward``.

    Returns:
        Rewards of shape ``(B, K)``, in [0, 1]; NaN where the score is NaN or the picture has no partner.
    """
    readable_BK = torch.isfinite(scores_BK)
    count_B = readable_BK.sum(1)
    filled_BK = torch.where(readable_BK, scores_BK, 0)
    mean_B = filled_BK.sum(1) / count_B.clamp(min=1)
    squares_BK = torch.where(readable_BK, (filled_BK - mean_B[:, None]) ** 2, 0)
    variance_B = torch.ones_like(mean_B) if variance == "fixed" else squares_BK.sum(1) / (count_B - 1).clamp(min=1)

    if rule == "averaged":
        each_BKBK = comparison_probability(
            filled_BK[:, :, None, None], variance_B[:, None, None, None], filled_BK, variance_B[:, None], gamma
        )
        predicted_BKB = torch.where(readable_BK, each_BKBK, 0).sum(-1) / count_B.clamp(min=1)
    else:
        predicted_BKB = comparison_probability(
            filled_BK[:, :, None], variance_B[:, None, None], mean_B, variance_B, gamma
        )
    partner_BB = torch.isfinite(label_BB) & (count_B > 0)[None, :]
    label_BKB = torch.where(partner_BB, label_BB, 0.5)[:, None, :].to(predicted_BKB.dtype)
    if rule == "binary":
        earned_BKB = (torch.sign(predicted_BKB - 0.5) == torch.sign(label_BKB - 0.5)).to(predicted_BKB.dtype)
    else:
        earned_BKB = fidelity(predicted_BKB, label_BKB, eps)
    partners_B = partner_BB.sum(1)
    reward_BK = torch.where(partner_BB[:, None, :], earned_BKB, 0).sum(-1) / partners_B.clamp(min=1)[:, None]
    return torch.where(readable_BK & (partners_B > 0)[:, None], reward_BK, torch.nan)


def pair_labels(share_B: Tensor) -> Tensor:
    """Labels of a comparison set of preferences: rows 0 and 1 are a pair, 2 and 3, ...; shape ``(B, B)``."""
    label = torch.full((len(share_B), len(share_B)), torch.nan, dtype=share_B.dtype)
    rows = torch.arange(len(share_B))
    label[rows, rows ^ 1] = share_B
    return label


class RankingReward:
    """The ranking reward as a TRL reward function.

    It sees the replies of one process, K consecutive ones for each picture. Consecutive pictures form comparison sets.
    With ``scope="global"`` the scores of all processes are gathered first, so that a comparison set may span them and
    the rewards equal those of one process that does the whole batch.

    Args:
        images_per_comparison: pictures compared with each other.
        num_generations: K.
        scope: ``"process"`` (as the authors) or ``"global"``.
        rule, variance, gamma, eps: see :func:`comparison_reward`.
        on_replies: called with ``(step, rows)`` after each batch; a row tells picture, score, reward, reply.
    """

    __name__ = "ranking"

    def __init__(
        self,
        images_per_comparison: int,
        num_generations: int,
        scope: Scope = "process",
        rule: Rule = "fidelity",
        variance: Literal["estimated", "fixed"] = "estimated",
        gamma: float = GAMMA,
        eps: float = EPSILON,
        on_replies: Callable[[int, list[dict]], None] | None = None,
    ) -> None:
        if scope not in ("process", "global"):
            raise ValueError(f"Expected scope 'process' or 'global', but got {scope!r}.")
        self.images_per_comparison, self.num_generations = images_per_comparison, num_generations
        self.scope, self.rule, self.variance, self.gamma, self.eps = scope, rule, variance, gamma, eps
        self.on_replies = on_replies

    def __call__(
        self,
        completions,
        data_set: Sequence[str],
        quality: Sequence[float],
        share: Sequence[float | None],
        log_metric=None,
        log_extra=None,
        trainer_state=None,
        image: Sequence[str] = (),
        **_,
    ) -> list[float | None]:
        texts = [reply[0]["content"] if isinstance(reply, list) else reply for reply in completions]
        scores = [parse_reply(text).score for text in texts]
        rows = list(zip(scores, data_set, quality, [math.nan if s is None else s for s in share], strict=True))
        start = 0
        if self.scope == "global":
            from accelerate import PartialState
            from accelerate.utils import gather_object

            start = PartialState().process_index * len(rows)
            rows = gather_object(rows)
        per_set = self.images_per_comparison * self.num_generations
        if len(rows) % per_set:
            raise ValueError(
                f"Expected a multiple of {self.images_per_comparison} pictures x {self.num_generations} replies, but "
                f"got {len(rows)} replies."
            )
        rewards = torch.cat([self._one_set(rows[i : i + per_set], log_metric) for i in range(0, len(rows), per_set)])
        rewards = rewards[start : start + len(texts)].tolist()
        if log_metric is not None:
            log_metric("readable", sum(map(math.isfinite, scores)) / len(scores))
        if log_extra is not None:
            log_extra("score", scores)
        if self.on_replies is not None and trainer_state is not None:
            told = zip(image, data_set, quality, scores, rewards, texts, strict=True)
            names = ("picture", "data_set", "quality", "score", "reward", "reply")
            self.on_replies(trainer_state.global_step, [dict(zip(names, row, strict=True)) for row in told])
        return [None if math.isnan(reward) else reward for reward in rewards]

    def _one_set(self, rows: Sequence[tuple], log_metric) -> Tensor:
        """Rewards of one comparison set, flat."""
        scores, names, quality, share = zip(*rows, strict=True)
        if len(set(names)) > 1:
            raise ValueError(f"Expected a comparison set of one data set, but got {', '.join(sorted(set(names)))}.")
        k = self.num_generations
        scores_BK = torch.tensor(scores, dtype=torch.float64).view(-1, k)
        share_B = torch.tensor(share[::k], dtype=torch.float64)
        options = {"variance": self.variance, "gamma": self.gamma, "eps": self.eps}
        if bool(torch.isfinite(share_B).all()):
            reward_BK = comparison_reward(scores_BK, pair_labels(share_B), self.rule, **options)
        else:
            mos_B = torch.tensor(quality[::k], dtype=torch.float64)
            if self.rule == "fidelity":
                reward_BK = ranking_reward(scores_BK, mos_B, **options)
            else:
                label_BB = preference_label(mos_B[:, None], mos_B[None, :])
                label_BB[torch.eye(len(mos_B), dtype=torch.bool)] = torch.nan
                reward_BK = comparison_reward(scores_BK, label_BB, self.rule, **options)
        if log_metric is not None:
            for name, value in set_metrics(scores_BK, reward_BK).items():
                if not math.isnan(value):  # the mean over processes and steps would be NaN too
                    log_metric(name, value)
        return reward_BK.flatten()


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

    The form is ``<think>...</think> <answer>...</answer>`` over the whole reply, as in the authors' code; without
    thinking ``<answer>...</answer>``. Unlike theirs, an answer without a score from 1 to 5 earns nothing.

    Args:
        thinking: which of the two questions was asked.
    """

    __name__ = "format"

    def __init__(self, thinking: bool) -> None:
        self.form = _THINKING if thinking else _NON_THINKING

    def __call__(self, completions, **_) -> list[float]:
        texts = [reply[0]["content"] if isinstance(reply, list) else reply for reply in completions]
        return [
            float(self.form.fullmatch(text) is not None and math.isfinite(parse_reply(text).score)) for text in texts
        ]
