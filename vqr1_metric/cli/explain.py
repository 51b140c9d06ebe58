"""``vqr1 explain``: the score distribution of a picture and the model's reasoning."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from vqr1_metric import score_files
from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_image_options, add_model_options, build_scorer, image_finder
from vqr1_metric.images.names import printable

if TYPE_CHECKING:
    from vqr1_metric.results import ImageScore

#: Bins of the histogram are so many score units wide and bars at most so many characters long.
_BIN, _BAR = 0.25, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_image_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with the whole distribution")
    add_model_options(parser, mode=False)


def run(args: argparse.Namespace) -> int:
    """Explain picture after picture; 1 if none could be read."""
    finder = image_finder(args)
    scorer = build_scorer(args)
    from vqr1_metric.images.urls import fetch_ahead
    from vqr1_metric.results import ImageScore

    explained = False
    for name, content, problem in fetch_ahead(finder):
        failed = problem and ImageScore.failed(name, f"{name}: {problem}")
        result = failed or scorer.explain(content)
        explained = explained or result.error is None
        print(json.dumps(score_files.as_json(result)) if args.json else _as_text(result), flush=True)
    if not explained:
        raise CommandError("nothing was explained: no picture could be read or judged")
    return 0


def _as_text(result: ImageScore) -> str:
    if result.error is not None:
        return f"{printable(result.error)}\n"
    low, high = result.interval()
    lines = [
        printable(result.name),
        f"score {result.score:.2f} ± {result.std:.2f}, 95% of its distribution in {low:.2f} to {high:.2f}, "
        f"coverage {result.coverage:.1%}",
        *histogram(result.distribution.probabilities.tolist()),
    ]
    told = [reply for reply in result.replies if reply.reason is None and reply.reasoning]
    if not told:
        why = next((reply.reason for reply in result.replies if reply.reason), "its replies hold no reasoning")
        lines.append(f"This model gave no reasoning that could be read ({printable(why)}).")
        lines.append("The score is that of one forward pass.")
    for number, reply in enumerate(told, 1):
        text = f"{number}. ({reply.score:.2f}) {' '.join(reply.reasoning.split())}"
        lines.append(textwrap.fill(text, 100, subsequent_indent="   "))
    return "\n".join(lines) + "\n"


def histogram(probabilities: list[float]) -> list[str]:
    """Text bars of 401 probabilities, in bins of a quarter: ``1.00``, then (1.00, 1.25] and so on to (4.75, 5.00]."""
    width = round(_BIN * 100)
    bins = [(0, 1)] + [(start, start + width) for start in range(1, len(probabilities), width)]
    masses = [sum(probabilities[start:end]) for start, end in bins]
    scale = _BAR / max(masses)
    return [
        f"  {1 + (end - 1) / 100:.2f} {'#' * round(mass * scale):<{_BAR}} {mass:6.1%}"
        for (_, end), mass in zip(bins, masses, strict=True)
    ]
