"""RL2R with sampled replies: TRL's GRPO trainer with our pictures, rewards, order and loading."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from vqr1_metric.backends.base import Sampling
from vqr1_metric.backends.loading import LoadedModel
from vqr1_metric.images import load_image
from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.base import RankerBase, common_arguments, made
from vqr1_metric.train_ranker.callbacks import RepliesLog
from vqr1_metric.train_ranker.checks import ConfigError, TrainingError
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.policy import load_policy, lora_config
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.reward import FormatReward, RankingReward
from vqr1_metric.train_ranker.sampler import ComparisonSampler
from vqr1_metric.train_ranker.sharing import share_pictures
from vqr1_metric.train_ranker.trl_private import GRPO_NAMES, ZeroSpreadFilter, check_names

check_names(GRPOTrainer, GRPO_NAMES, "trl")

#: A reward of one's own: TRL's, with the columns ``name``, ``data_set`` and ``quality``.
RewardFunction = Callable[..., Sequence[float | None]]
#: So many of the start model's replies are looked at, of so many pictures.
_LOOKED_AT = 8
#: How much longer replies may be than max_new_tokens when the need is measured.
_LONGER = 4


class RankerTrainer(RankerBase, ZeroSpreadFilter, GRPOTrainer):  # type: ignore[misc]
    """TRL's :class:`~trl.GRPOTrainer` for ranking pictures; ``train()`` and ``save_model()`` are its own.

    Args:
        model: the start model: a Hub name, a folder, ``"nano"``, or one that is loaded; by default ``args.model``.
        args: the settings; :func:`grpo_config` translates them.
        train_dataset: what to train on: data sets, or label files whose pictures lie beside them.
        eval_dataset: held-out pictures, in the same forms.
        reward_funcs: rewards beside the ranking and the format reward: functions as TRL takes them, each weighted by
            ``args.reward_weights`` (1 by default). They get the columns ``name``, ``data_set`` and ``quality``.
        peft_config: of PEFT, in place of the one that ``args.lora_rank`` describes.
        optimizers: ``(optimizer, scheduler)`` in place of those that ``args`` describe.
        callbacks: further ``transformers.TrainerCallback``.

    Example:
        >>> args = RankerConfig.preset("nano", objective="sampled", output_dir="out")  # doctest: +SKIP
        >>> trainer = RankerTrainer("nano", args, "ratings.csv", reward_funcs=[brevity])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    vllm_generation: Any

    def __init__(
        self,
        model: str | LoadedModel | None = None,
        args: RankerConfig | None = None,
        train_dataset: Sequence[RatingSet] | RatingSet | str | Path | Sequence[str | Path] | None = None,
        eval_dataset: Sequence[RatingSet] | RatingSet | str | Path | Sequence[str | Path] | None = None,
        reward_funcs: Sequence[RewardFunction] = (),
        peft_config: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] = (),
    ) -> None:
        config = self.take(model, args, train_dataset, eval_dataset)
        settings = grpo_config(config, self.validation, further=len(reward_funcs) + len(config.rewards))
        # After the arguments: they set up DeepSpeed, under which weights must be loaded in parts.
        self.loaded = model if isinstance(model, LoadedModel) else load_policy(config)
        processor = RankerProcessor(
            self.loaded,
            self.training.pictures,
            self.loaded.pixel_config.with_limits(config.min_pixels, config.max_pixels),
            config.images_per_device,
        )
        size, k = config.comparison_size(settings.world_size), config.num_generations
        on_replies = None
        if config.log_replies and settings.process_index == 0:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            on_replies = RepliesLog(Path(config.output_dir), self.training.pictures, size * k, config.logging_steps)
        ranking = RankingReward(
            size, k, config.comparison_scope, config.rule, config.variance, config.gamma, config.eps, on_replies
        )
        further = [*(find_function(name) for name in config.rewards), *reward_funcs]
        rows = Dataset.from_list(
            [{"prompt": self.training.prompt(row, config.thinking), **row} for row in self.training.rows]
        )
        self.drops_zero_spread = config.drop_zero_spread
        if peft_config is None and config.lora_rank:
            peft_config = lora_config(config)
        super().__init__(
            model=self.loaded.model,
            reward_funcs=[ranking, FormatReward(config.thinking), *further],
            args=settings,
            train_dataset=rows,
            # TRL wants rows to validate; `evaluate` is our own and does not look at them.
            eval_dataset=rows.select(range(1)) if any(len(s) for s in self.validation) else None,
            processing_class=processor,
            peft_config=peft_config,
            optimizers=optimizers,
            callbacks=[self.guard, self.checkpoints, *callbacks],
        )
        if config.use_vllm:
            engine: Any = self.vllm_generation
            self.vllm_generation = PreparedPictures(engine, processor)
        if config.share_pictures:
            models: list[Any] = [self.loaded.model]
            if self.ref_model is not None:
                models.append(self.accelerator.unwrap_model(self.ref_model))
            for shared in models:
                share_pictures(shared.model.visual)

    def train_order(self) -> ComparisonSampler:
        """Each picture K times in a row, each batch as often as updates use it."""
        return self.comparison_sampler(self.num_generations, self.num_iterations * self.args.steps_per_generation)

    def whole_model(self) -> AbstractContextManager[torch.nn.Module]:
        """The model, unwrapped; under ZeRO-3 with all its weights gathered."""
        from trl.models import unwrap_model_for_generation

        found: AbstractContextManager[torch.nn.Module] = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        return found

    def check_start(self) -> None:
        """Look at the start model, and sample a few of its replies: are they cut off?

        Raises:
            TrainingError: most are, with the length that they would need.
        """
        super().check_start()
        config, pictures = self.ranker, self.training.pictures[:_LOOKED_AT]
        images = [load_image(picture.read(), picture.name) for picture in pictures]

        def lengths(limit: int) -> list[int]:
            sampling = Sampling(1, config.temperature, config.top_k, config.top_p, limit, self.args.seed)
            options: dict[str, Any] = {"thinking": config.thinking, "add_vision_id": False}
            found = backend.sample_replies(images, self.processing_class.pixel_config, sampling, **options)
            tokenizer: Any = self.loaded.tokenizer
            return [len(tokenizer.encode(replies[0], add_special_tokens=False)) for replies in found]

        with self.evaluating(), self.whole_model() as model, torch.no_grad():
            backend = self.live_backend(model)
            limit = config.max_new_tokens
            cut_off = sum(length >= limit - 1 for length in lengths(limit))
            needed = max(lengths(limit * _LONGER)) if cut_off > len(images) / 2 else 0
        if needed:
            told = f"about {needed}" if needed < limit * _LONGER - 1 else f"more than {limit * _LONGER}"
            raise TrainingError(
                f"{cut_off} of {len(images)} replies of the start model were cut off at max_new_tokens={limit}, and a "
                f"reply without its end earns nothing. The longest of them needs {told} tokens: raise max_new_tokens, "
                "or begin with cold_start_steps if the model does not know the form."
            )


class PreparedPictures:
    """TRL's vLLM engine, given pictures of the size that the model is trained with in place of their numbers.

    Args:
        engine: ``GRPOTrainer.vllm_generation``, colocated or a server's client.
        processor: knows the pictures and their size.
    """

    def __init__(self, engine: Any, processor: RankerProcessor) -> None:
        self._engine, self._processor = engine, processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *args: Any, images: Any = None, **options: Any) -> Any:
        """As the engine does."""
        if images is not None:
            images = [None if of is None else [self._processor.pil_image(image) for image in of] for of in images]
        return self._engine.generate(*args, images=images, **options)


def find_function(name: str) -> RewardFunction:
    """The function of ``"package.module:function"`` or ``"file.py:function"``.

    Raises:
        ConfigError: there is none.
    """
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ImportError("it is no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: RewardFunction = getattr(module, function)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a reward as 'package.module:function' or 'file.py:function', but got {name!r} ({error})."
        ) from None
    return found


def grpo_config(config: RankerConfig, validation: Sequence[RatingSet] = (), further: int = 0) -> GRPOConfig:
    """The settings as TRL's, each stated, because its defaults are others than the authors'.

    Args:
        config: the settings.
        validation: held-out pictures; any of them turn validation on.
        further: how many rewards there are beside the ranking and the format reward.
    """
    replies = config.images_per_device * config.num_generations
    micro_batch = min(config.micro_batch, replies)
    weights = config.reward_weights or [1.0] * further
    if len(weights) != further:
        raise ConfigError(f"Expected a weight for each of the {further} further rewards, but got {len(weights)}.")
    settings = {
        **common_arguments(config, validation),
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": config.num_generations,
        # Replies for a whole step at once, and one update from them: the micro batch changes memory, not the result.
        "gradient_accumulation_steps": replies // micro_batch,
        "steps_per_generation": replies // micro_batch,
        "num_generations": config.num_generations,
        "num_iterations": config.num_iterations,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "beta": config.kl_weight,
        "use_bias_correction_kl": False,
        "epsilon": config.clip,
        "loss_type": config.loss,
        "scale_rewards": config.scale_rewards,
        "importance_sampling_level": config.importance_sampling,
        "reward_weights": [1.0, config.format_weight, *weights],
        "mask_truncated_completions": False,
        "disable_dropout": False,
        "use_vllm": config.use_vllm,
        "log_completions": False,
    }
    if config.use_vllm:
        settings["vllm_mode"] = config.vllm_mode
    return made(GRPOConfig, settings, config)
