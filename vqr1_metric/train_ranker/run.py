"""One training run: read and check, load, train, write the model."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.checks import ConfigError, TrainingError
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.data import content_digest, prepare_data
from vqr1_metric.train_ranker.resume import check_output, last_checkpoint, read_record, write_record

if TYPE_CHECKING:
    from vqr1_metric.train_ranker.exact import ExactRankerTrainer
    from vqr1_metric.train_ranker.trainer import RankerTrainer

    Trainer = RankerTrainer | ExactRankerTrainer

__all__ = ["Stopped", "build_trainer", "last_checkpoint", "prepare_data", "train"]


class Stopped(Exception):
    """A signal ended a run; the message says how to go on.

    Args:
        number: of the signal; None on a process that another one told.
    """

    def __init__(self, number: int | None, message: str) -> None:
        super().__init__(message)
        self.number = number


def train(
    config: RankerConfig,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    reward_funcs: Sequence[Callable[..., Any]] = (),
    tell: Callable[[str], object] = print,
) -> Path:
    """Train a ranker and write it to ``config.output_dir``, where ``VisualQualityR1Score(model=...)`` finds it.

    Everything that can be wrong with settings and data is found before any weights load. Under torchrun or accelerate
    every process calls this.

    Args:
        config: the settings.
        resume: continue the run in ``output_dir`` from its last whole checkpoint; nothing may have changed that decides
            the result. The continued run equals the uninterrupted one bit by bit (on one machine, with deterministic
            kernels, and the same micro batch).
        callbacks: further ``transformers.TrainerCallback``.
        reward_funcs: further rewards, see :class:`~vqr1_metric.train_ranker.trainer.RankerTrainer`.
        tell: takes lines for the user, on the main process.

    Returns:
        The folder of the trained model; that of the best checkpoint is ``best`` below it, where it is not the last.

    Raises:
        ConfigError, RatingError: settings or data that cannot be trained on.
        TrainingError: a run that is broken or learns nothing.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    processes, main = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    config.check(processes)
    output = Path(config.output_dir)
    digests: dict[int, str] = {}
    training, validation = prepare_data(config, processes, open_pictures=main, digests=digests)
    arguments_of(config, validation, len(reward_funcs))
    record = None
    if main:
        record = {"data": content_digest([*training, *validation], digests), "processes": processes}
    checkpoint = check_output(output, config, record, resume)
    config_used = _after_cold_start(config, training, output, resume)
    trainer = build_trainer(config_used, training, validation, callbacks, reward_funcs)
    trainer.start_model = config.model
    if checkpoint is None:
        trainer.check_start()
    _check_model(output, trainer, resume)
    validated = any(len(s) for s in validation)
    say: Callable[[str], object] = tell if main else (lambda line: None)
    if validated:
        # The start model's figures, to see what training gains.
        trainer.start_figures = read_record(output)["start"] if checkpoint else trainer.evaluate()
        trainer.take_start(trainer.start_figures or {})
        say(f"validation of the start model: {figures_text(trainer.start_figures or {})}")
    trainer.accelerator.wait_for_everyone()  # the others have looked at the folder
    if main:
        config.save(output)
        if record is not None and checkpoint is None:
            write_record(output, **record, model=trainer.loaded.revision, start=trainer.start_figures)
    try:
        _train(trainer, checkpoint, output)
        trainer.check_end()
    except TrainingError:
        if main:  # what the last step left is broken: nobody should go on from it
            shutil.rmtree(output / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
        raise
    if validated and not _just_validated(trainer):
        trainer.evaluate()
    save_result(trainer, output)
    best = _write_best(trainer, output)
    if main:
        for line in _ending(trainer, output, best):
            say(line)
        if config.push_to_hub:
            say(f"uploaded to {_push(config.push_to_hub, output)}")
    return output


def build_trainer(
    config: RankerConfig,
    training: Sequence[RatingSet],
    validation: Sequence[RatingSet] = (),
    callbacks: Sequence[Any] = (),
    reward_funcs: Sequence[Callable[..., Any]] = (),
) -> Trainer:
    """The trainer of the objective, with its model loaded."""
    if config.objective == "sampled":
        from vqr1_metric.train_ranker.trainer import RankerTrainer

        return RankerTrainer(None, config, training, validation, reward_funcs, callbacks=callbacks)
    if reward_funcs:
        raise ConfigError(f"Expected no further rewards with objective={config.objective!r}: there are no replies.")
    from vqr1_metric.train_ranker.exact import ExactRankerTrainer

    return ExactRankerTrainer(None, config, training, validation, callbacks=callbacks)


def arguments_of(config: RankerConfig, validation: Sequence[RatingSet] = (), further: int = 0) -> Any:
    """The arguments that the trainer will have; what they complain about is found before any weights load."""
    if config.objective == "sampled":
        from vqr1_metric.train_ranker.trainer import find_function, grpo_config

        for name in config.rewards:
            find_function(name)
        return grpo_config(config, validation, further + len(config.rewards))
    from vqr1_metric.train_ranker.exact import exact_arguments

    return exact_arguments(config, validation)


def _train(trainer: Trainer, checkpoint: Path | None, output: Path) -> None:
    """Train to the end, or to a signal."""
    import torch

    from vqr1_metric.train_ranker.callbacks import SignalStop

    def any_process(mine: bool) -> bool:
        if trainer.args.world_size == 1:
            return mine
        flag = torch.tensor([mine], dtype=torch.float32, device=trainer.args.device)
        return bool(trainer.accelerator.gather(flag).any())

    with SignalStop(any_process, trainer.ranker.num_iterations) as signals:
        trainer.add_callback(signals)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if signals.stopped and trainer.state.global_step < trainer.state.max_steps:
        name = "a signal of another process" if signals.received is None else signal.Signals(signals.received).name
        raise Stopped(
            signals.received,
            f"{name}: stopped after step {trainer.state.global_step}, with a checkpoint; it goes on with --resume -o "
            f"{output}",
        )


def _check_model(output: Path, trainer: Trainer, resume: bool) -> None:
    """Complain about a run that goes on from another start model."""
    if not resume or not (output / "data.json").is_file():
        return
    then = read_record(output).get("model")
    if then not in (None, trainer.loaded.revision):
        raise ConfigError(
            f"Expected the start model of the run in {output} ({then}), but {trainer.ranker.model} is another one "
            f"({trainer.loaded.revision})."
        )


def _after_cold_start(config: RankerConfig, training: Sequence[RatingSet], output: Path, resume: bool) -> RankerConfig:
    """The settings of what follows the cold start, which is made if there is none yet."""
    if not config.cold_start_steps:
        return config
    folder = (output / "cold-start").resolve()  # a LoRA adapter will name it as its base
    if not (resume and (folder / "config.json").is_file()):
        from vqr1_metric.train_ranker.coldstart import cold_start

        cold_start(config, training, folder)
    return replace(config, model=str(folder), revision=None)


def save_result(trainer: Trainer, output: Path) -> None:
    """Write the trained model: all weights, merged ones of a LoRA run unless ``merge=False``, tokenizer, model card."""
    from vqr1_metric.train_ranker.card import write_card

    config = trainer.ranker
    if config.lora_rank and config.merge:
        trainer.save_model(str(output / "adapter"))
        if trainer.is_world_process_zero():
            _merge(trainer, output / "adapter", output)
    else:
        trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        write_card(output, config, trainer.card_facts, trainer.history)
    trainer.accelerator.wait_for_everyone()


def _merge(trainer: Trainer, adapter: Path, folder: Path) -> None:
    """Write the adapter merged into its base, unquantised: weights of 4 bits cannot take it up without loss."""
    from vqr1_metric.backends.loading import ModelSpec, load_model

    dtype = trainer.ranker.dtype or ("float32" if trainer.args.device.type == "cpu" else "bfloat16")
    merged: Any = load_model(ModelSpec(str(adapter), dtype=dtype, device="cpu")).model
    merged.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


#: Files of a checkpoint that are not the model's.
_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "files.json", "scaler")


def _write_best(trainer: Trainer, output: Path) -> int | None:
    """Copy the model of the best checkpoint to ``best``; its step, None where the last is the best or none is known."""
    from vqr1_metric.train_ranker.card import write_card

    step, config = trainer.state.best_global_step, trainer.ranker
    source, target = output / f"checkpoint-{step}", output / "best"
    if not config.keep_best or not step or step == trainer.state.global_step or not source.is_dir():
        return None
    if trainer.is_world_process_zero():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        if config.lora_rank and config.merge:
            _merge(trainer, source, target)
        else:
            for path in source.iterdir():
                if path.is_file() and not path.name.startswith(_OF_TRAINING):
                    shutil.copy2(path, target)
        history = [entry for entry in trainer.history if entry.get("step", 0) <= step]
        write_card(target, config, trainer.card_facts, history)
    trainer.accelerator.wait_for_everyone()
    return int(step)


def _ending(trainer: Trainer, output: Path, best: int | None) -> list[str]:
    """Before and after, and which model is where."""
    from vqr1_metric.train_ranker.callbacks import main_figure

    validated = [entry for entry in trainer.state.log_history if main_figure(entry, "eval_") is not None]
    if not validated:
        return [f"the last model (step {trainer.state.global_step}) is in {output}; nothing was validated"]
    start, last = main_figure(trainer.start_figures or {}, "eval_"), main_figure(validated[-1], "eval_")
    lines = [
        f"validation at the end: {figures_text(validated[-1])}",
        f"{start or 0:.3f} at the start, {last or 0:.3f} at the end (step {trainer.state.global_step}), in {output}",
    ]
    if best is not None:
        lines.append(f"{trainer.state.best_metric:.3f} at step {best}, the best, in {output / 'best'}")
    top = trainer.state.best_metric if trainer.state.best_metric is not None else last
    if start is not None and top is not None and not top > start:
        lines.append("no step was better than the start model")
    return lines


def figures_text(figures: Mapping[str, float]) -> str:
    """Validation figures in a line: ``SRCC koniq 0.812, SRCC spaq 0.790``."""
    kinds = {"eval_srcc_": "SRCC", "eval_pairs_": "pairs"}
    told = [
        f"{kind} {name.removeprefix(prefix)} {value:.3f}"
        for name, value in figures.items()
        for prefix, kind in kinds.items()
        if name.startswith(prefix)
    ]
    return ", ".join(told) or "none"


def _push(repository: str, folder: Path) -> str:
    """Upload the finished model, without checkpoints, to the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repository, exist_ok=True, private=True)
    api.upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=["checkpoint-*", "logs/*", "cold-start/*", "data.json"]
    )
    return str(url)


def _just_validated(trainer: Trainer) -> bool:
    return any(
        entry.get("step") == trainer.state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in trainer.state.log_history
    )
