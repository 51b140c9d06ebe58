"""Score, prune and rerank what diffusers pipelines make: ``BestOfN`` round a pipe, a callback inside.

What a user calls: ``best_of_n`` (``results`` is what it gives back, ``records`` writes it), ``callback``, and ``block``
for modular pipelines. ``BestOfN`` chooses (``strategies``) among the candidates of a prompt (``runs``), which are made
in calls of the pipe (``pipes``), each on objects of its own (``calls``). Callback and block watch (``previews``). All
score through ``scoring``. What is known of schedulers stands in ``schedulers``, of pipelines in ``tested``, and every
private name of diffusers in ``private``.
"""

from vqr1_metric.integrations.diffusers.best_of_n import BestOfN
from vqr1_metric.integrations.diffusers.block import VisualQualityR1Block
from vqr1_metric.integrations.diffusers.callback import VisualQualityR1Callback
from vqr1_metric.integrations.diffusers.previews import PreviewRecord
from vqr1_metric.integrations.diffusers.results import BestOfNOutput, Candidate
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError

__all__ = [
    "BestOfN",
    "BestOfNOutput",
    "Candidate",
    "PreviewRecord",
    "UnsupportedError",
    "VisualQualityR1Block",
    "VisualQualityR1Callback",
]
