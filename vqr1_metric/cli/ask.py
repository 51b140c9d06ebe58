"""``vqr1 ask``: closed questions about pictures, each picture encoded once for all of them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_image_options, add_model_options, build_scorer, image_finder
from vqr1_metric.images.names import printable
from vqr1_metric.protocol import QUESTIONS, Question, closed_answers

if TYPE_CHECKING:
    from vqr1_metric.results import ImageScore

#: Pictures that are asked about at a time.
_AT_A_TIME = 16
_DEFAULT = ("levels", "aesthetics", "sharpness", "noise", "exposure", "contrast", "colour", "composition")
#: Longer questions go by their number.
_NAME = 40
#: Answers shown for a question with more of them.
_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_image_options(parser)
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--question",
        action="append",
        dest="asked",
        metavar="TEXT",
        help="a question of your own, with --answers, or one of: "
        + ", ".join(name for name, question in QUESTIONS.items() if question.images == 1)
        + "; may be given several times (default: levels, aesthetics and the attributes)",
    )
    group.add_argument(
        "--answers",
        metavar="LIST",
        help="the closed set of answers to --question: yes,no (1 to 0, evenly) or sharp=1,soft=0.5,blurred=0",
    )
    group.add_argument("--prompt", metavar="TEXT", help="what the pictures were made from, for the question alignment")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture, with all probabilities")
    add_model_options(parser, mode=False)


def questions_of(args: argparse.Namespace) -> list[Question]:
    """The questions that the arguments name."""
    texts = args.asked or list(_DEFAULT)
    if args.answers is not None and args.asked is None:
        raise UsageError("--answers are those of a --question")
    questions = []
    for number, text in enumerate(texts, 1):
        if text in QUESTIONS:
            questions.append(QUESTIONS[text])
        elif args.answers is not None:
            name = text if len(text) <= _NAME else f"question {number}"
            questions.append(Question(text, closed_answers(args.answers), name))
        else:
            raise UsageError(f"{text!r} is none of {', '.join(QUESTIONS)}; a question of your own needs --answers")
    if any(question.images > 1 for question in questions):
        raise UsageError("a question about two pictures is asked by scorer.prefer(a, b), in Python")
    if any(question.needs_prompt for question in questions) and args.prompt is None:
        raise UsageError("the question alignment needs --prompt, what the pictures were made from")
    return questions


def run(args: argparse.Namespace) -> int:
    """Ask about picture after picture; 1 if none could be read."""
    questions, finder = questions_of(args), image_finder(args)
    scorer = build_scorer(args)
    answered = False

    def ask(names: list[str]) -> None:
        nonlocal answered
        for name, answers in zip(names, scorer.ask(names, questions, prompts=args.prompt), strict=True):
            answered |= any(answer.error is None for answer in answers.values())
            print(_as_json(name, answers) if args.json else _as_text(name, answers), flush=True)

    waiting: list[str] = []
    for found in finder:
        if found.problem:
            error = f"{found.name}: {found.problem}"
            print(json.dumps({"image": found.name, "error": error}) if args.json else printable(error), flush=True)
            continue
        waiting.append(found.name)
        if len(waiting) == _AT_A_TIME:
            ask(waiting)
            waiting = []
    if waiting:
        ask(waiting)
    if not answered:
        raise CommandError("nothing was answered: no picture could be read or judged")
    return 0


def _likely(answer: ImageScore) -> list[tuple[str, float]]:
    """Answers with their probabilities, the most probable first."""
    d = answer.distribution
    texts = d.answers or [f"{value:g}" for value in d.grid.tolist()]
    return sorted(zip(texts, d.probabilities.tolist(), strict=True), key=lambda pair: -pair[1])


def _as_json(name: str, answers: dict[str, ImageScore]) -> str:
    rows: dict[str, object] = {}
    for question, answer in answers.items():
        if answer.error is not None:
            rows[question] = {"error": answer.error}
            continue
        rows[question] = {
            "mean": answer.score,
            "std": answer.std,
            "entropy": float(answer.distribution.entropy),
            "coverage": answer.coverage,
            "probabilities": dict(_likely(answer)),
        }
    return json.dumps({"image": name, "answers": rows})


def _as_text(name: str, answers: dict[str, ImageScore]) -> str:
    lines = [printable(name)]
    for question, answer in answers.items():
        if answer.error is not None:
            lines.append(f"  {printable(question)}: {printable(answer.error)}")
            continue
        likely = ", ".join(f"{text} {chance:.1%}" for text, chance in _likely(answer)[:_SHOWN])
        figures = f"{answer.score:.2f} ± {answer.std:.2f} ({likely}; coverage {answer.coverage:.1%})"
        lines.append(f"  {printable(question)}: {figures}")
    return "\n".join(lines)
