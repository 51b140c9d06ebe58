"""One training run: read and check, load, train, write the model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.data import direct, read_sets
from vqr1_metric.train_ranker.ratings import (
    RatingSet,
    check_pictures,
    check_sets,
    check_validation,
    split_validation,
)

#: Written last of a checkpoint; without it the checkpoint was cut off.
_COMPLETE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def train(config: RankerConfig, resume: bool = False, callbacks: Sequence[Any] = ()) -> Path:
    """Train a ranker and write it to ``config.output_dir``, where ``VisualQualityR1Score(model=...)`` finds it.

    Everything that can be wrong with settings and data is found before any weights load. Under torchrun or accelerate
    every process calls this.

    Args:
        config: the settings.
        resume: continue the run in ``output_dir`` from its last complete checkpoint; nothing may have changed that
            decides the result. The continued run equals the uninterrupted one bit by bit (on one machine, with
            deterministic kernels).
        callbacks: further ``transformers.TrainerCallback``.

    Returns:
        The folder of the trained model.
    """
    processes, main = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    config.check(processes)
    output = Path(config.output_dir)
    training, validation = prepare_data(config, processes, open_pictures=main)
    fingerprint = _fingerprint([*training, *validation])
    checkpoint = _check_output(output, config, fingerprint, resume)
    trainer = build_trainer(_after_cold_start(config, training, output, resume), training, validation, callbacks)
    trainer.start_model = config.model
    if any(len(s) for s in validation):
        # The start model's figures, to see what training gains.
        trainer.start_figures = _start_figures(output) if checkpoint else trainer.evaluate()
    trainer.accelerator.wait_for_everyone()  # the others have looked at the folder
    if main and checkpoint is None:
        config.save(output)
        told = {"data": fingerprint, "start": trainer.start_figures}
        (output / "data.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if any(len(s) for s in validation) and not _just_validated(trainer):
        trainer.evaluate()
    save_result(trainer, output)
    if trainer.collapse.message and main:
        print(f"vqr1: {trainer.collapse.message}", file=sys.stderr)
    return output


def build_trainer(config: RankerConfig, training, validation, callbacks: Sequence[Any] = ()):
    """The trainer of the objective, with its model loaded."""
    if config.objective == "sampled":
        from vqr1_metric.train_ranker.trainer import RankerTrainer as Trainer
    else:
        from vqr1_metric.train_ranker.exact import ExactRankerTrainer as Trainer
    return Trainer(config, training, validation, callbacks=callbacks)


def _after_cold_start(config: RankerConfig, training: Sequence[RatingSet], output: Path, resume: bool) -> RankerConfig:
    """The settings of what follows the cold start, which is made if there is none yet."""
    if not config.cold_start_steps:
        return config
    folder = (output / "cold-start").resolve()  # a LoRA adapter will name it as its base
    if not (resume and (folder / "config.json").is_file()):
        from vqr1_metric.train_ranker.coldstart import cold_start

        cold_start(config, training, folder)
    return replace(config, model=str(folder), revision=None)


def prepare_data(
    config: RankerConfig, processes: int = 1, open_pictures: bool = True
) -> tuple[list[RatingSet], list[RatingSet]]:
    """Training and validation sets, read and checked.

    Args:
        open_pictures: open every picture once (one process of a launch is enough).
    """
    size = config.comparison_size(processes)
    sets = read_sets(config.data, config.images)
    held_out = read_sets(config.validation, config.images) if config.validation else []
    told = direct([*sets, *held_out], set(config.lower_is_better), set(config.higher_is_better))
    sets, held_out = told[: len(sets)], told[len(sets) :]
    if config.validation:
        training = [split_validation(s, 0.0)[0] for s in sets]
    else:
        check_sets(sets, size)
        training, held_out = zip(
            *(split_validation(s, config.validation_fraction, config.seed) for s in sets), strict=True
        )
    training, held_out = list(training), list(held_out)
    check_sets(training, size)
    check_validation(held_out)
    if open_pictures:
        check_pictures(training, held_out, progress=sum(map(len, training)) > 500)
    return training, held_out


def save_result(trainer, output: Path) -> None:
    """Write the trained model: all weights, merged ones of a LoRA run unless ``merge=False``, tokenizer, model card."""
    from vqr1_metric.train_ranker.card import write_card

    config = trainer.ranker
    if config.lora_rank and config.merge:
        adapter = output / "adapter"
        trainer.save_model(str(adapter))
        if trainer.is_world_process_zero():
            from vqr1_metric.backends.loading import ModelSpec, load_model

            dtype = config.dtype or ("float32" if trainer.args.device.type == "cpu" else "bfloat16")
            # From the adapter's own base, unquantised: weights of 4 bits cannot take up the adapter without loss.
            merged = load_model(ModelSpec(str(adapter), dtype=dtype, device="cpu")).model
            merged.save_pretrained(output)
            trainer.processing_class.save_pretrained(output)
    else:
        trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        write_card(output, config, trainer.card_facts, trainer.history)
    trainer.accelerator.wait_for_everyone()


def _just_validated(trainer) -> bool:
    return any(
        entry.get("step") == trainer.state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in trainer.state.log_history
    )


def _start_figures(output: Path) -> dict[str, float] | None:
    return json.loads((output / "data.json").read_text(encoding="utf-8"))["start"]


def _fingerprint(sets: Sequence[RatingSet]) -> str:
    digest = hashlib.sha256()
    for s in sets:
        digest.update(f"{s.name}:{len(s)}:{[p.share for p in s.preferences]}".encode())
        for picture, quality in zip(s.pictures, s.quality, strict=True):
            digest.update(f"{Path(picture.name).name}:{quality!r};".encode())
    return digest.hexdigest()


def _check_output(output: Path, config: RankerConfig, fingerprint: str, resume: bool) -> Path | None:
    """The checkpoint to continue from; an error where results are in the way or the run to continue is another one."""
    started = (output / "ranker.json").is_file()
    if not resume:
        if started or (output / "config.json").is_file():
            raise ConfigError(
                f"Expected an output folder without a run in it, but {output} holds one: resume it (--resume), or "
                "choose another folder."
            )
        return None
    if not started:
        raise ConfigError(f"Expected a run to resume in {output}, but it has no ranker.json.")
    different = config.differences(RankerConfig.load(output))
    if different:
        name, (now, then) = next(iter(different.items()))
        raise ConfigError(
            f"Expected the settings of the run in {output}, but {name} is {now!r} and was {then!r}"
            + (f" ({len(different) - 1} more differ)" if len(different) > 1 else "")
            + ". A resumed run must be the same run; to train further otherwise, start a new one from its model."
        )
    data = output / "data.json"
    if data.is_file() and json.loads(data.read_text(encoding="utf-8"))["data"] != fingerprint:
        raise ConfigError(f"Expected the data of the run in {output}, but pictures or scores have changed since.")
    return last_checkpoint(output)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end, None if there is none."""
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        sharded = any(folder.glob("global_step*")) or any(folder.glob("optimizer_*"))  # DeepSpeed, FSDP
        if all((folder / name).is_file() for name in (_COMPLETE[:1] if sharded else _COMPLETE)):
            return folder
    return None
