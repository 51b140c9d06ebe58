"""Does a scorer agree with people, how surely, and is one better than another? See docs/evaluation.md.

Reading order: `calls` (what users call), `columns` (who is compared), `run` (what is measured), `agreement`,
`uncertainty`, `significance`, `calibration`, `preference`, `ladder` (numbers), `report` (what a reader gets);
`methods`, `pairing`, `paired` for `vqr1 diff`; `fitting` for `vqr1 calibrate` and `vqr1 reference`. Needs the extra
`evaluate` (SciPy).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqr1_metric.evaluation.calls import evaluate, evaluate_ladder
    from vqr1_metric.evaluation.fitting import Reference, calibrate, reference
    from vqr1_metric.evaluation.methods import MethodReport, diff
    from vqr1_metric.evaluation.paired import compare_methods, compare_paired
    from vqr1_metric.evaluation.report import LadderReport, RatingReport, Report, VoteReport

__all__ = [
    "LadderReport",
    "MethodReport",
    "RatingReport",
    "Reference",
    "Report",
    "VoteReport",
    "calibrate",
    "compare_methods",
    "compare_paired",
    "diff",
    "evaluate",
    "evaluate_ladder",
    "reference",
]

#: Modules of the public names, imported when a name is asked for: they need SciPy.
_MODULES = {
    "calls": ("evaluate", "evaluate_ladder"),
    "fitting": ("Reference", "calibrate", "reference"),
    "methods": ("MethodReport", "diff"),
    "paired": ("compare_methods", "compare_paired"),
    "report": ("LadderReport", "RatingReport", "Report", "VoteReport"),
}
_MOVED = {"Item": "RatedImage", "LabelSet": "RatingSet", "Problem": "Problem"}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    if name in _MOVED:
        raise ImportError(f"vqr1_metric.evaluation.{name} of version 0.1.0 is now vqr1_metric.ratings.{_MOVED[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
