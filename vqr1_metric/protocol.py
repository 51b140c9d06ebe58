"""What is said to the model and how its replies are read: questions, closed answers, the chat, the tags, the parser.

A :class:`Question` is a value: its words, its closed set of answers, and where the answer stands in a reply. A single
changed word changes the scores, so all of it takes part in the scorer's identity. The default is the question of
VisualQuality-R1 (arXiv 2505.14460) and its released scripts, word for word; the others say where they come from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

Mode = Literal["score", "think", "sample"]
MODES: tuple[str, ...] = ("score", "think", "sample")
OPENING, CLOSING = "<answer>", "</answer>"
THOUGHT_END = "</think>"

#: What the question below asks for: lowest and highest score, and steps in each unit. The grid of
#: :mod:`~vqr1_metric.functional.distribution` is made of the same numbers; this module goes without torch.
_LOWEST, _HIGHEST, _STEPS = 1, 5, 100

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


def question(thinking: bool, asked: str = QUESTION) -> str:
    """The text of the user turn, which follows the picture; ``asked`` is another question in place of the built-in."""
    return asked + (THINKING_SUFFIX if thinking else NON_THINKING_SUFFIX)


def messages(thinking: bool) -> list[dict[str, Any]]:
    """The chat of VisualQuality-R1: one user turn, the picture first, then the text."""
    return VISUALQUALITY_R1.messages(thinking)


def score_texts() -> list[tuple[str, int]]:
    """Every number of the grammar with its grid index: 5 as d, 41 as d.d, 401 as d.dd."""
    texts = []
    for index in range((_HIGHEST - _LOWEST) * _STEPS + 1):
        whole, hundredths = divmod(index + _LOWEST * _STEPS, _STEPS)
        texts.append((f"{whole}.{hundredths:02d}", index))
        if hundredths % 10 == 0:
            texts.append((f"{whole}.{hundredths // 10}", index))
        if hundredths == 0:
            texts.append((str(whole), index))
    return texts


#: The closed set of VisualQuality-R1: every writing of the scores 1.00, 1.01, ... 5.00.
SCORES: Mapping[str, float] = {text: _LOWEST + index / _STEPS for text, index in score_texts()}


@dataclass(frozen=True)
class Question:
    """A question about an image, with a closed set of answers that is read in one forward pass.

    The probability of an answer is that of all replies that begin with it, after ``opening``. Where an answer is itself
    the beginning of another one ("3" of "3.4"), it is that of the replies in which ``closing`` follows.

    Args:
        text: of the user turn; ``{prompt}`` in it stands for what each image was made from.
        answers: each text of the closed set with its value. Texts of one value are writings of one answer:
            ``{"yes": 1, "Yes": 1, "no": 0, "No": 0}``.
        name: to call it by.
        opening: what the reply says before its answer: ``"<answer>"``, ``"The quality of the image is"``, or nothing.
        opening_given: the opening is written for the model; otherwise the model writes it, and how probable it is to
            do so is the distribution's ``tag_probability``.
        closing: what ends an answer.
        spellings: blank space that may stand before an answer.
        system: text of the system turn; None leaves it to the chat template.
        thinking_text: the user turn that asks for a reasoning first, for the modes ``think`` and ``sample``.
        images: how many images the question is about.
        source: where the wording comes from, and whether anybody has validated it.
    """

    text: str
    answers: Mapping[str, float]
    name: str = "custom"
    opening: str = ""
    opening_given: bool = True
    closing: str = ""
    spellings: tuple[str, ...] = ("",)
    system: str | None = None
    thinking_text: str | None = None
    images: int = 1
    source: str = "the user's own"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("Expected a question, but got an empty text.")
        values = {text: float(value) for text, value in dict(self.answers).items()}
        object.__setattr__(self, "answers", values)
        object.__setattr__(self, "spellings", tuple(self.spellings))
        if len(set(values.values())) < 2 or not all(map(math.isfinite, values.values())):
            raise ValueError(f"Expected at least two answers with different finite values, but got {values}.")
        if not all(text and text == text.strip() for text in values):
            raise ValueError(
                f"Expected answers without blanks around them (spellings says which may stand there), but got "
                f"{[text for text in values if text != text.strip() or not text]}."
            )
        if self.beginnings and not self.closing:
            some = sorted(self.beginnings)[0]
            raise ValueError(
                f"Expected a closing text, since the answer {some!r} is the beginning of another one, but got none."
            )
        if not self.spellings or any(spelling.strip() for spelling in self.spellings):
            raise ValueError(f"Expected spellings of blank space, such as ('', ' '), but got {self.spellings}.")

    @cached_property
    def beginnings(self) -> frozenset[str]:
        """Answers that are the beginning of another answer."""
        return frozenset(a for a, b in pairwise(sorted(self.answers)) if b.startswith(a))

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The values of the answers, in increasing order, each once."""
        return tuple(sorted(set(self.answers.values())))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """For each of ``values`` the first of its texts."""
        first = {value: text for text, value in reversed(list(self.answers.items()))}
        return tuple(first[value] for value in self.values)

    @property
    def reads_scores(self) -> bool:
        """Are the answers the 401 scores of VisualQuality-R1?"""
        return self.answers == SCORES

    @property
    def needs_prompt(self) -> bool:
        """Does it ask about what an image was made from?"""
        return "{prompt}" in self.text

    def texts(self) -> list[tuple[str, int]]:
        """Every text of the closed set with the index of its value."""
        index = {value: i for i, value in enumerate(self.values)}
        return [(text, index[value]) for text, value in self.answers.items()]

    def about(self, prompt: str) -> Question:
        """The same question with a prompt filled in."""
        return replace(self, text=self.text.replace("{prompt}", prompt))

    def messages(self, thinking: bool = False) -> list[dict[str, Any]]:
        """The chat: one user turn, the images first, then the text; a system turn where there is one."""
        text = self.text
        if thinking:
            if self.thinking_text is None:
                raise ValueError(f"The question {self.name!r} has no form that asks for a reasoning: use mode='score'.")
            text = self.thinking_text
        content = [*({"type": "image"} for _ in range(self.images)), {"type": "text", "text": text}]
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": content}]

    def identity(self) -> dict[str, Any]:
        """All that decides an answer, as JSON values; the name and the source do not."""
        identity = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("name", "source")}
        answers = "scores" if self.reads_scores else sorted(self.answers.items())
        return {**identity, "answers": answers, "spellings": list(self.spellings)}

    def __reduce__(self) -> tuple[Any, ...]:
        if QUESTIONS.get(self.name) == self:
            return find_question, (self.name,)
        return Question, tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def __hash__(self) -> int:
        return hash(json.dumps(self.identity(), sort_keys=True))


def closed_answers(answers: str | Sequence[str]) -> dict[str, float]:
    """The closed set that a user names: ``"yes,no"``, ``"1,2,3"``, ``"sharp=1,soft=0.5,blurred=0"``.

    Numbers are their own values. Words without values go from 1 for the first to 0 for the last, evenly; both are also
    read with a capital letter, as models write them at the beginning of a reply.

    Raises:
        ValueError: for fewer than two answers, or a value that is no number.
    """
    parts = [part.strip() for part in (answers.split(",") if isinstance(answers, str) else answers)]
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"Expected at least two answers, such as 'yes,no', but got {answers!r}.")
    named = [part.rpartition("=")[::2] if "=" in part else (part, None) for part in parts]
    if any(value is not None for _, value in named) and any(value is None for _, value in named):
        raise ValueError(f"Expected a value for every answer or for none, but got {answers!r}.")
    try:
        if named[0][1] is not None:
            values = {text.strip(): float(value) for text, value in named if value is not None}
        else:
            values = {text: float(text) for text, _ in named}
    except ValueError:
        if named[0][1] is not None:
            raise ValueError(f"Expected numbers behind '=', but got {answers!r}.") from None
        values = {text: 1 - i / (len(named) - 1) for i, (text, _) in enumerate(named)}
    if len(values) < len(parts):
        raise ValueError(f"Expected each answer once, but got {answers!r}.")
    return _with_capitals(values)


def _with_capitals(values: Mapping[str, float]) -> dict[str, float]:
    return {writing: value for text, value in values.items() for writing in (text, text[0].upper() + text[1:])}


_LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
_OWN = "this package's own wording, not validated"

VISUALQUALITY_R1 = Question(
    QUESTION + NON_THINKING_SUFFIX,
    SCORES,
    "visualquality-r1",
    opening=OPENING,
    opening_given=False,
    closing=CLOSING,
    spellings=("", " ", "\n"),
    thinking_text=QUESTION + THINKING_SUFFIX,
    source="VisualQuality-R1, arXiv 2505.14460, and its released scripts",
)


def _levels(name: str, text: str, subject: str, source: str) -> Question:
    return Question(text, _LEVELS, name, opening=f"The {subject} of the image is", spellings=(" ",), source=source)


def _attribute(name: str, subject: str) -> Question:
    return _levels(name, f"How would you rate the {subject} of this image?", subject, _OWN)


_PRESETS = (
    VISUALQUALITY_R1,
    _levels(
        "levels",
        "How would you rate the quality of this image?",
        "quality",
        "Q-Align (arXiv 2312.17090), DeQA-Score and Q-ReAlign; words from excellent to bad are 5 to 1",
    ),
    Question(
        'Does this figure show "{prompt}"? Please answer yes or no.',
        _with_capitals({"yes": 1.0, "no": 0.0}),
        "alignment",
        source="VQAScore, arXiv 2404.01291; its score, P(Yes) among all replies, is the mean times the coverage",
    ),
    Question(
        "You are performing an image quality assessment task. Compare the two images and decide which one has better "
        "perceptual quality. Answer strictly with the index of the better image: 0 if the first image is better, or 1 "
        "if the second image is better.",
        {"0": 1.0, "1": 0.0},
        "pairwise",
        images=2,
        source="EvoQuality, arXiv 2509.25787, the comparison prompt of its model card",
    ),
    _levels(
        "aesthetics", "How would you rate the aesthetics of this image?", "aesthetics", "Q-Align, arXiv 2312.17090"
    ),
    _attribute("sharpness", "sharpness"),
    _attribute("noise", "freedom from noise"),
    _attribute("exposure", "exposure"),
    _attribute("contrast", "contrast"),
    _attribute("colour", "colour"),
    _attribute("composition", "composition"),
)
#: Questions by name.
QUESTIONS: dict[str, Question] = {preset.name: preset for preset in _PRESETS}


def find_question(asked: str | Question) -> Question:
    """A question by its name, or the one given.

    Raises:
        ValueError: for a name that no question has.
    """
    if isinstance(asked, Question):
        return asked
    if asked not in QUESTIONS:
        raise ValueError(f"Expected one of the questions {', '.join(QUESTIONS)}, or a Question, but got {asked!r}.")
    return QUESTIONS[asked]


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
    if not _LOWEST <= score <= _HIGHEST:
        return ParsedReply(math.nan, f"the score {score:g} lies outside {_LOWEST} to {_HIGHEST}", reasoning)
    return ParsedReply(score, None, reasoning)


def answer_text(text: str) -> str | None:
    """What stands in the last answer tags, None where there are none; for labels, whose scale is their own."""
    answers = _ANSWER.findall(text)
    return answers[-1] if answers else None


def has_tag(text: str) -> bool:
    """Does a reply hold the answer tag?"""
    return OPENING in text


def reply_before_answer(text: str) -> str | None:
    """A reply up to its answer tag; with a reasoning that ended but no tag, up to where the tag belongs.

    None where the reasoning did not come to an end.
    """
    thought_end = text.rfind(THOUGHT_END)
    if thought_end < 0:
        return None
    tag = text.rfind(OPENING)
    return text[:tag] if tag > thought_end else text[: thought_end + len(THOUGHT_END)] + "\n"
