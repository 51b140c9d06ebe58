"""Score, prune and rerank what diffusers pipelines make: ``BestOfN`` round a pipe, a callback inside."""

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
