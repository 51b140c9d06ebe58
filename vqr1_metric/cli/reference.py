"""``vqr1 reference``: percentiles of a set of images, so that a score can be said to be better than so many of them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vqr1_metric.cli import UsageError
from vqr1_metric.cli.diff import check_output
from vqr1_metric.cli.options import add_model_options, build_scorer, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a folder of images to score, or a reference made before (.json)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the reference, .json")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--name", help="what the images are (default: the folder's name)")
    parser.add_argument(
        "--score", type=float, action="append", default=[], metavar="X", help="say what this score means"
    )
    parser.add_argument("--scores", type=Path, metavar="FILE", help="say what each score of vqr1 score's file means")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the scores here, and use those that are there")
    parser.add_argument("--silent", action="store_true", help="no progress bar")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Make or read a reference, say what scores mean."""
    check_output(args, ".json")
    from vqr1_metric.evaluation import Reference, reference

    if args.source.suffix.lower() == ".json":
        if args.output is not None:
            raise UsageError("-o writes the reference of a folder of images; this is a reference already")
        found = Reference.read(args.source)
    else:
        found = reference(
            build_scorer(args),
            args.source,
            args.name,
            cache=args.cache,
            progress=lambda label, total: progress(total, silent=args.silent, label=label),
        )
    if args.output is not None:
        found.write(args.output)
    if args.scores is not None:
        from vqr1_metric.evaluation.peers import read_scores

        for name, row in read_scores(args.scores).items():
            print(f"{_percent(found.percentile(row['score']))}  {row['score']:.3f}  {name}")
    for score in args.score:
        print(f"{score:g}: better than {_percent(found.percentile(score)).strip()} of {found.images} {found.name}")
    if args.scores is None and not args.score:
        print(f"{found.images} {found.name}: percentiles of the scores of {found.model}")
        print("  ".join(f"{p}%: {found.scores[p]:.2f}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)))
    return 0


def _percent(value: float) -> str:
    return "   –" if math.isnan(value) else f"{value:3.0f}%"
