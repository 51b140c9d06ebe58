"""Closed questions to a server: the probability of each answer, from the next-token probabilities that it states."""

from __future__ import annotations

import torch

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.http.session import all_of
from vqr1_metric.backends.http.walk import Expand
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import Question


def _ends(question: Question) -> dict[str, int]:
    """What a reply, behind the opening, has to begin with to give each answer: text -> index of its value."""
    ends = {}
    for spelling in question.spellings:
        for text, value in question.texts():
            answered = spelling + text
            if text in question.beginnings:  # then the closing has to begin
                for blank in {spelling, ""}:
                    ends[answered + blank + question.closing[:1]] = value
            else:
                ends[answered] = value
    return ends


async def closed_distribution(expand: Expand, question: Question, threshold: float) -> ScoreDistribution:
    """The distribution over a question's answers, of no leading dimension.

    Goes by text, one token at a time; what the server does not list, and branches with less than ``threshold``, are
    missing from ``coverage``. Answers of one token take one request.

    Args:
        expand: asks the server, see :data:`~vqr1_metric.backends.http.walk.Expand`; its texts begin behind the opening.
        question: whose opening is given.
        threshold: of the mass.
    """
    if not question.opening_given and question.opening:
        raise ModelError(
            f"The question {question.name!r} lets the model write its opening, which is read on local models only: "
            "use opening_given=True with a server."
        )
    ends = _ends(question)
    masses = torch.zeros(len(question.values), dtype=torch.float64)
    frontier, seen = {"": 1.0}, {""}
    while frontier := {text: mass for text, mass in frontier.items() if mass >= threshold}:
        steps = await all_of(expand(text, 1) for text in frontier)
        longer: dict[str, float] = {}
        for (text, mass), found in zip(frontier.items(), steps, strict=True):
            for token, probability in found[0][1].items() if found else ():
                if token and text + token not in seen:
                    longer[text + token] = longer.get(text + token, 0.0) + mass * probability
        seen.update(longer)
        frontier = {}
        for text, mass in longer.items():
            value = next((value for end, value in ends.items() if text.startswith(end)), None)
            if value is not None:
                masses[value] += mass
            elif any(end.startswith(text) for end in ends):
                frontier[text] = mass
    return ScoreDistribution.from_log_probabilities(masses.log(), None, question.values, question.labels)
