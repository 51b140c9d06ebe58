"""``vqr1 compare``: which of two pictures looks better, and how surely."""

from __future__ import annotations

import argparse
import json

from vqr1_metric import score_files
from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_model_options, build_scorer
from vqr1_metric.images.names import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("a", metavar="A", help="a picture")
    parser.add_argument("b", metavar="B", help="another picture")
    parser.add_argument("--json", action="store_true", help="the comparison as JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a picture could not be read."""
    comparison = build_scorer(args).compare(args.a, args.b)
    results = (comparison.a, comparison.b)
    for result in results:
        if result.error is not None:
            raise CommandError(result.error)
    chance = comparison.win_probability
    if args.json:
        rows = {key: score_files.as_json(result, details=False) for key, result in zip("ab", results, strict=True)}
        answer = {"a_wins": round(chance, 6), "b_wins": round(1 - chance, 6), "winner": comparison.winner}
        print(json.dumps(rows | answer))
        return 0
    print(f"{'':>5}  {'score ± std':<12}  looks better  picture")
    for key, result, wins in zip("AB", results, (chance, 1 - chance), strict=True):
        print(f"{key:>5}  {result.score:5.2f} ± {result.std:4.2f}  {wins:>12.1%}  {printable(result.name)}")
    winners = {"a": f"A, {comparison.a.name}", "b": f"B, {comparison.b.name}", "tie": "neither: it is a coin toss"}
    print(f"winner: {printable(winners[comparison.winner or 'tie'])}")
    return 0
