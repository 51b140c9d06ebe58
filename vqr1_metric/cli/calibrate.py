"""``vqr1 calibrate``: fit a model's temperature to rated images, so that its intervals hold what they say."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqr1_metric.cli.diff import check_output
from vqr1_metric.cli.options import add_model_options, build_scorer, probability, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("labels", type=Path, metavar="LABELS", help="rated images, as for vqr1 evaluate")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images (default: beside the file)")
    parser.add_argument("--split", default="all", metavar="NAME", help="train, val or test (default: all)")
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("WORST", "BEST"),
        help="the ratings' worst and best score (default: 1 5)",
    )
    parser.add_argument("--column", action="append", default=[], metavar="ROLE=HEADER", help="as for vqr1 evaluate")
    parser.add_argument(
        "--level", type=probability, default=0.95, metavar="P", help="probability of the intervals (default: 0.95)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the calibration, .json")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the scores here, and use those that are there")
    parser.add_argument("--silent", action="store_true", help="no progress bar")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, say what intervals hold before and after, write."""
    check_output(args, ".json")
    from vqr1_metric.evaluation import calibrate
    from vqr1_metric.ratings import read_ratings

    columns = {role: header or None for role, _, header in (told.partition("=") for told in args.column)}
    lower = None if args.scale is None else args.scale[0] > args.scale[1]
    ratings = read_ratings(
        args.labels, args.images, strict=False, columns=columns, split=args.split, lower_is_better=lower
    )
    found = calibrate(
        build_scorer(args),
        ratings,
        None if args.scale is None else (args.scale[0], args.scale[1]),
        level=args.level,
        cache=args.cache,
        progress=lambda label, total: progress(total, silent=args.silent, label=label),
    )
    print(f"{found.images} rated images of {found.ratings}: of the mean opinions, intervals of {found.level:.0%} hold")
    print(f"  {found.before:.1%} as the model states them")
    print(f"  {found.coverage:.1%} at temperature {found.temperature:.3g}, on images that the fit did not see")
    if args.output is not None:
        found.write(args.output)
        print(f"written to {args.output}: give it with calibration=, or put it into the model's folder")
    return 0
