"""What both trainers share: the order of pictures, strict loading, validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vqr1_metric.backends.loading import LoadedModel
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.policy import base_model, load_checkpoint
from vqr1_metric.train_ranker.ratings import RatedPicture, RatingSet
from vqr1_metric.train_ranker.sampler import ComparisonSampler
from vqr1_metric.train_ranker.validation import score_shard, validation_metrics


@dataclass(frozen=True)
class TrainingRows:
    """Training pictures as rows: a rated picture is one row, a preference two (its winner and its loser).

    Args:
        rows: ``image`` (index into ``pictures``, as text), ``data_set``, ``quality`` (0 for a preference), ``share``
            (share of the votes won, None for a rating).
        units: for each data set its units, each the indices of one or two rows.
        pictures: what ``image`` refers to.
    """

    rows: list[dict[str, Any]]
    units: list[list[tuple[int, ...]]]
    pictures: list[RatedPicture]

    @classmethod
    def of(cls, sets: Sequence[RatingSet]) -> TrainingRows:
        """The rows of several data sets."""
        rows, units, pictures = [], [], []

        def add(s: RatingSet, picture: int, quality: float, share: float | None) -> int:
            rows.append({"image": str(offset + picture), "data_set": s.name, "quality": quality, "share": share})
            return len(rows) - 1

        for s in sets:
            offset = len(pictures)
            pictures += s.pictures
            if s.preferences:
                units.append([(add(s, p.a, 0.0, p.share), add(s, p.b, 0.0, 1 - p.share)) for p in s.preferences])
            else:
                units.append([(add(s, i, quality, None),) for i, quality in enumerate(s.quality)])
        return cls(rows, units, pictures)


def common_arguments(config: RankerConfig, validate: bool) -> dict[str, Any]:
    """The settings under the names of ``transformers.TrainingArguments``, for both trainers."""
    on_gpu = torch.cuda.is_available()
    # transformers 5.19 renamed it, and warns of the old name.
    known = {f.name for f in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if "tensorboard" in config.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.output_dir) / "logs"))
    return {
        "output_dir": config.output_dir,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        checkpointing: config.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "eval_strategy": "steps" if validate else "no",
        "eval_steps": config.eval_steps if validate else None,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "report_to": config.report_to or "none",
        "remove_unused_columns": False,
        "seed": config.seed,
    }


class RankerBase:
    """Mixed into a ``transformers.Trainer``; ``ranker``, ``loaded``, ``validation`` and ``training`` are set before."""

    ranker: RankerConfig
    loaded: LoadedModel
    validation: Sequence[RatingSet]
    training: TrainingRows
    #: Validation figures of the start model, which the log of a run does not hold.
    start_figures: dict[str, float] | None = None

    #: What the cold start began with, if there was one.
    start_model: str | None = None

    def comparison_sampler(self, repeats: int, batch_repeats: int) -> ComparisonSampler:
        """The order of the training rows for this number of processes."""
        world = self.args.world_size
        size = self.ranker.comparison_size(world)
        return ComparisonSampler(
            self.training.units,
            size,
            self.ranker.images_per_device * world // size,
            repeats,
            batch_repeats,
            self.ranker.mixing,
            self.args.seed,
        )

    def create_model_card(self, *_, **__) -> None:
        """Nothing here: :mod:`~vqr1_metric.train_ranker.card` writes the card, with validation figures."""

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            from vqr1_metric.train_ranker.card import write_card

            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if folder.is_dir():
                write_card(folder, self.ranker, self.card_facts, self.history)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they go by the live model's names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_checkpoint(self.model, self.state.best_model_checkpoint)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score the validation pictures with the model as it is, and log ``eval_srcc_NAME``, ``eval_plcc_NAME``, ..."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        training = self.model.training
        self.model.eval()  # TRL tells training from validation figures by this
        self.log(dict(metrics))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validate(self) -> dict[str, float]:
        """Validation figures without logging them; {} without validation pictures."""
        if not any(len(s) for s in self.validation):
            return {}
        if self.is_fsdp_enabled:
            warnings.warn(
                "Under FSDP nothing is validated while training; score the checkpoints with `vqr1 score`.", stacklevel=2
            )
            return {}
        from accelerate.utils import gather_object

        training = self.model.training
        self.model.eval()
        with self.whole_model() as model, torch.no_grad():
            live = LoadedModel(
                base_model(model),
                self.loaded.tokenizer,
                self.processing_class.pixel_config,
                self.loaded.chat_template,
                "in training",
            )
            options: dict[str, Any] = {"mode": "score"}
            if self.ranker.thinking:
                options = {
                    "mode": "think",
                    "num_samples": 1,
                    "max_new_tokens": self.ranker.max_new_tokens,
                    "seed": self.args.seed,
                }
            mine = score_shard(live, self.validation, options, self.args.process_index, self.args.world_size)
        self.model.train(training)
        return validation_metrics(self.validation, gather_object(mine))

    def whole_model(self):
        """A context that yields the model, unwrapped and with all its weights present."""
        from contextlib import nullcontext

        return nullcontext(self.accelerator.unwrap_model(self.model))

    @property
    def card_facts(self) -> dict[str, Any]:
        """What the model card says of the data."""
        return {
            "start": self.start_model or self.ranker.model,
            "train": {s.name: len(s) for s in self.train_sets},
            "validation": {s.name: len(s) for s in self.validation if len(s)},
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log, from the start model on."""
        start = [] if self.start_figures is None else [{"step": 0, **self.start_figures}]
        return start + self.state.log_history
