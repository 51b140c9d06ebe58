"""Does a scorer agree with people, how surely, and is one better than another? See docs/evaluation.md.

Reading order: `labels` (what is known of a picture), `readers` and `datasets` (where that comes from), `scoring`
(scores, cached), `agreement`, `significance`, `calibration`, `preference`, `paired` (numbers), `run` (all of it
together), `tables` and `page` (what a reader gets). Needs the extra `evaluate` (SciPy).
"""

from vqr1_metric.evaluation.labels import Item, LabelSet, Problem

__all__ = ["Item", "LabelSet", "Problem"]
