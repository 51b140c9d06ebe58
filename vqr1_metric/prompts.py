"""The two questions the model was trained with, word for word, and their version.

Source: VisualQuality-R1 (arXiv 2505.14460) and its released scripts. A single changed word changes the scores, so the
version is recorded beside every result and takes part in the metric's fingerprint.
"""

from __future__ import annotations

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
