"""Does a scorer agree with people, how surely, and is one better than another? See docs/evaluation.md.

Reading order: `vqr1_metric.ratings` (what people said), `scoring` (scores, cached), `agreement`, `significance`,
`calibration`, `preference`, `paired` (numbers), `run` (all of it together), `tables` and `page` (what a reader gets).
Needs the extra `evaluate` (SciPy).
"""


def __getattr__(name: str) -> object:
    moved = {"Item": "RatedImage", "LabelSet": "RatingSet", "Problem": "Problem"}
    if name in moved:
        raise ImportError(f"vqr1_metric.evaluation.{name} of version 0.1.0 is now vqr1_metric.ratings.{moved[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
