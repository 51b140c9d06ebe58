"""Options that several commands share, and the scorer they describe."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from vqr1_metric.protocol import MODES, QUESTIONS

if TYPE_CHECKING:
    from tqdm import tqdm

    from vqr1_metric.images.find import ImageFinder
    from vqr1_metric.scorer import QualityScorer


#: Names the model where ``--model`` does not.
MODEL_VARIABLE = "VQR1_MODEL"
_SERVER_OPTIONS = ("concurrency", "timeout", "tries", "threshold")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, but got {value}")
    return value


def seed(text: str) -> int:
    """An argparse type: an integer from 0 to 2**31 - 1."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}, but got {value}")
    return value


def shard(text: str) -> tuple[int, int]:
    """An argparse type: a part and the number of parts, such as ``2/8``."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected a part and the number of parts, such as 2/8, but got {text!r}")
    return int(part), int(parts)


def probability(text: str) -> float:
    """An argparse type: a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, but got {text}")
    return value


def add_bootstrap_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of figures with intervals."""
    parser.add_argument(
        "--level", type=probability, default=0.95, metavar="P", help="probability of the intervals (default: 0.95)"
    )
    parser.add_argument(
        "--resamples", type=positive, default=1000, metavar="N", help="of the bootstrap (default: 1000)"
    )


def progress(total: int, *, silent: bool, label: str | None = None) -> tqdm[Any]:
    """A bar with the time left, on stderr."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0  # in a log file every refresh is a line of its own
    return tqdm(
        total=total, desc=label, unit="picture", file=sys.stderr, mininterval=interval, disable=silent, leave=False
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which images."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "inputs",
        nargs="*",
        metavar="PATH",
        help="images, folders, patterns such as 'photos/*.jpg', lists (.txt, .csv, .jsonl); - is a list on stdin",
    )
    group.add_argument("-r", "--recursive", action="store_true", help="folders with their subfolders")
    group.add_argument(
        "--files-from", action="append", default=[], metavar="FILE", help="take the names in FILE, - for stdin"
    )
    group.add_argument("-0", "--null", action="store_true", help="names in such lists end with a NUL (find -print0)")
    group.add_argument("--urls", action="store_true", help="fetch https:// addresses too")
    group.add_argument("--verbose", action="store_true", help="say on stderr what is passed over, and why")


def image_finder(args: argparse.Namespace, *, note: bool = True) -> ImageFinder:
    """The images that the arguments name.

    Raises:
        UsageError: if they name none.
    """
    from vqr1_metric.cli import UsageError, warn
    from vqr1_metric.images.find import ImageFinder

    if not (args.inputs or args.files_from):
        raise UsageError("name images, folders or lists, or --files-from FILE")
    notes: dict[str, Any] = (
        {"note": lambda name, reason: warn(f"{name}: passed over: {reason}")} if note and args.verbose else {}
    )
    if getattr(args, "every", None):
        from vqr1_metric.images.video import VIDEO_SUFFIXES

        notes["suffixes"] = VIDEO_SUFFIXES
    return ImageFinder(
        args.inputs, recursive=args.recursive, files_from=args.files_from, null=args.null, urls=args.urls, **notes
    )


def add_model_options(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    """Options that say which model answers, how and where."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="Hub name, local folder or nano (default: VQR1_MODEL, else TianheWu/VisualQuality-R1-7B)",
    )
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--device-map", metavar="MAP", help="auto: spread the layers over several GPUs")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU)")
    group.add_argument("--quantization", choices=("8bit", "4bit"), help="smaller weights, through bitsandbytes")
    group.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens of one forward pass; fewer need less memory"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="every picture alone: no digit of its score depends on the others"
    )
    group.add_argument("--max-pixels", type=positive, metavar="N", help="larger pictures are scaled down to N pixels")
    group.add_argument("--min-pixels", type=positive, metavar="N", help="smaller pictures are scaled up to N pixels")
    if mode:
        group.add_argument(
            "--mode",
            choices=MODES,
            default="score",
            help="score: one forward pass, deterministic (default); think: sampled reasonings; sample: sampled replies",
        )
        group.add_argument(
            "--question",
            choices=[name for name, asked in QUESTIONS.items() if asked.images == 1 and not asked.needs_prompt],
            help="what is asked (default: visualquality-r1); others are for --mode score. `vqr1 ask` asks several",
        )
        group.add_argument("--thinking", action="store_true", help="let --mode sample ask the thinking question")
        group.add_argument(
            "--server",
            metavar="URL",
            help="ask the model behind this OpenAI-compatible server, such as http://127.0.0.1:8000/v1 (vLLM, SGLang); "
            "an API key is read from VQR1_SERVER_KEY",
        )
        server = parser.add_argument_group("server", "with --server")
        server.add_argument("--concurrency", type=positive, metavar="N", help="requests at a time (default: 64)")
        server.add_argument("--timeout", type=float, metavar="S", help="seconds for one request (default: 120)")
        server.add_argument("--tries", type=positive, metavar="N", help="of a request that fails (default: 6)")
        server.add_argument(
            "--threshold",
            type=probability,
            metavar="P",
            help="branches with less of the mass are not asked for (0.005)",
        )
    group.add_argument("--num-samples", type=positive, metavar="K", help="sampled replies a picture (default: 6)")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="length limit of a reply (default: 512)")
    group.add_argument("--seed", type=seed, help="of the sampling (default: 0)")


def build_scorer(args: argparse.Namespace) -> QualityScorer:
    """The scorer that the options describe; the weights are not loaded yet."""
    from vqr1_metric.cli import UsageError
    from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

    names = (
        "mode",
        "thinking",
        "question",
        "revision",
        "device",
        "device_map",
        "dtype",
        "quantization",
        "batch_tokens",
        "deterministic",
        "max_pixels",
        "min_pixels",
        "num_samples",
        "max_new_tokens",
        "seed",
    )
    if getattr(args, "thinking", False) and args.mode != "sample":
        raise UsageError("--thinking is about --mode sample; --mode think always asks for a reasoning")
    # What was not given is left to the scorer's own defaults.
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    unused = [name for name in _SERVER_OPTIONS if getattr(args, name, None) is not None]
    if unused and not args.server:
        raise UsageError(f"--{unused[0]} is about --server")
    if getattr(args, "server", None):
        return _remote_scorer(args, given)
    try:
        scorer = QualityScorer(args.model or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL, **given)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if scorer.spec.folder is not None:
        # A bar for weights that load in a second only hides the one that matters; downloads keep theirs.
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return scorer


def _remote_scorer(args: argparse.Namespace, given: dict[str, Any]) -> QualityScorer:
    """A scorer whose model is behind ``--server``, under the name ``--model`` or the only one there."""
    from vqr1_metric.backends.base import ModelError
    from vqr1_metric.backends.http import HttpBackend
    from vqr1_metric.cli import UsageError
    from vqr1_metric.scorer import QualityScorer

    local = [name for name in ("device", "device_map", "dtype", "quantization", "revision") if name in given]
    if local:
        option = "--" + local[0].replace("_", "-")
        raise UsageError(f"{option} is about a model in this process; with --server, start the server with it")
    options = {name: getattr(args, name) for name in _SERVER_OPTIONS if getattr(args, name) is not None}
    try:
        backend = HttpBackend(args.server, args.model, **options)
    except ModelError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    return QualityScorer(backend.model_id, backend=backend, **given)
