"""The score distribution from the next-token probabilities that a server states, over few short requests.

The tree of answers that :mod:`~vqr1_metric.backends.readout` reads in one pass is walked here level by level: only
branches that hold at least ``threshold`` of the mass are expanded, several at once. What is not expanded, and what a
server leaves out because it lists only its most probable tokens, is missing from ``coverage`` and is never spread.

The walk goes by text, since a server states texts and keeps its tokenizer. Where one text can be cut into tokens in
two ways, the way with fewer tokens counts, which is how the tokenizer itself cuts it; P(score) then means what it means
in ``readout``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vqr1_metric.backends.http.session import all_of
from vqr1_metric.functional.distribution import GRID_SIZE, MIN_SCORE, STEPS_PER_UNIT, ScoreDistribution
from vqr1_metric.protocol import CLOSING, OPENING, VISUALQUALITY_R1

#: Where the answers of all Qwen-VL tokenizers fork first: ``>`` alone, or in one token with a line break.
_FORK = OPENING[:-1]
#: Tokens of ``<answer>3.42`` (and of any other answer), as far as they are read.
_ANSWER_TOKENS = 7

_SPACE = "(?P<space>[ \n]?)"
_TWO_DECIMALS = re.compile(rf"{_SPACE}(?P<number>[1-5]\.\d\d)")
_CLOSED = re.compile(rf"{_SPACE}(?P<number>[1-5](?:\.\d)?)(?P<before>[ \n]?)(?P<tail></.*)", re.DOTALL)
_OPEN = re.compile(rf"{_SPACE}(?:(?P<number>[1-5](?:\.\d?)?)(?P<before>[ \n]?))?")


#: ``expand(text, tokens)``: the next steps of a reply that begins with ``text``, each the token that was taken and the
#: probability of every likely token in its place, by their texts.
Expand = Callable[[str, int], Coroutine[Any, Any, Sequence[tuple[str, Mapping[str, float]]]]]


class _Place(Enum):
    OPEN = "an answer may follow"
    OUTSIDE = "no answer of the grammar begins like this"


def place_of(text: str) -> _Place | int:
    """Where a reply that begins with ``text`` stands: a grid index if its score is decided, else open or outside."""
    if OPENING.startswith(text):
        return _Place.OPEN
    if not text.startswith(OPENING):
        return _Place.OUTSIDE
    rest = text.removeprefix(OPENING)
    if found := _TWO_DECIMALS.match(rest):
        return _index(found["number"])
    if found := _CLOSED.fullmatch(rest):
        closed = CLOSING.startswith(found["tail"]) or found["tail"].startswith(CLOSING)
        return _index(found["number"]) if closed and found["before"] in ("", found["space"]) else _Place.OUTSIDE
    found = _OPEN.fullmatch(rest)
    if not found:
        return _Place.OUTSIDE
    number, before = found["number"] or "", found["before"] or ""
    wrong_blank = before and (before != found["space"] or number.endswith("."))
    return _Place.OUTSIDE if wrong_blank or number > "5.0" else _Place.OPEN


def rest_of_answer(text: str) -> str | None:
    """A regular expression for what may follow ``text`` in an answer with two decimals, for constrained decoding."""
    if OPENING.startswith(text):
        return re.escape(OPENING[len(text) :]) + rf"[1-5]\.[0-9][0-9]{CLOSING}"
    number = text.removeprefix(OPENING).lstrip()
    patterns = {0: r"[1-5]\.[0-9][0-9]", 1: r"\.[0-9][0-9]", 2: r"[0-9][0-9]", 3: r"[0-9]"}
    return patterns[len(number)] + CLOSING if len(number) in patterns and text == text.rstrip() else None


@dataclass
class AnswerWalk:
    """One walk through the answers to one picture.

    Args:
        expand: asks the server.
        threshold: branches with less of the mass, given the tag, are not expanded.
    """

    expand: Expand
    threshold: float

    def __post_init__(self) -> None:
        self._known: dict[str, Mapping[str, float]] = {}

    async def distribution(self) -> ScoreDistribution:
        """Walk, and return the distribution, of no leading dimension; NaN if no answer was seen at all."""
        await self._learn([""])
        begins = await self._reach_fork()
        await self._learn([_FORK])
        tags = {
            OPENING + space: self._known[_FORK].get((OPENING + space).removeprefix(_FORK), 0)
            for space in VISUALQUALITY_R1.spellings
        }
        tag = sum(tags.values())
        masses = torch.zeros(GRID_SIZE, dtype=torch.float64)
        frontier = {text: mass / tag for text, mass in tags.items() if mass > 0}
        seen = set(frontier)
        while frontier := {text: mass for text, mass in frontier.items() if mass >= self.threshold}:
            await self._learn(frontier)
            longer: dict[str, float] = {}
            for text, mass in frontier.items():
                for token, probability in self._known[text].items():
                    if token and text + token not in seen:
                        longer[text + token] = longer.get(text + token, 0.0) + mass * probability
            seen.update(longer)
            places = {text: place_of(text) for text in longer}
            for text, place in places.items():
                if isinstance(place, int):
                    masses[place] += longer[text]
            frontier = {text: mass for text, mass in longer.items() if places[text] is _Place.OPEN}
        return ScoreDistribution.from_log_probabilities(masses.log(), torch.tensor(begins * tag, dtype=torch.float64))

    async def _reach_fork(self) -> float:
        """Probability that the reply begins with the tag up to its fork."""
        reached, frontier = 0.0, {"": 1.0}
        seen: set[str] = set()
        while frontier:
            await self._learn(frontier)
            longer: dict[str, float] = {}
            for text, mass in frontier.items():
                for token, probability in self._known[text].items():
                    if token and _FORK.startswith(text + token) and text + token not in seen:
                        longer[text + token] = longer.get(text + token, 0.0) + mass * probability
            seen.update(longer)
            reached += longer.pop(_FORK, 0.0)
            frontier = {text: mass for text, mass in longer.items() if mass >= self.threshold}
        return reached

    async def _learn(self, texts: Iterable[str]) -> None:
        """Ask for what follows these texts, where it is not known; what the server takes next is learnt with it."""
        unknown = [text for text in texts if text not in self._known]
        answers = await all_of(self.expand(text, _tokens_left(text)) for text in unknown)
        for text, steps in zip(unknown, answers, strict=True):
            for token, probabilities in steps:
                self._known.setdefault(text, probabilities)
                text += token
                if not token or place_of(text) is not _Place.OPEN:
                    break


def _index(number: str) -> int | _Place:
    index = round((float(number) - MIN_SCORE) * STEPS_PER_UNIT)
    return index if index < GRID_SIZE else _Place.OUTSIDE


def _tokens_left(text: str) -> int:
    """How many more tokens are worth reading after ``text``."""
    if not text.startswith(OPENING):
        return _ANSWER_TOKENS if text == "" else _ANSWER_TOKENS - 2
    return max(1, 4 - len(text.removeprefix(OPENING).strip()))
