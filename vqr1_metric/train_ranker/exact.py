r"""RL2R without sampling: the expectation over replies in closed form, through the one-pass readout.

For the non-thinking question one forward pass gives the probability of every score, so the policy's replies are 402
outcomes: the 401 scores of the grid, and "not readable". The expected reward over them, its mean and spread, and the
means and variances of the Thurstone model are then exact; there are no K replies and no noise of the group.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from vqr1_metric.backends.loading import LoadedModel, ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.functional.reward import comparison_labels, partner_mean
from vqr1_metric.functional.thurstone import comparison_probability
from vqr1_metric.images import load_image
from vqr1_metric.train_ranker.base import RankerBase, TrainingRows, common_arguments
from vqr1_metric.train_ranker.callbacks import CollapseStop
from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.policy import base_model, load_policy, lora_config
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.ratings import RatingSet
from vqr1_metric.train_ranker.reward import comparison_groups

#: Added to the standard deviation of the reward, as in the sampled objective.
ADVANTAGE_EPSILON = 1e-4


def score_rewards(
    distribution: ScoreDistribution, mean_N: Tensor, variance_N: Tensor, label_BN: Tensor, gamma: float, eps: float
) -> Tensor:
    r"""Fidelity reward of every score of the grid, ``(B, 401)``; 0 for an image without a partner.

    .. math:: r(x_i, s) = \frac{1}{|J_i|} \sum_{j \in J_i} \mathrm{fidelity}\Big(
        \Phi\Big(\frac{s - \mu_j}{\sqrt{\sigma_i^2 + \sigma_j^2 + \gamma}}\Big), p(x_i, x_j)\Big)

    Args:
        distribution: of B images.
        mean_N, variance_N: exact means and variances of the possible partners, shape ``(N,)``.
        label_BN: probability that image i is better than partner j, NaN where they are not compared.
        gamma, eps: as in :func:`~vqr1_metric.functional.reward.ranking_reward`.
    """
    predicted_BSN = comparison_probability(
        distribution.grid[None, :, None], distribution.variance[:, None, None], mean_N, variance_N, gamma
    )
    return partner_mean(predicted_BSN, label_BN, eps=eps).nan_to_num(nan=0.0)


def outcomes(distribution: ScoreDistribution) -> Tensor:
    """Probabilities of the 402 outcomes, ``(B, 402)``: each score, then "not readable"."""
    readable = (distribution.coverage * distribution.tag_probability).clamp(max=1)
    return torch.cat([distribution.probabilities * readable[:, None], (1 - readable)[:, None]], dim=1)


def expected_loss(
    outcome_BO: Tensor, reward_BS: Tensor, format_weight: float, *, through_rewards: bool, normalise: bool = True
) -> Tensor:
    r"""Minus the expected reward, a scalar with the gradient of the sampled objective for infinitely many replies.

    A readable outcome earns its ranking reward plus ``format_weight``, the unreadable one nothing.

    Args:
        outcome_BO: see :func:`outcomes`.
        reward_BS: see :func:`score_rewards`.
        through_rewards: let the gradient pass through the rewards too (the direct gradient of the expected fidelity);
            otherwise they are constants, as in RL2R, and count by their advantage.
        normalise: divide the advantages by their standard deviation.
    """
    reward_BO = torch.cat([reward_BS + format_weight, reward_BS.new_zeros(len(reward_BS), 1)], dim=1)
    if through_rewards:
        return -(outcome_BO * reward_BO).sum(1).mean()
    with torch.no_grad():
        advantage_BO = reward_BO - (outcome_BO * reward_BO).sum(1, keepdim=True)
        if normalise:
            spread = (outcome_BO * advantage_BO**2).sum(1, keepdim=True).sqrt()
            advantage_BO = advantage_BO / (spread + ADVANTAGE_EPSILON)
    return -(outcome_BO * advantage_BO).sum(1).mean()


def outcome_kl(outcome_BO: Tensor, reference_BO: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the outcomes from those of the start model, in nats."""
    tiny = torch.finfo(outcome_BO.dtype).tiny
    ratio = outcome_BO.clamp(min=tiny).log() - reference_BO.clamp(min=tiny).log()
    return (outcome_BO * ratio).sum(1).mean()


def labels(rows: Sequence[dict[str, Any]], images_per_comparison: int) -> Tensor:
    """Who is better than whom, ``(N, N)``, for rows that form consecutive comparison sets; NaN where not compared."""
    groups = comparison_groups([row["share"] is not None for row in rows], images_per_comparison)
    shares = [math.nan if row["share"] is None else row["share"] for row in rows]
    quality = torch.tensor([row["quality"] for row in rows], dtype=torch.float64)
    return comparison_labels(quality, torch.tensor(groups), torch.tensor(shares, dtype=torch.float64)).float()


class _Rows(Dataset):
    """Training rows with their pixels."""

    def __init__(self, training: TrainingRows) -> None:
        self.training = training

    def __len__(self) -> int:
        return len(self.training.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.training.rows[index]
        picture = self.training.pictures[int(row["image"])]
        return {**row, "pixels": load_image(picture.read(), picture.name)}


class ExactRankerTrainer(RankerBase, Trainer):
    """Trains through the readout; objective ``"exact"`` or ``"fidelity"``, see :func:`expected_loss`.

    Runs in one process or under DDP. A step's pictures go through the model in micro batches; with more than one, the
    loss is taken on the distributions of all of them and brought back into each (two forward passes).
    With ``comparison_scope="global"`` partners of other processes count as constants.

    Args:
        config, train, validation, loaded, callbacks: as for :class:`~vqr1_metric.train_ranker.trainer.RankerTrainer`.
    """

    def __init__(
        self,
        config: RankerConfig,
        train: Sequence[RatingSet],
        validation: Sequence[RatingSet] = (),
        loaded: LoadedModel | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.ranker, self.train_sets, self.validation = config, list(train), list(validation)
        self.training = TrainingRows.of(train)
        validate = any(len(s) for s in validation)
        settings = {**common_arguments(config, validate), "per_device_train_batch_size": config.images_per_device}
        args = TrainingArguments(**{**settings, **config.trainer})
        if args.deepspeed or args.fsdp:
            raise ConfigError("Expected one process or DDP with objective='exact', but got DeepSpeed or FSDP.")
        self.loaded = loaded or load_policy(config)
        model = self.loaded.model
        self.reference = None
        if config.kl_weight and not config.lora_rank:
            self.reference = self._backend(copy.deepcopy(model).requires_grad_(False).eval())
        backend = self._backend(model)
        pixel_config = self.loaded.pixel_config.with_limits(config.min_pixels, config.max_pixels)
        self._pixel_config = pixel_config
        # Spellings are chosen now, by the start model, so that a resumed run chooses the same.
        backend.trie  # noqa: B018

        def readout(images=None, **_):
            distribution = backend.distributions(images, pixel_config)
            return distribution.probabilities, distribution.coverage, distribution.tag_probability

        # DDP synchronises the gradients of what its forward computes, so the readout becomes the model's forward.
        model.forward = readout
        if config.lora_rank:
            from peft import get_peft_model

            set_seed(config.seed)  # the adapter starts at random
            model = get_peft_model(model, lora_config(config))
        self.collapse = CollapseStop(config.collapse_spread, config.collapse_patience)
        self._figures: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=_Rows(self.training),
            eval_dataset=_Rows(self.training) if validate else None,
            processing_class=RankerProcessor(self.loaded, self.training.pictures, pixel_config),
            callbacks=[self.collapse, *callbacks],
        )

    def _backend(self, model: torch.nn.Module) -> TransformersBackend:
        loaded = LoadedModel(
            model, self.loaded.tokenizer, self.loaded.pixel_config, self.loaded.chat_template, self.loaded.revision
        )
        return TransformersBackend(ModelSpec(self.ranker.model), loaded)

    def _get_train_sampler(self, train_dataset=None):
        return self.comparison_sampler(repeats=1, batch_repeats=1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One step: forward, loss and backward of ``images_per_device`` pictures."""
        model.train()
        images = [row["pixels"] for row in inputs]
        size = min(self.ranker.micro_batch, len(images))
        chunks = [images[i : i + size] for i in range(0, len(images), size)]
        if len(chunks) == 1:
            loss = self._loss(model, ScoreDistribution(*model(images=images)), inputs)
            self.accelerator.backward(loss)
            return loss.detach()
        with torch.no_grad():
            parts = [model(images=chunk) for chunk in chunks]
        leaves = [torch.cat(tensors).requires_grad_() for tensors in zip(*parts, strict=True)]
        loss = self._loss(model, ScoreDistribution(*leaves), inputs)
        gradients = torch.autograd.grad(loss, leaves)
        for i, chunk in enumerate(chunks):
            part = slice(i * size, (i + 1) * size)
            with self.accelerator.no_sync(model) if i + 1 < len(chunks) else torch.enable_grad():
                outputs = model(images=chunk)
                pulled = sum((out * grad[part]).sum() for out, grad in zip(outputs, gradients, strict=True))
                self.accelerator.backward(pulled)
        return loss.detach()

    def _loss(self, model, distribution: ScoreDistribution, rows: list[dict[str, Any]]) -> Tensor:
        config = self.ranker
        everyone, start = rows, 0
        mean_N, variance_N = distribution.mean, distribution.variance
        if config.comparison_scope == "global" and self.args.world_size > 1:
            from accelerate.utils import gather_object

            start = self.args.process_index * len(rows)
            told = [{"quality": row["quality"], "share": row["share"]} for row in rows]
            everyone = gather_object(told)
            mean_N, variance_N = (self._with_others(values, start) for values in (mean_N, variance_N))
        size = config.comparison_size(self.args.world_size)
        label_BN = labels(everyone, size)[start : start + len(rows)].to(mean_N.device)
        rewards = score_rewards(distribution, mean_N, variance_N, label_BN, config.gamma, config.eps)
        outcome_BO = outcomes(distribution)
        loss = expected_loss(
            outcome_BO,
            rewards,
            config.format_weight,
            through_rewards=config.objective == "fidelity",
            normalise=config.scale_rewards != "none",
        )
        if config.kl_weight:
            divergence = outcome_kl(outcome_BO, self._reference_outcomes(model, [row["pixels"] for row in rows]))
            loss = loss + config.kl_weight * divergence
            self._figures["kl"].append(float(divergence.detach()))
        with torch.no_grad():
            self._figures["fidelity"].append(float((distribution.probabilities * rewards).sum(1).mean()))
            self._figures["spread"].append(float(distribution.mean.std()))
            self._figures["score_std"].append(float(distribution.std.mean()))
            self._figures["readable"].append(float((distribution.coverage * distribution.tag_probability).mean()))
        return loss

    def _with_others(self, values: Tensor, start: int) -> Tensor:
        """The values of all processes, this process's own with their graph."""
        everyone = self.accelerator.gather(values.detach())
        return torch.cat([everyone[:start], values, everyone[start + len(values) :]])

    def _reference_outcomes(self, model, images: list[Tensor]) -> Tensor:
        with torch.no_grad():
            if self.reference is not None:
                return outcomes(
                    self._in_parts(lambda part: self.reference.distributions(part, self._pixel_config), images)
                )
            unwrapped = self.accelerator.unwrap_model(model)
            with unwrapped.disable_adapter():
                forward = base_model(unwrapped).forward
                return outcomes(self._in_parts(lambda part: ScoreDistribution(*forward(images=part)), images))

    def _in_parts(self, distributions, images: list[Tensor]) -> ScoreDistribution:
        size = min(self.ranker.micro_batch, len(images))
        parts = [distributions(images[i : i + size]) for i in range(0, len(images), size)]
        names = ("probabilities", "coverage", "tag_probability")
        return ScoreDistribution(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.model.training and self._figures:
            logs = {**logs, **{name: math.fsum(v) / len(v) for name, v in self._figures.items()}}
            self._figures.clear()
        super().log(logs, *args, **kwargs)
