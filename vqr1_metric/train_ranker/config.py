"""Settings of a training run; nothing heavy is imported, so that they can be checked before anything else happens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Objective = Literal["sampled", "exact", "fidelity"]

#: What each preset sets; everything else keeps the defaults of :class:`RankerConfig`, which are the official settings.
PRESETS: dict[str, dict[str, Any]] = {
    # Every official setting, those of the defaults too: this table is what "as published" means. 16 processes.
    "paper": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "thinking": True,
        "objective": "sampled",
        "epochs": 10.0,
        "images_per_device": 8,
        "images_per_comparison": 8,
        "comparison_scope": "process",
        "mixing": "uniform",
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
        "top_k": 0,
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


class ConfigError(ValueError):
    """Settings that do not go together; the message begins with "Expected" and says what to change."""


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
            ``"fidelity"`` its direct gradient, both through the one-pass readout and for the non-thinking question.
        thinking: ask the thinking question.
        images_per_device: pictures of one step on each process.
        images_per_comparison: pictures compared with each other; None for all of a step (of a process, or of all with
            ``comparison_scope="global"``).
        comparison_scope: ``"process"``: comparison sets lie within a process; ``"global"``: they may span processes.
        mixing: ``"proportional"``: an epoch uses every picture once; ``"uniform"``: each comparison set's data set is
            drawn uniformly, as the authors do.
        num_generations: replies for each picture, K.
        micro_batch: replies (``exact``: pictures) of one forward and backward pass; lower it when memory is short.
            Gradients accumulate over a step, so the result does not depend on it.
        epochs, max_steps: length; ``max_steps`` above 0 overrides epochs.
        learning_rate, lr_scheduler, warmup_steps, weight_decay, max_grad_norm: of AdamW (betas .9 and .999).
        kl_weight: of the KL penalty to the start model, beta.
        clip: of the importance ratio; inactive with one update for each batch.
        loss, scale_rewards, importance_sampling: TRL's names, for Dr. GRPO (``"dr_grpo"``, ``"none"``), DAPO
            (``"dapo"``), GSPO (``importance_sampling="sequence"``).
        num_iterations: updates for each batch of replies.
        drop_zero_spread: leave pictures whose replies all earned the same out of the loss and its means (DAPO's
            filter, without sampling others in their place); only for ``"sampled"``.
        temperature, top_k, top_p, max_new_tokens: sampling. A checkpoint's own generation settings are not used.
        rule, variance, gamma, eps: the ranking reward, see :func:`~vqr1_metric.functional.reward.ranking_reward`.
        format_weight: weight of the format reward.
        cold_start_steps, cold_start_learning_rate: supervised steps before RL that teach the form of the reply, see
            :mod:`~vqr1_metric.train_ranker.coldstart`; 0 for a model that knows it.
        lora_rank, lora_alpha: 0 trains all weights; alpha None is twice the rank.
        quantization: ``"4bit"`` for the frozen weights under LoRA.
        freeze_vision: leave the vision tower as it is.
        dtype: of the weights; None is float32 (with bfloat16 arithmetic on GPUs), for LoRA on GPUs bfloat16.
        attn_implementation: of transformers; None is ``"sdpa"``.
        gradient_checkpointing: recompute activations in the backward pass.
        share_pictures: the K replies of a picture share its pass through the vision tower, and their prompt's through
            the language model (see :mod:`~vqr1_metric.train_ranker.sharing`).
        min_pixels, max_pixels: pixel limits of a picture; None keeps the model's own.
        merge: write the LoRA result as a full model (the adapter stays in the checkpoints).
        use_vllm: sample with vLLM on the training GPUs.
        eval_steps, save_steps, logging_steps, save_total_limit: steps between these; how many checkpoints are kept.
        log_replies: write the replies of one comparison set to ``replies.jsonl`` at each logging step.
        report_to: ``"tensorboard"``, ``"trackio"``.
        collapse_spread, collapse_patience: stop when the standard deviation of the pictures' mean scores stayed below
            this for so many logs; a patience of 0 never stops.
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
    thinking: bool = True
    images_per_device: int = 8
    images_per_comparison: int | None = None
    comparison_scope: Literal["process", "global"] = "process"
    mixing: Literal["proportional", "uniform"] = "proportional"
    num_generations: int = 6
    micro_batch: int = 48
    epochs: float = 10.0
    max_steps: int = -1
    learning_rate: float = 1e-6
    lr_scheduler: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    kl_weight: float = 0.04
    clip: float = 0.2
    loss: str = "grpo"
    scale_rewards: str = "group"
    importance_sampling: str = "token"
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
    cold_start_steps: int = 0
    cold_start_learning_rate: float = 1e-5
    lora_rank: int = 0
    lora_alpha: int | None = None
    quantization: Literal["4bit"] | None = None
    freeze_vision: bool = False
    dtype: str | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = True
    share_pictures: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    merge: bool = True
    use_vllm: bool = False
    eval_steps: int = 100
    save_steps: int = 100
    logging_steps: int = 1
    save_total_limit: int | None = 3
    log_replies: bool = True
    report_to: list[str] = field(default_factory=list)
    collapse_spread: float = 0.02
    collapse_patience: int = 20
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> RankerConfig:
        """A preset (``paper``, ``80gb-lora``, ``24gb-4bit``, ``nano``) with some settings changed."""
        if name not in PRESETS:
            raise ConfigError(f"Expected a preset of {', '.join(PRESETS)}, but got {name!r}.")
        return cls(**{**PRESETS[name], **settings})

    def check(self, processes: int = 1) -> None:
        """Complain about settings that do not go together, before anything is read.

        Raises:
            ConfigError: what was expected, what came.
        """
        from vqr1_metric.train_ranker.data import DataError

        if not self.data:
            raise DataError("Expected at least one file of ratings (--data), but got none.")
        if not self.output_dir:
            raise ConfigError("Expected an output folder (--output), but got none.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"Expected {name} to be one of {choices}, but got {getattr(self, name)!r}.")
        for name in ("images_per_device", "micro_batch", "max_new_tokens", "eval_steps", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, but got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"Expected validation_fraction in [0, 1), but got {self.validation_fraction}.")
        if self.comparison_size(processes) < 2:
            raise ConfigError("Expected at least 2 pictures in a comparison set: one alone has no order.")
        whole = self.images_per_device * (processes if self.comparison_scope == "global" else 1)
        if whole % self.comparison_size(processes):
            raise ConfigError(
                f"Expected comparison sets of {self.comparison_size(processes)} pictures to divide the {whole} "
                f"pictures of a step ({self.comparison_scope}), but they do not. Change images_per_device."
            )
        if self.objective == "sampled":
            self._check_sampled()
        elif self.drop_zero_spread:
            raise ConfigError("Expected drop_zero_spread only with objective='sampled': elsewhere nothing is sampled.")
        elif self.thinking:
            raise ConfigError(
                f"Expected thinking=False with objective={self.objective!r}: without sampling there is no reasoning to "
                "condition the score on. Use objective='sampled', or ask the non-thinking question."
            )
        elif self.images_per_device % min(self.micro_batch, self.images_per_device):
            raise ConfigError(
                f"Expected micro_batch to divide images_per_device ({self.images_per_device}), but got "
                f"{self.micro_batch}."
            )
        if self.quantization and not self.lora_rank:
            raise ConfigError("Expected lora_rank above 0 with quantization: quantised weights cannot be trained.")
        if self.cold_start_steps and (processes > 1 or self.quantization):
            raise ConfigError(
                "Expected one process and unquantised weights with cold_start_steps, but got "
                f"{processes} processes and quantization={self.quantization!r}: run the cold start by itself first "
                "(max_steps=1, learning_rate=0) and start from its model."
            )
        for package, needed in _NEEDED.items():
            if needed(self) and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"Expected {package} to be installed: {_INSTALL.get(package, f'pip install {package}')}"
                )

    def _check_sampled(self) -> None:
        if self.num_generations < 2:
            raise ConfigError(f"Expected num_generations of at least 2, but got {self.num_generations}.")
        replies = self.images_per_device * self.num_generations
        if replies % min(self.micro_batch, replies):
            raise ConfigError(
                f"Expected micro_batch to divide images_per_device x num_generations = {replies}, but got "
                f"{self.micro_batch}."
            )
        if self.revision and self.kl_weight and not self.lora_rank:
            raise ConfigError(
                f"Expected a folder as the model, but got revision {self.revision!r} of {self.model}: the KL penalty "
                "loads the start model a second time, by name alone. Download the revision and give its folder, or "
                "train with lora_rank above 0."
            )
        if self.save_steps % self.num_iterations:
            raise ConfigError(
                f"Expected save_steps to be a multiple of num_iterations ({self.num_iterations}), but got "
                f"{self.save_steps}: resuming in the middle of a batch of replies would not be exact."
            )

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
        """Settings that decide the result and differ, as ``{name: (mine, theirs)}``."""
        mine, theirs = asdict(self), asdict(other)
        return {n: (mine[n], theirs[n]) for n in mine if n not in _WITHOUT_EFFECT and mine[n] != theirs[n]}


#: Settings that may change between a run and its continuation.
_WITHOUT_EFFECT = frozenset(
    ["output_dir", "logging_steps", "log_replies", "report_to", "save_total_limit", "merge", "eval_steps", "save_steps"]
)
_CHOICES: Mapping[str, tuple] = {
    "objective": ("sampled", "exact", "fidelity"),
    "comparison_scope": ("process", "global"),
    "mixing": ("proportional", "uniform"),
    "rule": ("fidelity", "binary", "averaged"),
    "variance": ("estimated", "fixed"),
    "quantization": (None, "4bit"),
}
_INSTALL = dict.fromkeys(("trl", "peft", "datasets"), "pip install 'vqr1-metric[train]'")
_INSTALL["bitsandbytes"] = "pip install 'vqr1-metric[quant]'"
_NEEDED = {
    "trl": lambda c: c.objective == "sampled",
    "datasets": lambda c: c.objective == "sampled",
    "peft": lambda c: c.lora_rank > 0,
    "bitsandbytes": lambda c: c.quantization is not None,
    "vllm": lambda c: c.use_vllm,
    "tensorboard": lambda c: "tensorboard" in c.report_to,
    "trackio": lambda c: "trackio" in c.report_to,
    "deepspeed": lambda c: "deepspeed" in c.trainer,
}
