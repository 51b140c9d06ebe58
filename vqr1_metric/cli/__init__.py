"""The command line ``vqr1``. A command is one entry of ``COMMANDS`` and one module of that name in this package.

The module offers ``add_arguments(parser)`` and ``run(args) -> exit code``. Only the module of the command that was
asked for is imported, and none imports torch before its ``run``, so that ``vqr1 --help`` answers at once.

Exit codes: 0 done, 1 nothing was done (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TextIO

from vqr1_metric import __version__
from vqr1_metric.cli.streams import forgiving_stderr, give_up, open_standard_streams
from vqr1_metric.images.names import printable
from vqr1_metric.redaction import redact
from vqr1_metric.score_files import RecordError

#: Command -> what it does, in the order of the help text.
COMMANDS = {
    "score": "score pictures, folders, patterns and lists; write a table, CSV or JSON lines",
    "merge": "score files of several runs, such as the parts of --shard, into one",
    "rank": "order pictures from best to worst, ties marked",
    "compare": "which of two pictures looks better, and how surely",
    "ask": "closed questions about pictures: levels, attributes, alignment, or your own",
    "explain": "the score distribution of a picture and the model's reasoning",
    "evaluate": "agreement with people: correlations, intervals and tests against others",
    "train": "from rated pictures to a ranker that scores them",
    "generate": "make n pictures of every prompt with a diffusers pipeline, keep the best",
    "serve": "score pictures over HTTP, with a page to try it",
    "report": "a page of scored pictures that opens offline",
    "diff": "folders of the same scenes: which method is better, and how surely",
    "calibrate": "fit a model's intervals to rated images, so that they hold what they say",
    "reference": "percentiles of a set of images: what a score means",
    "info": "versions, devices and what a model is",
}


class CommandError(Exception):
    """A command cannot do what was asked; the message, one line, says what to do instead."""


class UsageError(CommandError):
    """The arguments do not fit together; the exit code is 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vqr1`` with these arguments (``sys.argv`` by default) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    open_standard_streams()
    parser = build_parser(argv[0] if argv else None)
    args = parser.parse_args(argv)
    # Read when torch loads. Threads that spin while they wait make a small model 20 times slower wherever another
    # program uses the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silent = getattr(args, "silent", False)
    if silent:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.disable(logging.WARNING)
    with forgiving_stderr(), warnings.catch_warnings():
        warnings.showwarning = (lambda *args, **options: None) if silent else _show_warning
        try:
            code: int = _module(args.command).run(args)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as error:
            return _fail(str(error) or "interrupted", 130)
        except BrokenPipeError:  # `vqr1 ... | head`: nobody reads on
            give_up(sys.stdout)
            return 1
        except UsageError as error:
            return _fail(str(error), 2)
        except Exception as error:
            message = _one_line(error)
            if message is None:
                raise
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                return _fail(message, 1)
            give_up(sys.stdout)
            return _fail(message, 1)
        finally:
            if silent:
                logging.disable(logging.NOTSET)


def warn(message: str) -> None:
    """Print a warning on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"vqr1: warning: {one_line(message)}", file=sys.stderr)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of ``command`` (of every command for None)."""
    parser = argparse.ArgumentParser(
        prog="vqr1",
        description="Picture quality on a scale of 1 to 5, without a reference picture.",
        epilog="`vqr1 COMMAND --help` explains a command. `--model nano` is the embedded model: no download.",
    )
    parser.add_argument("--version", action="version", version=f"vqr1_metric {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        if command in (None, name):
            _module(name).add_arguments(subparser)
    return parser


def _module(command: str) -> ModuleType:
    return import_module(f"{__name__}.{command}")


def _one_line(error: Exception) -> str | None:
    """What to tell the user, None for an error that is a fault of this program and deserves its traceback."""
    # The package's complaints about what it was given begin with "Expected".
    expected = isinstance(error, ValueError) and str(error).startswith("Expected ")
    if expected or isinstance(error, (CommandError, RecordError, OSError)):
        return str(error)
    if "torch" not in sys.modules:
        return None
    import torch

    from vqr1_metric.backends.base import ModelError
    from vqr1_metric.images import ImageError

    if isinstance(error, torch.OutOfMemoryError):
        return "out of device memory: try a smaller --batch-tokens or --max-pixels, or --device cpu"
    return str(error) if isinstance(error, (ModelError, ImageError)) else None


def _fail(message: str, code: int) -> int:
    print(f"vqr1: {one_line(message)}", file=sys.stderr)
    return code


def one_line(message: str) -> str:
    """A message on one line, as a terminal may show it, without keys."""
    return printable(" ".join(redact(message).split()))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):  # the others speak to programmers
        warn(str(message))
