"""``vqr1 diff``: methods on the same scenes: which is better, and how surely."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_model_options, build_scorer, probability, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "methods",
        nargs="+",
        metavar="METHOD",
        help="two or more folders of pictures of the same scenes, or files of scores that vqr1 score wrote",
    )
    pairs = parser.add_argument_group("which pictures belong together")
    pairs.add_argument(
        "--strip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="take this off the end of names, such as _out or '_x[234]' (a regular expression; again for more)",
    )
    pairs.add_argument(
        "--group",
        metavar="BY",
        help="scenes that are not independent (frames of a clip) count once: folder, FILE:COLUMN of a table, or a "
        "regular expression whose first group is the group, such as '^(.*)_frame'",
    )
    pairs.add_argument("-r", "--recursive", action="store_true", help="subfolders too (they always are; as in score)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the scenes' scores and differences as .csv")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the scores here, and use those that are there")
    parser.add_argument(
        "--level", type=probability, default=0.95, metavar="P", help="probability of intervals (default: 0.95)"
    )
    parser.add_argument("--json", action="store_true", help="the answer and all scenes as JSON")
    parser.add_argument("--silent", action="store_true", help="no progress bar")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Pair, score what is not scored, print the answer; 1 if no scene has all its scores."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise CommandError("vqr1 diff needs SciPy: pip install 'vqr1-metric[evaluate]'") from None
    if len(args.methods) < 2:
        raise UsageError("compare what? Give at least two folders or files of scores")
    check_output(args, ".csv")
    from vqr1_metric.evaluation.methods import diff

    with progress(0, silent=args.silent) as bar:

        def begin(total: int) -> None:
            bar.total = total
            bar.refresh()

        report = diff(
            args.methods,
            lambda: build_scorer(args),
            strip=args.strip,
            group=args.group,
            level=args.level,
            cache=args.cache,
            progress=bar.update,
            begin=begin,
        )
    for problem in report.pairing.problems:
        print(f"vqr1: {problem.subject} {problem.detail}", file=sys.stderr)
    if args.output is not None:
        args.output.write_text(report.csv(), encoding="utf-8", errors="backslashreplace")
    if report.order.left_out == len(report.pairing.scenes):
        raise CommandError(f"no scene has a score of every method ({'; '.join(report.failed)})")
    print(json.dumps(report.to_dict(), indent=1) if args.json else report.text())
    return 0


def check_output(args: argparse.Namespace, *suffixes: str) -> None:
    """Refuse an output file that cannot be written or would be lost.

    Raises:
        UsageError: another suffix.
        CommandError: no folder for it, or a file that is there, without ``--overwrite``.
    """
    path: Path | None = args.output
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"-o writes {' or '.join(suffixes)}: -o {path.with_suffix(suffixes[0]).name}")
    if not path.parent.is_dir():
        raise CommandError(f"no folder {str(path.parent)!r} to write {path.name!r} into")
    if path.exists() and not args.overwrite:
        raise CommandError(f"{path} exists: choose another name, or --overwrite it")
