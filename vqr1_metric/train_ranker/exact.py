r"""RL2R without sampling: the expectation over replies in closed form, through the one-pass readout; and distillation.

For the non-thinking question one forward pass gives the probability of every score, so the policy's replies are 402
outcomes: the 401 scores of the grid, and "not readable". The expected reward over them, its mean and spread, and the
means and variances of the Thurstone model are then exact; there are no K replies and no noise of the group.

Shape suffixes: B images, N possible partners, S the 401 scores, O the 402 outcomes.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
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
from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.base import RankerBase, TrainingRows, common_arguments, made
from vqr1_metric.train_ranker.checks import ConfigError
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.distill import distill_loss
from vqr1_metric.train_ranker.policy import base_model, load_policy, lora_config
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.reward import comparison_groups
from vqr1_metric.train_ranker.sampler import ComparisonSampler

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
    readable = readable_share(distribution)
    return torch.cat([distribution.probabilities * readable[:, None], (1 - readable)[:, None]], dim=1)


def readable_share(distribution: ScoreDistribution) -> Tensor:
    """Probability that a reply opens with the tag and states a score, ``(B,)``."""
    assert distribution.coverage is not None and distribution.tag_probability is not None
    return (distribution.coverage * distribution.tag_probability).clamp(max=1)


def expected_loss(
    outcome_BO: Tensor, reward_BS: Tensor, format_weight: float, *, through_rewards: bool, normalise: bool = True
) -> Tensor:
    r"""Minus the expected reward of each image, with the gradient of the sampled objective for infinitely many replies.

    A readable outcome earns its ranking reward plus ``format_weight``, the unreadable one nothing.

    Args:
        outcome_BO: see :func:`outcomes`.
        reward_BS: see :func:`score_rewards`.
        format_weight: what a readable reply earns beside.
        through_rewards: let the gradient pass through the rewards too (the direct gradient of the expected fidelity);
            otherwise they are constants, as in RL2R, and count by their advantage.
        normalise: divide the advantages by their standard deviation.

    Returns:
        Shape ``(B,)``.
    """
    reward_BO = torch.cat([reward_BS + format_weight, reward_BS.new_zeros(len(reward_BS), 1)], dim=1)
    if through_rewards:
        return -(outcome_BO * reward_BO).sum(1)
    with torch.no_grad():
        advantage_BO = reward_BO - (outcome_BO * reward_BO).sum(1, keepdim=True)
        if normalise:
            spread = (outcome_BO * advantage_BO**2).sum(1, keepdim=True).sqrt()
            advantage_BO = advantage_BO / (spread + ADVANTAGE_EPSILON)
    return -(outcome_BO * advantage_BO).sum(1)


def outcome_kl(of_BO: Tensor, from_BO: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(of || from) between outcomes, in nats, ``(B,)``."""
    tiny = torch.finfo(of_BO.dtype).tiny
    ratio = of_BO.clamp(min=tiny).log() - from_BO.clamp(min=tiny).log()
    return (of_BO * ratio).sum(1)


def labels(rows: Sequence[dict[str, Any]], images_per_comparison: int) -> Tensor:
    """Who is better than whom, ``(N, N)``, for rows that form consecutive comparison sets; NaN where not compared."""
    groups = comparison_groups([row["share"] is not None for row in rows], images_per_comparison)
    shares = [math.nan if row["share"] is None else row["share"] for row in rows]
    quality = torch.tensor([row["quality"] for row in rows], dtype=torch.float64)
    return comparison_labels(quality, torch.tensor(groups), torch.tensor(shares, dtype=torch.float64)).float()


class _Rows(Dataset[dict[str, Any]]):
    """Training rows with their pixels, and what the teacher says of them if one does."""

    def __init__(self, training: TrainingRows) -> None:
        self.training = training

    def __len__(self) -> int:
        return len(self.training.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.training.rows[index]
        picture = self.training.pictures[int(row["image"])]
        taught = getattr(picture, "distribution", None)
        return {**row, "pixels": load_image(picture.read(), picture.name), "taught": taught}


class ExactRankerTrainer(RankerBase, Trainer):
    """Trains through the readout; objective ``"exact"``, ``"fidelity"`` or ``"distill"``, see :func:`expected_loss`.

    Runs in one process or under DDP. A step's pictures go through the model in micro batches; with more than one, the
    loss is taken on the distributions of all of them and brought back into each (two forward passes).
    With ``comparison_scope="global"`` partners of other processes count as constants.

    Args:
        model, args, train_dataset, eval_dataset, peft_config, optimizers, callbacks: as for
            :class:`~vqr1_metric.train_ranker.trainer.RankerTrainer`.
    """

    def __init__(
        self,
        model: str | LoadedModel | None = None,
        args: RankerConfig | None = None,
        train_dataset: Sequence[RatingSet] | RatingSet | str | Path | Sequence[str | Path] | None = None,
        eval_dataset: Sequence[RatingSet] | RatingSet | str | Path | Sequence[str | Path] | None = None,
        peft_config: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] = (),
    ) -> None:
        config = self.take(model, args, train_dataset, eval_dataset)
        settings = exact_arguments(config, self.validation)
        self.loaded = model if isinstance(model, LoadedModel) else load_policy(config)
        policy: Any = self.loaded.model
        if peft_config is None and config.lora_rank:
            peft_config = lora_config(config)
        self.reference: TransformersBackend | None = None
        if config.kl_weight and peft_config is None:
            self.reference = self._backend(copy.deepcopy(policy).requires_grad_(False).eval())
        backend = self._backend(policy)
        pixel_config = self.loaded.pixel_config.with_limits(config.min_pixels, config.max_pixels)
        self._pixel_config = pixel_config
        # Spellings are chosen now, by the start model, so that a resumed run chooses the same.
        backend.trie  # noqa: B018

        def readout(images: Sequence[Tensor], **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return parts_of(backend.distributions(images, pixel_config))

        # DDP synchronises the gradients of what its forward computes, so the readout becomes the model's forward.
        policy.forward = readout
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(config.seed)  # the adapter starts at random
            policy = get_peft_model(policy, peft_config)
        self._figures: dict[str, list[float]] = defaultdict(list)
        validate = any(len(s) for s in self.validation)
        super().__init__(
            model=policy,
            args=settings,
            data_collator=as_list,
            train_dataset=_Rows(self.training),
            eval_dataset=_Rows(self.training) if validate else None,
            processing_class=RankerProcessor(self.loaded, self.training.pictures, pixel_config),
            optimizers=optimizers,
            callbacks=[self.guard, self.checkpoints, *callbacks],
        )

    def _backend(self, model: torch.nn.Module) -> TransformersBackend:
        loaded = LoadedModel(
            model, self.loaded.tokenizer, self.loaded.pixel_config, self.loaded.chat_template, self.loaded.revision
        )
        return TransformersBackend(ModelSpec(self.ranker.model), loaded)

    def train_order(self) -> ComparisonSampler:
        """Each picture once."""
        return self.comparison_sampler(repeats=1, batch_repeats=1)

    def training_step(  # type: ignore[override]  # rows, not a batch of tensors
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward, loss and backward of ``images_per_device`` pictures; accumulated steps add up to a mean."""
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
        probabilities, coverage, tag_probability = leaves
        loss = self._loss(model, ScoreDistribution(probabilities, coverage, tag_probability), inputs)
        gradients = torch.autograd.grad(loss, leaves)
        for i, chunk in enumerate(chunks):
            part = slice(i * size, (i + 1) * size)
            with self.accelerator.no_sync(model) if i + 1 < len(chunks) else torch.enable_grad():
                outputs = model(images=chunk)
                pulled = sum((out * grad[part]).sum() for out, grad in zip(outputs, gradients, strict=True))
                self.accelerator.backward(pulled)
        return loss.detach()

    def _loss(self, model: torch.nn.Module, distribution: ScoreDistribution, rows: list[dict[str, Any]]) -> Tensor:
        config = self.ranker
        outcome_BO = outcomes(distribution)
        taught = [i for i, row in enumerate(rows) if row["taught"] is not None]
        loss_B = self._ranking_loss(distribution, outcome_BO, rows)
        if config.objective == "distill":
            loss_B = config.rating_weight * loss_B
        if taught:
            target = torch.stack([rows[i]["taught"] for i in taught]).to(outcome_BO)
            index = torch.tensor(taught, device=loss_B.device)
            learnt = distill_loss(outcome_BO[index], target, config.distill_loss)
            loss_B = loss_B.index_copy(0, index, learnt)
            self._figures["distill"].append(float(learnt.detach().mean()))
        if config.kl_weight:
            start_BO = self._reference_outcomes(model, [row["pixels"] for row in rows])
            pair = (start_BO, outcome_BO) if config.kl_direction == "forward" else (outcome_BO, start_BO)
            divergence = outcome_kl(*pair)
            loss_B = loss_B + config.kl_weight * divergence
            self._figures["kl"].append(float(divergence.detach().mean()))
        with torch.no_grad():
            self._figures["spread"].append(float(distribution.mean.std()))
            self._figures["score_std"].append(float(distribution.std.mean()))
            self._figures["readable"].append(float(readable_share(distribution).mean()))
        steps: int = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return loss_B.mean() / steps

    def _ranking_loss(self, distribution: ScoreDistribution, outcome_BO: Tensor, rows: list[dict[str, Any]]) -> Tensor:
        """Minus the expected reward of each image, ``(B,)``."""
        config = self.ranker
        everyone, start = rows, 0
        mean_N, variance_N = distribution.mean, distribution.variance
        if config.comparison_scope == "global" and self.args.world_size > 1:
            from accelerate.utils import gather_object

            start = self.args.process_index * len(rows)
            everyone = gather_object([{"quality": row["quality"], "share": row["share"]} for row in rows])
            mean_N, variance_N = (self._with_others(values, start) for values in (mean_N, variance_N))
        size = config.comparison_size(self.args.world_size)
        label_BN = labels(everyone, size)[start : start + len(rows)].to(mean_N.device)
        rewards = score_rewards(distribution, mean_N, variance_N, label_BN, config.gamma, config.eps)
        self._figures["fidelity"].append(float((distribution.probabilities * rewards).sum(1).mean().detach()))
        return expected_loss(
            outcome_BO,
            rewards,
            config.format_weight,
            through_rewards=config.objective != "exact",
            normalise=config.scale_rewards != "none",
        )

    def _with_others(self, values: Tensor, start: int) -> Tensor:
        """The values of all processes, this process's own with their graph."""
        everyone = self.accelerator.gather(values.detach())
        return torch.cat([everyone[:start], values, everyone[start + len(values) :]])

    def _reference_outcomes(self, model: torch.nn.Module, images: list[Tensor]) -> Tensor:
        with torch.no_grad():
            if self.reference is not None:
                backend = self.reference
                return outcomes(self._in_parts(lambda part: backend.distributions(part, self._pixel_config), images))
            unwrapped = self.accelerator.unwrap_model(model)
            with unwrapped.disable_adapter():
                forward = base_model(unwrapped).forward
                return outcomes(self._in_parts(lambda part: ScoreDistribution(*forward(images=part)), images))

    def _in_parts(
        self, distributions: Callable[[list[Tensor]], ScoreDistribution], images: list[Tensor]
    ) -> ScoreDistribution:
        size = min(self.ranker.micro_batch, len(images))
        parts = [parts_of(distributions(images[i : i + size])) for i in range(0, len(images), size)]
        probabilities, coverage, tag_probability = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return ScoreDistribution(probabilities, coverage, tag_probability)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the figures of the steps since the last log, as means over them and over all processes."""
        if self.model.training and self._figures:
            names = sorted(self._figures)
            means = [math.fsum(self._figures[name]) / len(self._figures[name]) for name in names]
            every = self.accelerator.gather(torch.tensor([means], dtype=torch.float64, device=self.args.device))
            logs = {**logs, **dict(zip(names, every.mean(0).tolist(), strict=True))}
            self._figures.clear()
        super().log(logs, *args, **kwargs)


def as_list(rows: list[dict[str, Any]]) -> Any:
    """A batch is its rows."""
    return rows


def parts_of(distribution: ScoreDistribution) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of a distribution."""
    assert distribution.coverage is not None and distribution.tag_probability is not None
    return distribution.probabilities, distribution.coverage, distribution.tag_probability


def exact_arguments(config: RankerConfig, validation: Sequence[RatingSet] = ()) -> TrainingArguments:
    """The settings as transformers'.

    Raises:
        ConfigError: sharded parameters, or what transformers complain about.
    """
    settings = {**common_arguments(config, validation), "per_device_train_batch_size": config.images_per_device}
    args: TrainingArguments = made(TrainingArguments, settings, config)
    if args.deepspeed or args.fsdp:
        raise ConfigError(
            f"Expected one process or DDP with objective={config.objective!r}, but got DeepSpeed or FSDP."
        )
    return args
