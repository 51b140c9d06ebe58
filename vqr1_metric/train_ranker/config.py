"""Settings of a training run; nothing heavy is imported, so that they can be checked before anything else happens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vqr1_metric.train_ranker.checks import ConfigError, as_type, check_numbers, check_packages, check_together

Objective = Literal["sampled", "exact", "fidelity", "distill"]
#: Of TRL 1.16 and of transformers; tests compare them with what is installed.
Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip

#: What each preset sets; everything else keeps the defaults of :class:`RankerConfig`, which are the official settings.
PRESETS: dict[str, dict[str, Any]] = {
    # Every official setting, those of the defaults too: this table is what "as published" means. 16 processes. What
    # cannot be equal is listed in docs/training.md.
    "paper": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "thinking": True,
        "objective": "sampled",
        "validation_fraction": 0.0,
        "epochs": 10.0,
        "images_per_device": 8,
        "images_per_comparison": 8,
        "comparison_scope": "process",
        "mixing": "authors",
        "num_generations": 6,
        "micro_batch": 48,
        "learning_rate": 1e-6,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "kl_weight": 0.04,
        "clip": 0.2,
        "loss": "grpo",
        "scale_rewards": "group",
        "importance_sampling": "token",
        "num_iterations": 1,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "max_new_tokens": 256,
        "rule": "fidelity",
        "variance": "estimated",
        "gamma": 1e-6,
        "eps": 1e-6,
        "format_weight": 1.0,
        "lora_rank": 0,
        "freeze_vision": False,
        "quantization": None,
        "seed": 42,
    },
    "80gb-lora": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "epochs": 2.0,
        "micro_batch": 6,
        "learning_rate": 1e-5,
        "lora_rank": 64,
        "dtype": "bfloat16",
        "max_pixels": 1_048_576,
    },
    "24gb-4bit": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "epochs": 2.0,
        "micro_batch": 2,
        "learning_rate": 1e-5,
        "lora_rank": 32,
        "quantization": "4bit",
        "dtype": "bfloat16",
        "freeze_vision": True,
        "max_pixels": 401_408,
    },
    "nano": {
        "model": "nano",
        "thinking": False,
        "objective": "exact",
        "epochs": 3.0,
        "images_per_device": 16,
        "images_per_comparison": 16,
        "micro_batch": 96,
        "max_new_tokens": 24,
        "learning_rate": 3e-5,
        "kl_weight": 0.01,
        "gradient_checkpointing": False,
        "eval_steps": 20,
        "save_steps": 20,
        "logging_steps": 5,
    },
}


@dataclass
class RankerConfig:
    """One training run. The defaults are the official settings of VisualQuality-R1 where it states one.

    Args:
        data: files of ratings (see :mod:`~vqr1_metric.train_ranker.data`), ``hf:`` names or saved datasets.
        images: folders of the pictures, searched before the label file's own folder.
        output_dir: the trained model is written here, checkpoints below it.
        model: model to start from: a Hub name, a local folder or ``"nano"``.
        revision: Hub branch, tag or commit.
        lower_is_better: names of the data sets whose scores are better when lower (DMOS).
        higher_is_better: names of those whose scores are called ``dmos`` and are better when higher (KADID-10k).
        validation: files of ratings to validate on; without, the labels' own split or ``validation_fraction`` counts.
        validation_fraction: share of each set that is held out, whole reference pictures at a time.
        objective: ``"sampled"`` is RL2R with K sampled replies; ``"exact"`` the same expectation without sampling, and
            ``"fidelity"`` its direct gradient, both through the one-pass readout and for the non-thinking question;
            ``"distill"`` learns the score distributions of ``teacher``.
        teacher: files of score distributions, for ``"distill"`` (see :mod:`~vqr1_metric.train_ranker.distill`).
        distill_loss: ``"cross_entropy"`` over the scores, or ``"wasserstein"``, the area between both distribution
            functions, in score units; ``"mean"`` is the squared difference of the mean scores alone.
        rating_weight: of the expected fidelity to ``data`` beside the teacher, where both are given.
        thinking: ask the thinking question.
        images_per_device: pictures of one step on each process.
        images_per_comparison: pictures compared with each other; None for all of a step (of a process, or of all with
            ``comparison_scope="global"``).
        comparison_scope: ``"process"``: comparison sets lie within a process; ``"global"``: they may span processes.
        mixing: ``"proportional"``: an epoch uses every picture once, in any order; ``"authors"``: the data set of each
            comparison set is drawn uniformly among those that have enough unused pictures, so that small sets come
            early in an epoch; ``"uniform"``: uniformly among all, so that small sets come round more often.
        num_generations: replies for each picture, K.
        micro_batch: replies (``exact``: pictures) of one forward and backward pass; lower it when memory is short.
            Gradients accumulate over a step, so the result does not depend on it.
        epochs, max_steps: length; ``max_steps`` above 0 overrides epochs.
        learning_rate, lr_scheduler, warmup_steps, weight_decay, max_grad_norm: of AdamW (betas .9 and .999).
        kl_weight: of the KL penalty to the start model, beta.
        kl_direction: ``"forward"``: KL(start model || policy), whose gradient the published penalty has; ``"reverse"``:
            KL(policy || start model), not with ``"sampled"``.
        clip: of the importance ratio; inactive with one update for each batch.
        loss, scale_rewards, importance_sampling: TRL's names, for Dr. GRPO (``"dr_grpo"``, ``"none"``), DAPO
            (``"dapo"``), GSPO (``importance_sampling="sequence"``).
        num_iterations: updates for each batch of replies.
        drop_zero_spread: leave pictures whose replies all earned the same out of the loss and its means (DAPO's
            filter, without sampling others in their place); only for ``"sampled"``.
        temperature, top_k, top_p, max_new_tokens: sampling. A checkpoint's own generation settings are not used.
        rule, variance, gamma, eps: the ranking reward, see :func:`~vqr1_metric.functional.reward.ranking_reward`.
        format_weight: weight of the format reward.
        rewards: further rewards, each ``"package.module:function"`` or ``"file.py:function"``; only for ``"sampled"``.
            A function gets what TRL gives (``prompts, completions, ...``) and the columns ``name, data_set, quality``,
            and returns a number, or None, for each reply.
        reward_weights: of these, 1 each by default.
        cold_start_steps, cold_start_learning_rate: supervised steps before RL that teach the form of the reply, see
            :mod:`~vqr1_metric.train_ranker.coldstart`; 0 for a model that knows it.
        lora_rank, lora_alpha: 0 trains all weights; alpha None is twice the rank.
        quantization: ``"4bit"`` for the frozen weights under LoRA.
        freeze_vision: leave the vision tower as it is.
        dtype: of the weights; None is float32 (with bfloat16 arithmetic on GPUs), for LoRA on GPUs bfloat16.
        attn_implementation: of transformers; None is ``"sdpa"``.
        gradient_checkpointing: recompute activations in the backward pass.
        share_pictures: the K replies of a picture share its pass through the vision tower (see
            :mod:`~vqr1_metric.train_ranker.sharing`).
        min_pixels, max_pixels: pixel limits of a picture; None keeps the model's own.
        merge: write the LoRA result as a full model (the adapter stays in the checkpoints).
        use_vllm: sample with vLLM.
        vllm_mode: ``"colocate"`` on the training GPUs; ``"server"``: of a running ``trl vllm-serve``, by
            ``trainer.vllm_server_base_url``.
        eval_steps, save_steps, logging_steps, save_total_limit: steps between these; how many checkpoints are kept.
        log_replies: write the replies of one comparison set to ``replies.jsonl`` at each logging step.
        report_to: ``"tensorboard"``, ``"trackio"``, ``"wandb"``.
        push_to_hub: name of a repository of the Hub that takes the finished model.
        keep_best: validation figures decide of which checkpoint a copy is kept in ``best``.
        collapse_spread, collapse_patience: stop when the standard deviation of the pictures' mean scores stayed below
            this for so many logs; a patience of 0 never stops.
        unreadable_patience: stop when nothing was readable in so many logs; 0 never stops.
        validation_drop: stop when the mean validation SRCC is so much below the start model's; 0 never stops.
        seed: of order, sampling and initialisation.
        trainer: further arguments of TRL's ``GRPOConfig`` (``transformers.TrainingArguments`` for ``exact``), for what
            has no name here, such as ``deepspeed``.
    """

    data: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    output_dir: str = ""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    revision: str | None = None
    lower_is_better: list[str] = field(default_factory=list)
    higher_is_better: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    validation_fraction: float = 0.1
    objective: Objective = "sampled"
    teacher: list[str] = field(default_factory=list)
    distill_loss: Literal["cross_entropy", "wasserstein", "mean"] = "cross_entropy"
    rating_weight: float = 1.0
    thinking: bool = True
    images_per_device: int = 8
    images_per_comparison: int | None = None
    comparison_scope: Literal["process", "global"] = "process"
    mixing: Literal["proportional", "authors", "uniform"] = "proportional"
    num_generations: int = 6
    micro_batch: int = 48
    epochs: float = 10.0
    max_steps: int = -1
    learning_rate: float = 1e-6
    lr_scheduler: Scheduler = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    kl_weight: float = 0.04
    kl_direction: Literal["forward", "reverse"] = "forward"
    clip: float = 0.2
    loss: Loss = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling: Literal["token", "sequence"] = "token"
    num_iterations: int = 1
    drop_zero_spread: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    rule: Literal["fidelity", "binary", "averaged"] = "fidelity"
    variance: Literal["estimated", "fixed"] = "estimated"
    gamma: float = 1e-6
    eps: float = 1e-6
    format_weight: float = 1.0
    rewards: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    cold_start_steps: int = 0
    cold_start_learning_rate: float = 1e-5
    lora_rank: int = 0
    lora_alpha: int | None = None
    quantization: Literal["4bit"] | None = None
    freeze_vision: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: Literal["sdpa", "eager"] | None = None
    gradient_checkpointing: bool = True
    share_pictures: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    merge: bool = True
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    eval_steps: int = 100
    save_steps: int = 100
    logging_steps: int = 1
    save_total_limit: int | None = 3
    log_replies: bool = True
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    push_to_hub: str | None = None
    keep_best: bool = True
    collapse_spread: float = 0.02
    collapse_patience: int = 20
    unreadable_patience: int = 10
    validation_drop: float = 0.3
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            setattr(self, name, as_type(name, getattr(self, name), kind))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> RankerConfig:
        """A preset (``paper``, ``80gb-lora``, ``24gb-4bit``, ``nano``) with some settings changed."""
        if name not in PRESETS:
            raise ConfigError(f"Expected a preset of {', '.join(PRESETS)}, but got {name!r}.")
        return cls.of({**PRESETS[name], **settings})

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RankerConfig:
        """The settings of a mapping, such as a file holds; ``preset`` in it is where they start."""
        settings = dict(settings)
        if "preset" in settings:
            return cls.preset(settings.pop("preset"), **settings)
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                from difflib import get_close_matches

                near = get_close_matches(name, known, 1)
                raise ConfigError(
                    f"Expected a setting of RankerConfig, but got {name!r}"
                    + (f": do you mean {near[0]!r}?" if near else ". docs/training.md lists them.")
                )
        return cls(**settings)

    def check(self, processes: int = 1) -> None:
        """Complain about settings that do not go together, before anything is read.

        Raises:
            ConfigError: what was expected, what came.
        """
        check_numbers(self)
        check_together(self, processes)
        check_packages(self)

    def comparison_size(self, processes: int = 1) -> int:
        """Pictures of a comparison set."""
        if self.images_per_comparison is not None:
            return self.images_per_comparison
        return self.images_per_device * (processes if self.comparison_scope == "global" else 1)

    def save(self, folder: Path) -> None:
        """Write ``ranker.json``, from which a run is resumed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ranker.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RankerConfig:
        """Read ``ranker.json``."""
        values = json.loads((Path(folder) / "ranker.json").read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def differences(self, other: RankerConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that decide the result and differ, as ``{name: (mine, theirs)}``; paths are not looked at."""
        mine, theirs = asdict(self), asdict(other)
        return {n: (mine[n], theirs[n]) for n in mine if n not in MAY_CHANGE and mine[n] != theirs[n]}


#: Settings that may change between a run and its continuation: what they name is compared by content, or they have no
#: effect on the result (the micro batch none but rounding).
MAY_CHANGE = frozenset(
    ["output_dir", "logging_steps", "log_replies", "report_to", "save_total_limit", "merge", "eval_steps", "save_steps",
     "push_to_hub", "keep_best", "data", "images", "validation", "teacher", "model", "revision", "micro_batch",
     "max_steps", "epochs", "collapse_spread", "collapse_patience", "unreadable_patience", "validation_drop"]
)  # fmt: skip


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(RankerConfig)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file.

    Raises:
        ConfigError: no such file, or one that does not hold names and values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a file of settings, but {str(path)!r} cannot be read ({error}).") from None
    import yaml  # comes with transformers; JSON is YAML but for some numbers

    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"Expected YAML or JSON in {str(path)!r}, but it cannot be read: {told}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"Expected names and values in {str(path)!r}, but it holds {type(found).__name__}.")
    return found
