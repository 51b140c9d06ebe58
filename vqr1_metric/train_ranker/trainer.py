"""RL2R with sampled replies: TRL's GRPO trainer with our pictures, rewards, order and loading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from vqr1_metric.backends.loading import LoadedModel
from vqr1_metric.protocol import question
from vqr1_metric.train_ranker.base import RankerBase, TrainingRows, common_arguments
from vqr1_metric.train_ranker.callbacks import CollapseStop, RepliesLog
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.policy import load_policy, lora_config
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.ratings import RatingSet
from vqr1_metric.train_ranker.reward import FormatReward, RankingReward
from vqr1_metric.train_ranker.sharing import share_pictures, share_prompts

#: Advantages of a group are this small where its replies all earned the same.
_NO_ADVANTAGE = 1e-6


class RankerTrainer(RankerBase, GRPOTrainer):
    """TRL's :class:`~trl.GRPOTrainer` for ranking pictures; ``train()`` and ``save_model()`` are its own.

    Args:
        config: the settings; they are translated by :func:`grpo_config`.
        train: data sets to train on, already checked.
        validation: held-out pictures, possibly none.
        loaded: the start model, by default loaded as the settings say.
        callbacks: further ``transformers.TrainerCallback``.

    Example:
        >>> trainer = RankerTrainer(RankerConfig.preset("nano", objective="sampled", ...), sets)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
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
        args = grpo_config(config, validate=any(len(s) for s in validation))
        # After the arguments: they set up DeepSpeed, under which weights must be loaded in parts.
        self.loaded = loaded or load_policy(config)
        processor = RankerProcessor(
            self.loaded,
            self.training.pictures,
            self.loaded.pixel_config.with_limits(config.min_pixels, config.max_pixels),
            config.images_per_device,
        )
        size = config.comparison_size(args.world_size)
        self.collapse = CollapseStop(config.collapse_spread, config.collapse_patience)
        on_replies = None
        if config.log_replies and args.process_index == 0:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            on_replies = RepliesLog(
                Path(config.output_dir), self.training.pictures, size * config.num_generations, config.logging_steps
            )
        prompt = [{"role": "user", "content": question(config.thinking)}]
        rows = Dataset.from_list([{"prompt": prompt, **row} for row in self.training.rows])
        super().__init__(
            model=self.loaded.model,
            reward_funcs=[
                RankingReward(
                    size,
                    config.num_generations,
                    config.comparison_scope,
                    config.rule,
                    config.variance,
                    config.gamma,
                    config.eps,
                    on_replies,
                ),
                FormatReward(config.thinking),
            ],
            args=args,
            train_dataset=rows,
            # TRL wants rows to validate; `evaluate` is our own and does not look at them.
            eval_dataset=rows.select(range(1)) if any(len(s) for s in validation) else None,
            processing_class=processor,
            peft_config=lora_config(config) if config.lora_rank else None,
            callbacks=[self.collapse, *callbacks],
        )
        self._kept = 1.0
        if config.share_pictures:
            models = [self.loaded.model]
            if self.ref_model is not None:
                models.append(self.accelerator.unwrap_model(self.ref_model))
            for model in models:
                share_pictures(model.model.visual)
                share_prompts(model.model.language_model)

    def _get_train_sampler(self, dataset=None):
        return self.comparison_sampler(self.num_generations, self.num_iterations * self.args.steps_per_generation)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self.use_vllm and images is not None:  # it prepares pictures itself: give it the size we would use
            images = [None if of is None else [self._picture_for_vllm(image) for image in of] for of in images]
        return super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
        )

    def _picture_for_vllm(self, image: str):
        from PIL import Image

        pixels = self.processing_class.pixels(image)
        height, width = self.processing_class.pixel_config.target_size(*pixels.shape[-2:])
        return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.ranker.drop_zero_spread:
            self._kept = drop_zero_spread(output, self.num_generations, self.accelerator.gather)
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        # These two divide by the number of replies, dropped or not; the others by the tokens that are left.
        return loss / self._kept if self.ranker.loss in ("grpo", "dr_grpo") and self._kept else loss

    def whole_model(self):
        """The model, unwrapped; under ZeRO-3 with all its weights gathered."""
        from trl.models import unwrap_model_for_generation

        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )


def drop_zero_spread(batch: dict[str, Any], num_generations: int, gather=lambda values: values) -> float:
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


def grpo_config(config: RankerConfig, validate: bool) -> GRPOConfig:
    """The settings as TRL's, each stated, because its defaults are others than the authors'."""
    replies = config.images_per_device * config.num_generations
    micro_batch = min(config.micro_batch, replies)
    settings = {
        **common_arguments(config, validate),
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
        "reward_weights": [1.0, config.format_weight],
        "mask_truncated_completions": False,
        "disable_dropout": False,
        "use_vllm": config.use_vllm,
        "log_completions": False,
    }
    if config.use_vllm:
        settings["vllm_mode"] = "colocate"
    return GRPOConfig(**{**settings, **config.trainer})
