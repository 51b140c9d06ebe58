"""``vqr1 serve``: a small HTTP service over :class:`~vqr1_metric.scorer.QualityScorer`, with a page to try it.

Pictures are hostile input here: what each module does about that stands at its top. Reading order: ``app`` (the
routes), ``intake`` (from a request to checked pixels), ``batching`` (the one thread that runs the model).
"""
