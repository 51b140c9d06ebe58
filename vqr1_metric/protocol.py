"""What is said to the model and how its replies are read: the questions, the chat, the tags and the parser.

Source of the questions: VisualQuality-R1 (arXiv 2505.14460) and its released scripts, word for word. A single changed
word changes the scores, so the version is recorded beside every result and takes part in the scorer's identity.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Mode = Literal["score", "think", "sample"]
MODES: tuple[str, ...] = ("score", "think", "sample")

PROMPT_VERSION = "visualquality-r1/1"

QUESTION = (
    "You are doing the image quality assessment task. Here is the question: What is your overall rating on the quality "
    "of this picture? The rating should be a float between 1 and 5, rounded to two decimal places, with 1 representing "
    "very poor quality and 5 representing excellent quality."
)
THINKING_SUFFIX = (
    " First output the thinking process in <think> </think> tags and then output the final answer with only one score "
    "in <answer> </answer> tags."
)
NON_THINKING_SUFFIX = " Please only output the final answer with only one score in <answer> </answer> tags."


def question(thinking: bool) -> str:
    """The text of the user turn, which follows the picture."""
    return QUESTION + (THINKING_SUFFIX if thinking else NON_THINKING_SUFFIX)


def messages(thinking: bool) -> list[dict]:
    """The chat: one user turn, the picture first, then the text."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(thinking)}]}]


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?|[-+]?\.\d+")
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


_THINKING_FORM = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_NON_THINKING_FORM = re.compile(r"\s*<answer>.*?</answer>", re.DOTALL)


def has_form(reply: str, thinking: bool) -> bool:
    """Is the whole reply of the form that was asked for? Its score is not looked at."""
    return (_THINKING_FORM if thinking else _NON_THINKING_FORM).fullmatch(reply) is not None


def write_reply(score: float, reasoning: str | None = None) -> str:
    """The reply that states this score, after this reasoning if there is one."""
    answer = f"<answer>{score:.2f}</answer>"
    return answer if reasoning is None else f"<think>{reasoning}</think>\n{answer}"


@dataclass(frozen=True)
class ParsedReply:
    """What a reply says.

    Args:
        score: in [1, 5], or NaN.
        reason: why there is no score, or None.
        reasoning: the text between the think tags, or the whole text before the answer, stripped.
    """

    score: float
    reason: str | None
    reasoning: str


def parse_reply(text: str) -> ParsedReply:
    """Read a reply: the last ``<answer>...</answer>``, in it the first number, as the authors' scripts do.

    Unlike theirs, a reply that holds no number, or one outside 1..5, gets NaN and the reason, never a made-up score.

    Example:
        >>> parse_reply("<think>Sharp.</think><answer>4.50</answer>").score
        4.5
        >>> parse_reply("<answer>7</answer>").reason
        'the score 7 lies outside 1 to 5'
    """
    from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE  # here: the questions need no torch

    answers = list(_ANSWER.finditer(text))
    thought = _THINK.search(text)
    reasoning = thought.group(1) if thought else text[: answers[-1].start()] if answers else text
    reasoning = reasoning.removeprefix("<think>").strip()
    if not answers:
        return ParsedReply(math.nan, "the reply has no <answer>...</answer>", reasoning)
    number = _NUMBER.search(answers[-1].group(1))
    if number is None:
        return ParsedReply(math.nan, "the answer holds no number", reasoning)
    score = float(number.group())
    if not MIN_SCORE <= score <= MAX_SCORE:
        return ParsedReply(math.nan, f"the score {score:g} lies outside {MIN_SCORE:g} to {MAX_SCORE:g}", reasoning)
    return ParsedReply(score, None, reasoning)


def answer_text(text: str) -> str | None:
    """What stands in the last answer tags, None where there are none; for labels, whose scale is their own."""
    answers = _ANSWER.findall(text)
    return answers[-1] if answers else None
