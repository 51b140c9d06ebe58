"""What both trainers share: the order of pictures, strict loading, validation."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vqr1_metric.backends.loading import LoadedModel, ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.images import load_image
from vqr1_metric.protocol import QUESTION, question
from vqr1_metric.ratings import RatedImage, RatingSet, read_ratings
from vqr1_metric.train_ranker.callbacks import Checkpoints, Guard, all_finite, main_figure
from vqr1_metric.train_ranker.card import write_card
from vqr1_metric.train_ranker.checks import ConfigError, TrainingError, check_numbers
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.policy import base_model
from vqr1_metric.train_ranker.resume import write_manifest
from vqr1_metric.train_ranker.sampler import ComparisonSampler
from vqr1_metric.train_ranker.trl_private import OwnOrder, StrictLoading
from vqr1_metric.train_ranker.validation import score_shard, validation_metrics


@dataclass(frozen=True)
class TrainingRows:
    """Training images as rows: a rated image is one row, a preference two (its winner and its loser).

    Args:
        rows: ``image`` (index into ``pictures``, as text), ``name``, ``data_set``, ``quality`` (0 for a preference),
            ``share`` (share of the votes won, None for a rating).
        units: for each data set its units, each the indices of one or two rows.
        pictures: what ``image`` refers to.
    """

    rows: list[dict[str, Any]]
    units: list[list[tuple[int, ...]]]
    pictures: list[RatedImage]

    @classmethod
    def of(cls, sets: Sequence[RatingSet]) -> TrainingRows:
        """The rows of several data sets."""
        rows: list[dict[str, Any]] = []
        units: list[list[tuple[int, ...]]] = []
        pictures: list[RatedImage] = []
        for s in sets:
            index = {image.name: len(pictures) + i for i, image in enumerate(s.images)}
            pictures += s.images

            def add(
                name: str, quality: float, share: float | None, s: RatingSet = s, index: dict[str, int] = index
            ) -> int:
                row = {"image": str(index[name]), "name": name, "data_set": s.name, "quality": quality, "share": share}
                rows.append(row)
                return len(rows) - 1

            if s.preferences:
                units.append([(add(p.a, 0.0, p.share), add(p.b, 0.0, 1 - p.share)) for p in s.preferences])
            else:
                units.append([(add(image.name, q, None),) for image, q in zip(s.images, s.quality, strict=True)])
        return cls(rows, units, pictures)

    def prompt(self, row: dict[str, Any], thinking: bool) -> list[dict[str, Any]]:
        """The chat of a row: the question of its labels, the built-in one where they have none."""
        asked = self.pictures[int(row["image"])].question or QUESTION
        return [{"role": "user", "content": question(thinking, asked)}]


def as_sets(data: Sequence[RatingSet] | RatingSet | str | Path | Sequence[str | Path] | None) -> list[RatingSet]:
    """Data sets as they are, or read from label files whose images lie beside them."""
    if data is None:
        return []
    several = [data] if isinstance(data, RatingSet | str | Path) else list(data)
    return [
        s
        for one in several
        for s in ([one] if isinstance(one, RatingSet) else read_ratings(one, strict=True).by_dataset())
    ]


def common_arguments(config: RankerConfig, validation: Sequence[RatingSet] = ()) -> dict[str, Any]:
    """The settings under the names of ``transformers.TrainingArguments``, for both trainers."""
    validate = any(len(s) for s in validation)
    metric = "srcc" if any(len(s) and not s.preferences for s in validation) else "pairs" if validate else None
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
        "logging_nan_inf_filter": False,  # or a loss that is no number is not seen
        "report_to": config.report_to or "none",
        "metric_for_best_model": metric,
        "greater_is_better": None if metric is None else True,
        "remove_unused_columns": False,
        "seed": config.seed,
    }


def made(build: Callable[..., Any], settings: dict[str, Any], config: RankerConfig) -> Any:
    """The arguments of a trainer; what they complain about is a complaint about the settings.

    Raises:
        ConfigError: what TRL or transformers say.
    """
    try:
        return build(**{**settings, **config.trainer})
    except (TypeError, ValueError, ImportError) as error:
        told = " ".join(str(error).split()).replace(f"{build.__name__}.__init__() got ", "")
        raise ConfigError(f"Expected settings that {build.__name__} takes, but it says: {told}") from None


class RankerBase(OwnOrder, StrictLoading):
    """Mixed into a ``transformers.Trainer``; ``ranker``, ``loaded``, ``validation`` and ``training`` are set before."""

    ranker: RankerConfig
    loaded: LoadedModel
    train_sets: Sequence[RatingSet]
    validation: Sequence[RatingSet]
    training: TrainingRows
    guard: Guard
    checkpoints: Checkpoints
    #: Validation figures of the start model, which the log of a run does not hold.
    start_figures: dict[str, float] | None = None
    _readable_at_start = math.nan
    #: What the cold start began with, if there was one.
    start_model: str | None = None
    # Of transformers' Trainer, beside which this stands.
    args: Any
    state: Any
    model: Any
    control: Any
    accelerator: Any
    callback_handler: Any
    processing_class: Any
    log: Any
    is_fsdp_enabled: Any
    is_world_process_zero: Any

    def take(self, model: Any, args: Any, train_dataset: Any, eval_dataset: Any) -> RankerConfig:
        """Take the arguments that both trainers share, and return the settings.

        Raises:
            ConfigError: not settings and data sets.
        """
        if isinstance(model, RankerConfig):
            raise ConfigError(
                f"Expected {type(self).__name__}(model, args, train_dataset, eval_dataset, ...); the form of version "
                "0.1.0 was (config, train, validation), which is now (None, config, train, validation)."
            )
        if not isinstance(args, RankerConfig):
            raise ConfigError(f"Expected a RankerConfig as args, but got {type(args).__name__}.")
        if not isinstance(model, str | Path | LoadedModel | None):
            raise ConfigError(f"Expected a name, a folder or a LoadedModel, but got {type(model).__name__}.")
        self.ranker = replace(args, model=str(model)) if isinstance(model, str | Path) else args
        check_numbers(self.ranker)
        self.train_sets, self.validation = as_sets(train_dataset), as_sets(eval_dataset)
        if not self.train_sets:
            raise ConfigError("Expected data sets or label files as train_dataset, but got none.")
        self.training = TrainingRows.of(self.train_sets)
        self.guard = Guard(self.ranker)
        self.checkpoints = Checkpoints(self.finish_checkpoint)
        return self.ranker

    def take_start(self, figures: Mapping[str, float]) -> None:
        """Validation figures of the start model, below which a run must not fall far."""
        self.guard.start = main_figure(figures, "eval_")

    def check_start(self) -> None:
        """Look at the start model before training."""
        self._readable_at_start = self.readable_now()

    def check_end(self) -> None:
        """Look at the model after the last step, which no log has seen.

        Raises:
            TrainingError: weights that are not finite, or a model that has lost its answers.
        """
        self.check_weights()
        if self._readable_at_start > 1e-3 and not self.readable_now() > 1e-6:
            raise TrainingError(
                f"after step {self.state.global_step} the model gives no score any more, which it did at the start: "
                f"the run is broken. Try a lower learning_rate ({self.ranker.learning_rate:g} here)."
            )

    def readable_now(self) -> float:
        """Probability of a readable answer to the non-thinking question, mean of a few training pictures."""
        if self.is_fsdp_enabled:
            return math.nan
        images = [load_image(picture.read(), picture.name) for picture in self.training.pictures[:4]]
        with self.evaluating(), self.whole_model() as model, torch.no_grad():
            found = self.live_backend(model).distributions(images, self.processing_class.pixel_config)
        assert found.coverage is not None and found.tag_probability is not None
        return float((found.coverage * found.tag_probability).mean())

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

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing here: :mod:`~vqr1_metric.train_ranker.card` writes the card, with validation figures."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the validation pictures with the model as it is, and log ``eval_srcc_NAME``, ``eval_plcc_NAME``, ..."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        with self.evaluating():  # TRL tells training from validation figures by this
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def finish_checkpoint(self, folder: Path) -> None:
        """Write the card and the manifest of a checkpoint."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and folder.is_dir():
            write_card(folder, self.ranker, self.card_facts, self.history)
            write_manifest(folder)

    def validate(self) -> dict[str, float]:
        """Validation figures without logging them; {} without validation pictures.

        Raises:
            TrainingError: weights that are not finite.
        """
        if not any(len(s) for s in self.validation):
            return {}
        if self.is_fsdp_enabled:
            warnings.warn(
                "Under FSDP nothing is validated while training; score the checkpoints with `vqr1 score`.", stacklevel=2
            )
            return {}
        from accelerate.utils import gather_object

        self.check_weights()
        with self.evaluating(), self.whole_model() as model, torch.no_grad():
            options: dict[str, Any] = {"mode": "score"}
            if self.ranker.thinking:
                options = {
                    "mode": "think",
                    "num_samples": 1,
                    "max_new_tokens": self.ranker.max_new_tokens,
                    "seed": self.args.seed,
                }
            mine = score_shard(
                self.live_backend(model), self.validation, options, self.args.process_index, self.args.world_size
            )
        return validation_metrics(self.validation, gather_object(mine))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode; quantised layers, which have none, are left alone.

        bitsandbytes packs weights of 4 bits for a CPU when a layer is told, and cannot train them afterwards.
        """
        training, quantised = self.model.training, self.ranker.quantization is not None

        def become(mode: bool) -> None:
            if quantised:
                self.model.training = mode
            else:
                self.model.train(mode)

        become(False)
        try:
            yield
        finally:
            become(training)

    def check_weights(self) -> None:
        """Complain about weights that are not finite.

        Raises:
            TrainingError: with the step.
        """
        if not all_finite([weight for weight in self.model.parameters() if weight.requires_grad]):
            raise TrainingError(
                f"the weights are not finite after step {self.state.global_step}: the run is broken. Try a lower "
                f"learning_rate ({self.ranker.learning_rate:g} here)."
            )

    def live_backend(self, model: torch.nn.Module) -> TransformersBackend:
        """The model in training, as a scorer uses it."""
        loaded = LoadedModel(
            base_model(model),
            self.loaded.tokenizer,
            self.processing_class.pixel_config,
            self.loaded.chat_template,
            "in training",
        )
        return TransformersBackend(ModelSpec("model in training"), loaded)

    def whole_model(self) -> AbstractContextManager[torch.nn.Module]:
        """A context that yields the model, unwrapped and with all its weights present."""
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
        log: list[dict[str, Any]] = self.state.log_history
        return [*start, *log]
