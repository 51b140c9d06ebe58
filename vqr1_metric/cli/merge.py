"""``vqr1 merge``: score files of several runs into one."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqr1_metric.cli import UsageError
from vqr1_metric.score_files import RecordError, file_format


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help="what vqr1 score wrote, of one model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="all rows, .csv or .jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--silent", action="store_true", help="no summary")


def run(args: argparse.Namespace) -> int:
    """Merge, and say how many rows there are."""
    try:
        file_format(args.output)
    except RecordError as error:
        raise UsageError(str(error)) from None
    from vqr1_metric.score_merge import merge

    rows, repeated = merge(args.parts, args.output, overwrite=args.overwrite)
    if not args.silent:
        more = f" ({repeated} more were of images that have one)" if repeated else ""
        print(f"rows in {args.output}: {rows}{more}")
    return 0
