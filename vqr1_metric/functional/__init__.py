"""Pure maths of the method: tensors in, tensors out. Imports torch and the standard library only."""

from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE, ScoreDistribution, score_grid
from vqr1_metric.functional.reward import comparison_labels, fidelity, preference_label, ranking_reward
from vqr1_metric.functional.thurstone import comparison_probability, win_probability

__all__ = [
    "MAX_SCORE",
    "MIN_SCORE",
    "ScoreDistribution",
    "comparison_labels",
    "comparison_probability",
    "fidelity",
    "preference_label",
    "ranking_reward",
    "score_grid",
    "win_probability",
]


def __getattr__(name: str) -> object:
    if name in ("ParsedReply", "parse_reply"):
        raise ImportError(f"vqr1_metric.functional.{name} of version 0.1.0 is now vqr1_metric.protocol.{name}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
