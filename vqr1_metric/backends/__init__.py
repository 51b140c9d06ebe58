"""Models behind one small protocol (:class:`~vqr1_metric.backends.base.ScoringBackend`); one file per dependency."""
