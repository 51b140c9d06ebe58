"""The one thread that runs the model: pictures of several requests go through it together.

The first picture waits a few milliseconds for others; while a batch is in the model the next ones gather. A picture on
which the model fails does not take those of other clients with it: its batch is scored again one by one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import QualityScorer

_log = logging.getLogger("vqr1_metric.serve")


@dataclass
class _Job:
    pixels: Tensor
    explain: bool
    future: Future[ImageScore] = field(default_factory=Future)


class Batcher:
    """Scores single pictures from any thread, in batches, with one scorer.

    Args:
        scorer: used by the batcher's thread only.
        wait_seconds: how long the first picture of a batch waits for others.
        max_pictures: of one call of the scorer, which cuts it further by ``batch_tokens``.
        observe: called with the pictures and seconds of every call of the scorer.
    """

    def __init__(
        self,
        scorer: QualityScorer,
        *,
        wait_seconds: float = 0.005,
        max_pictures: int = 64,
        observe: Callable[[int, float], object] = lambda pictures, seconds: None,
    ) -> None:
        self._scorer = scorer
        self._wait, self._max, self._observe = wait_seconds, max_pictures, observe
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vqr1-scoring", daemon=True)
        self._thread.start()

    def submit(self, pixels: Tensor, *, explain: bool = False) -> Future[ImageScore]:
        """Queue a picture ``(3, H, W)``; with ``explain`` the model writes its reasoning too."""
        job = _Job(pixels, explain)
        with self._lock:
            if self._closed:
                raise RuntimeError("The batcher is closed.")
            self._jobs.put(job)
        return job.future

    @property
    def waiting(self) -> int:
        """Pictures that are queued."""
        return self._jobs.qsize()

    def close(self) -> None:
        """Score what is queued, then stop the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            jobs, open_ = self._gather()
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            self._score([job for job in jobs if not job.explain])
            for job in jobs:
                if job.explain:
                    self._score([job])

    def _gather(self) -> tuple[list[_Job], bool]:
        """The next batch, and whether more may come."""
        first = self._jobs.get()
        jobs = [] if first is None else [first]
        deadline = time.monotonic() + self._wait
        while jobs and len(jobs) < self._max:
            try:
                job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return jobs, True
            if job is None:
                return jobs, False
            jobs.append(job)
        return jobs, first is not None

    def _score(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        started = time.perf_counter()
        try:
            if jobs[0].explain:
                results = [self._scorer.explain(jobs[0].pixels)]
            else:
                results = self._scorer.score([job.pixels for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                _log.warning("a batch of %d pictures failed (%s): scoring them one by one", len(jobs), error)
                for job in jobs:
                    self._score([job])
                return
            _log.error("a picture could not be scored", exc_info=error)
            jobs[0].future.set_exception(error)
            return
        self._observe(len(jobs), time.perf_counter() - started)
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
