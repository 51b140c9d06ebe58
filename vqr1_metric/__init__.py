"""Picture quality on a scale of 1 to 5, without a reference picture, from VisualQuality-R1 models.

Everything public is re-exported here and imported when first used, so ``import vqr1_metric`` stays fast and
loads neither torch nor transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from vqr1_metric._moved import MovedModules

if TYPE_CHECKING:
    from vqr1_metric.functional.distribution import ScoreDistribution
    from vqr1_metric.loss import VisualQualityR1Loss, visual_quality_r1_score
    from vqr1_metric.metric import VisualQualityR1Score
    from vqr1_metric.scorer import QualityScorer

__version__ = "0.2.0"

if MovedModules not in sys.meta_path:
    sys.meta_path.append(MovedModules)

# Public name -> module that defines it.
_EXPORTS = {
    "QualityScorer": "vqr1_metric.scorer",
    "ScoreDistribution": "vqr1_metric.functional.distribution",
    "VisualQualityR1Loss": "vqr1_metric.loss",
    "VisualQualityR1Score": "vqr1_metric.metric",
    "visual_quality_r1_score": "vqr1_metric.loss",
}

__all__ = [
    "QualityScorer",
    "ScoreDistribution",
    "VisualQualityR1Loss",
    "VisualQualityR1Score",
    "__version__",
    "visual_quality_r1_score",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562) and keep it, so that later look-ups cost nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
