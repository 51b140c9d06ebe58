"""``vqr1 train``: from rated pictures to a ranker that the metric loads. See docs/training.md."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqr1_metric.cli import CommandError, warn
from vqr1_metric.train_ranker.checks import TrainingError
from vqr1_metric.train_ranker.config import PRESETS, RankerConfig, read_settings

#: Settings with an option of their own: option, setting, further arguments of argparse. Types are the settings' own.
_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--data", "data", {"nargs": "+", "metavar": "FILE", "help": "ratings: .jsonl, .csv, .txt, .xlsx, hf:NAME"}),
    ("--images", "images", {"nargs": "+", "metavar": "DIR", "help": "folders of the pictures"}),
    ("--model", "model", {"metavar": "NAME", "help": "model to start from: Hub name, local folder or nano"}),
    ("--revision", "revision", {"help": "branch, tag or commit on the Hub"}),
    ("--validation", "validation", {"nargs": "+", "metavar": "FILE", "help": "ratings to validate on"}),
    ("--validation-fraction", "validation_fraction", {"metavar": "X", "help": "or hold out this share"}),
    ("--dmos", "lower_is_better", {"nargs": "+", "metavar": "SET", "help": "data sets whose scores are better if low"}),
    ("--mos", "higher_is_better", {"nargs": "+", "metavar": "SET", "help": "whose dmos is better if high (KADID-10k)"}),
    ("--objective", "objective", {"help": "sampled (RL2R), exact (RL2R without sampling), fidelity or distill"}),
    ("--teacher", "teacher", {"nargs": "+", "metavar": "FILE", "help": "distill: scores that `vqr1 score` wrote"}),
    ("--epochs", "epochs", {"metavar": "N"}),
    ("--max-steps", "max_steps", {"metavar": "N"}),
    ("--learning-rate", "learning_rate", {"metavar": "X"}),
    ("--images-per-device", "images_per_device", {"metavar": "N"}),
    ("--images-per-comparison", "images_per_comparison", {"metavar": "N"}),
    ("--comparison-scope", "comparison_scope", {"help": "process or global: may comparisons span processes?"}),
    ("--num-generations", "num_generations", {"metavar": "K", "help": "replies for each picture"}),
    ("--micro-batch", "micro_batch", {"metavar": "N", "help": "lower it when memory is short"}),
    ("--lora-rank", "lora_rank", {"metavar": "R", "help": "train an adapter; 0 trains all weights"}),
    ("--max-pixels", "max_pixels", {"metavar": "N", "help": "larger pictures are scaled down"}),
    ("--eval-steps", "eval_steps", {"metavar": "N"}),
    ("--save-steps", "save_steps", {"metavar": "N"}),
    ("--reward", "rewards", {"nargs": "+", "metavar": "FILE:FUNCTION", "help": "further rewards, for sampled"}),
    ("--report-to", "report_to", {"nargs": "+", "metavar": "NAME", "help": "tensorboard, trackio, wandb"}),
    ("--push-to-hub", "push_to_hub", {"metavar": "NAME", "help": "repository that takes the finished model"}),
    ("--seed", "seed", {"metavar": "N"}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the trained model")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: as published)")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML or JSON; options given here come before it")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, data, steps, memory and time; load and write nothing"
    )
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=None, help="ask for a reasoning")
    parser.add_argument(
        "--vllm", nargs="?", const="colocate", metavar="MODE", help="sample replies with vLLM: colocate or server"
    )
    for option, setting, more in _OPTIONS:
        parser.add_argument(option, dest=setting, **more)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="any other setting of RankerConfig; trainer.NAME=VALUE is passed to the trainer, as JSON or text",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    config = build_config(args)
    processes, main = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    config.check(processes)  # before torch loads; data before weights do
    if args.dry_run:
        from vqr1_metric.train_ranker.plan import dry_run

        print("\n".join(dry_run(config, processes)))
        return 0
    from accelerate import PartialState

    from vqr1_metric.train_ranker.run import Stopped, train

    try:
        output = train(config, resume=args.resume)
    except TrainingError as error:
        raise CommandError(str(error)) from None
    except Stopped as stop:
        if main:
            warn(str(stop))
        return 1 if stop.number is None else 128 + stop.number
    # Threads of a process group that is left to the interpreter's end now and then abort it there.
    PartialState().destroy_process_group()
    if main:
        print(f"the trained model is in {output}: VisualQualityR1Score(model={str(output)!r})")
    return 0


def build_config(args: argparse.Namespace) -> RankerConfig:
    """The settings that options and files describe; with ``--resume`` those of the run, changed by these."""
    given: dict[str, Any] = read_settings(args.config) if args.config else {}
    trainer: dict[str, Any] = dict(given.pop("trainer", {}) or {})
    if args.preset:
        given["preset"] = args.preset
    given |= {name: value for _, name, _ in _OPTIONS if (value := getattr(args, name)) is not None}
    if args.output is not None:
        given["output_dir"] = args.output
    if args.thinking is not None:
        given["thinking"] = args.thinking
    if args.vllm is not None:
        given |= {"use_vllm": True, "vllm_mode": args.vllm}
    for setting in args.settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise CommandError(f"expected --set NAME=VALUE, but got {setting!r}")
        if name.startswith("trainer."):
            trainer[name.removeprefix("trainer.")] = _value(text)
        else:
            given[name] = text
    if trainer:
        given["trainer"] = trainer
    if args.resume and "preset" not in given:
        folder = Path(given.get("output_dir", ""))
        try:
            start = RankerConfig.load(folder)
        except FileNotFoundError:
            raise CommandError(f"there is no run to resume in {folder}: it has no ranker.json") from None
        return RankerConfig.of({**asdict(start), **given})
    return RankerConfig.of(given)


def _value(text: str) -> Any:
    """A value of which nothing is known but how it is written."""
    import json

    words = {"true": True, "false": False, "none": None}
    try:
        return words[text.lower()] if text.lower() in words else json.loads(text)
    except ValueError:
        return text
