"""``vqr1 rank``: pictures from best to worst, each with the probability that it beats the next."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from vqr1_metric import score_files
from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_image_options, add_model_options, build_scorer, image_finder
from vqr1_metric.images.names import printable

if TYPE_CHECKING:
    from vqr1_metric.results import RankedImage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_image_options(parser)
    parser.add_argument("--json", action="store_true", help="the ranking as JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the ranking; 1 if no picture could be read."""
    finder = image_finder(args)
    scorer = build_scorer(args)
    from vqr1_metric.results import rank_results
    from vqr1_metric.score_runs import stream_found

    ranking = rank_results(list(stream_found(scorer, finder)))
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


def _line(place: RankedImage) -> str:
    result = place.result
    if place.rank is None:
        return f"    -    nan  {'':<5}  {'-':>10}  {printable(result.error or '')}"
    chance = f"{place.beats_next:.0%}" if place.beats_next is not None else "-"
    place_and_mark = f"{place.rank:4d}{'=' if place.tied else ' '}"
    return f"{place_and_mark}  {result.score:5.2f} ± {result.std:4.2f}  {chance:>10}  {printable(result.name)}"
