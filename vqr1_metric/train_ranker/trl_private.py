"""Every private name of transformers and TRL that the trainers use, with why; a release that changes one is named.

They change from one release to the next. :func:`check_names` compares them with what is installed when the trainers are
imported, so that a change is an error that says what changed and not a run that goes wrong.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from vqr1_metric.train_ranker.policy import load_checkpoint

#: Of transformers' Trainer: name -> parameters that are relied on.
TRAINER_NAMES = {
    "_get_train_sampler": ("self", "train_dataset"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
}
#: Of TRL's GRPOTrainer.
GRPO_NAMES = {
    "_get_train_sampler": ("self", "dataset"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
}
#: Keys of TRL's batch of replies that the filter changes.
BATCH_KEYS = ("advantages", "completion_mask", "num_items_in_batch")
#: Advantages of a group are this small where its replies all earned the same.
_NO_ADVANTAGE = 1e-6


def check_names(cls: type, names: dict[str, tuple[str, ...]], package: str) -> None:
    """Complain if a class has not these methods with these parameters.

    Raises:
        ImportError: which one changed, and what to install.
    """
    for name, parameters in names.items():
        method = getattr(cls, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if found != parameters:
            changed = "is gone" if method is None else f"takes {', '.join(found)} instead of {', '.join(parameters)}"
            raise ImportError(
                f"{package} {version(package)} changed a private method that this trainer overrides: {cls.__name__}."
                f"{name} {changed}. Install a release that pip install 'vqr1-metric[train]' allows."
            )


check_names(Trainer, TRAINER_NAMES, "transformers")


class StrictLoading:
    """Mixed into a Trainer: every tensor of a checkpoint must be there.

    transformers' own resuming goes by the names in the file with ``strict=False``, and those are not the model's for
    Qwen-VL (huggingface/transformers#43701): it would load next to nothing and say so in a log line.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]  # by the live model's names
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            load_checkpoint(self.model if model is None else model, resume_from_checkpoint)  # type: ignore[attr-defined]

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]
        else:
            load_checkpoint(self.model, self.state.best_model_checkpoint)  # type: ignore[attr-defined]


class OwnOrder:
    """Mixed into a Trainer: the order of the rows is :meth:`train_order`'s."""

    def train_order(self) -> torch.utils.data.Sampler[int]:
        """The sampler of the training rows."""
        raise NotImplementedError

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return self.train_order()


class ZeroSpreadFilter:
    """Mixed into TRL's GRPOTrainer: with ``drops_zero_spread`` groups that all earned the same leave the loss."""

    drops_zero_spread = False
    _kept = 1.0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.drops_zero_spread:
            self._kept = drop_zero_spread(
                output,
                self.num_generations,  # type: ignore[attr-defined]
                self.accelerator.gather,  # type: ignore[attr-defined]
            )
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        # These two divide by the number of replies, dropped or not; the others by the tokens that are left.
        divides = self.args.loss_type in ("grpo", "dr_grpo")  # type: ignore[attr-defined]
        return loss / self._kept if divides and self._kept else loss


def drop_zero_spread(batch: dict[str, Any], num_generations: int, gather: Any = lambda values: values) -> float:
    """Take replies out of the loss, KL penalty included, whose group all earned the same; in place.

    Args:
        batch: what TRL makes of a generation batch, the K replies of a picture one after the other.
        num_generations: K.
        gather: joins the values of all processes.

    Returns:
        The share of replies that are left, over all processes.
    """
    kept = batch["advantages"].view(-1, num_generations).abs().amax(1) > _NO_ADVANTAGE
    kept = kept.repeat_interleave(num_generations)
    batch["completion_mask"] = batch["completion_mask"] * kept[:, None]
    batch["num_items_in_batch"] = gather(batch["completion_mask"].sum()).sum().clamp(min=1)
    return float(gather(kept.float()).mean())
