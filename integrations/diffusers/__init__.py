"""Score, prune and rerank what diffusers pipelines make: ``BestOfN`` round a pipe, a callback inside.

What a user calls: ``best_of_n`` (``results`` is what it gives back), ``callback``, and ``block`` for modular pipelines.
``BestOfN`` makes the candidates of a prompt in calls of the pipe (``runs``), each of which ``steering`` cuts short or
carries on; the callback drops candidates inside a call (``pruning``) and decodes by itself (``decoding``). What is
known of pipelines stands in ``support`` (and in ``pruning`` and ``decoding`` for theirs), of schedulers in
``schedulers``. All score through ``scoring`` and reach into a pipe through ``patching``.
"""

from vqr1_metric.integrations.diffusers.best_of_n import BestOfN
from vqr1_metric.integrations.diffusers.block import VisualQualityR1Block
from vqr1_metric.integrations.diffusers.callback import PreviewRecord, VisualQualityR1Callback
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
