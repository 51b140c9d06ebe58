"""Pure maths of the method: tensors in, tensors out. Imports torch and the standard library only."""

from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE, ScoreDistribution, score_grid
from vqr1_metric.functional.fidelity import fidelity, preference_label, ranking_reward
from vqr1_metric.functional.parsing import ParsedReply, parse_reply
from vqr1_metric.functional.thurstone import comparison_probability, win_probability

__all__ = [
    "MAX_SCORE",
    "MIN_SCORE",
    "ParsedReply",
    "ScoreDistribution",
    "comparison_probability",
    "fidelity",
    "parse_reply",
    "preference_label",
    "ranking_reward",
    "score_grid",
    "win_probability",
]
