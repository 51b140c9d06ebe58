"""``vqr1 train``: from rated pictures to a ranker that the metric loads. See docs/training.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from vqr1_metric.cli import CommandError
from vqr1_metric.train_ranker.config import PRESETS, RankerConfig

#: Settings with an option of their own: option, setting, further arguments of argparse.
_OPTIONS = (
    ("--images", "images", {"nargs": "+", "metavar": "DIR", "help": "folders of the pictures"}),
    ("--model", "model", {"metavar": "NAME", "help": "model to start from: Hub name, local folder or nano"}),
    ("--revision", "revision", {"help": "branch, tag or commit on the Hub"}),
    ("--validation", "validation", {"nargs": "+", "metavar": "FILE", "help": "ratings to validate on"}),
    ("--validation-fraction", "validation_fraction", {"type": float, "metavar": "X", "help": "or hold out this share"}),
    ("--dmos", "lower_is_better", {"nargs": "+", "metavar": "SET", "help": "data sets whose scores are better if low"}),
    ("--mos", "higher_is_better", {"nargs": "+", "metavar": "SET", "help": "whose dmos is better if high (KADID-10k)"}),
    ("--objective", "objective", {"help": "sampled (RL2R), exact (RL2R without sampling) or fidelity"}),
    ("--epochs", "epochs", {"type": float}),
    ("--max-steps", "max_steps", {"type": int}),
    ("--learning-rate", "learning_rate", {"type": float}),
    ("--images-per-device", "images_per_device", {"type": int, "metavar": "N"}),
    ("--images-per-comparison", "images_per_comparison", {"type": int, "metavar": "N"}),
    ("--comparison-scope", "comparison_scope", {"help": "process or global: may comparisons span processes?"}),
    ("--num-generations", "num_generations", {"type": int, "metavar": "K", "help": "replies for each picture"}),
    ("--micro-batch", "micro_batch", {"type": int, "metavar": "N", "help": "lower it when memory is short"}),
    ("--lora-rank", "lora_rank", {"type": int, "metavar": "R", "help": "train an adapter; 0 trains all weights"}),
    ("--max-pixels", "max_pixels", {"type": int, "metavar": "N", "help": "larger pictures are scaled down"}),
    ("--eval-steps", "eval_steps", {"type": int, "metavar": "N"}),
    ("--save-steps", "save_steps", {"type": int, "metavar": "N"}),
    ("--report-to", "report_to", {"nargs": "+", "metavar": "NAME", "help": "tensorboard, trackio"}),
    ("--seed", "seed", {"type": int}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--data", nargs="+", metavar="FILE", help="ratings: .jsonl, .csv, .txt, hf:NAME")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder of the trained model")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: as published)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=None, help="ask for a reasoning")
    parser.add_argument("--vllm", action="store_true", help="sample replies with vLLM")
    for option, setting, more in _OPTIONS:
        parser.add_argument(option, dest=setting, **more)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="any other setting of RankerConfig, the value as JSON; trainer.NAME=VALUE is passed to the trainer",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    config = build_config(args)
    # Settings are checked before torch loads, data before weights do.
    from accelerate import PartialState

    from vqr1_metric.train_ranker.run import train

    output = train(config, resume=args.resume)
    # Threads of a process group that is left to the interpreter's end now and then abort it there.
    PartialState().destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"the trained model is in {output}: VisualQualityR1Score(model={str(output)!r})")
    return 0


def build_config(args: argparse.Namespace) -> RankerConfig:
    """The settings that the options describe; with ``--resume`` those of the run, changed by the options given."""
    given = {name: value for _, name, _ in _OPTIONS if (value := getattr(args, name)) is not None}
    given["output_dir"] = args.output
    if args.data:
        given["data"] = args.data
    if args.thinking is not None:
        given["thinking"] = args.thinking
    if args.vllm:
        given["use_vllm"] = True
    trainer = {}
    for setting in args.settings:
        name, value = _parse(setting)
        if name.startswith("trainer."):
            trainer[name.removeprefix("trainer.")] = value
        else:
            given[name] = value
    if trainer:
        given["trainer"] = trainer
    if args.resume and not args.preset:
        try:
            start = RankerConfig.load(args.output)
        except FileNotFoundError:
            raise CommandError(f"there is no run to resume in {args.output}: it has no ranker.json") from None
        return dataclasses.replace(start, **given)
    return RankerConfig.preset(args.preset, **given) if args.preset else RankerConfig(**given)


def _parse(setting: str) -> tuple[str, object]:
    name, separator, text = setting.partition("=")
    known = {f.name for f in dataclasses.fields(RankerConfig)}
    if not separator or not (name in known or name.startswith("trainer.")):
        raise CommandError(f"expected --set NAME=VALUE with a setting of RankerConfig, but got {setting!r}")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text
