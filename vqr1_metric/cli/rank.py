"""``vqr1 rank``: pictures from best to worst, each with the probability that it beats the next."""

from __future__ import annotations

import argparse
import json
import math

from vqr1_metric import score_files
from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_model_options, build_scorer
from vqr1_metric.images import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("inputs", nargs="+", metavar="PATH", help=find.HELP)
    parser.add_argument("-r", "--recursive", action="store_true", help="folders with their subfolders")
    parser.add_argument("--json", action="store_true", help="the ranking as JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the ranking; 1 if no picture could be read."""
    scorer = build_scorer(args)
    names = list(dict.fromkeys(find.pictures(args.inputs, args.recursive)))
    ranking = scorer.rank(names)
    if args.json:
        rows = [
            {
                "rank": place.rank,
                "tied": place.tied,
                "beats_next": place.beats_next,
                **score_files.as_json(place.result, details=False),
            }
            for place in ranking
        ]
        print(json.dumps(rows, indent=1))
    else:
        print(f"place  {'score ± std':<12}  beats next  picture")
        for place in ranking:
            print(_line(place))
        if any(place.tied for place in ranking):
            print("= ties with the others of its place: a comparison would be a coin toss")
    if all(math.isnan(place.result.score) for place in ranking):
        raise CommandError("nothing was ranked: no picture could be read or judged")
    return 0


def _line(place) -> str:
    result = place.result
    if place.rank is None:
        return f"    -    nan  {'':<5}  {'-':>10}  {result.name}: {score_files.as_row(result)['error']}"
    chance = f"{place.beats_next:.0%}" if place.beats_next is not None else "-"
    place_and_mark = f"{place.rank:4d}{'=' if place.tied else ' '}"
    return f"{place_and_mark}  {result.score:5.2f} ± {result.std:4.2f}  {chance:>10}  {result.name}"
