"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("vqr1_requests", "Answered requests.", ("route", "status"), registry=registry)
        self.seconds = Histogram("vqr1_request_seconds", "Time to answer a request.", ("route",), registry=registry)
        self.pictures = Counter(
            "vqr1_pictures", "Pictures by outcome: scored, refused.", ("outcome",), registry=registry
        )
        self.batch_pictures = Histogram(
            "vqr1_batch_pictures",
            "Pictures of one call of the scorer.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram("vqr1_batch_seconds", "Time of one call of the scorer.", registry=registry)
        self._waiting = Gauge("vqr1_waiting_pictures", "Pictures that wait for the scorer.", registry=registry)
        self.active = Gauge("vqr1_active_requests", "Requests in progress.", registry=registry)

    def observe_batch(self, pictures: int, seconds: float) -> None:
        """Count one call of the scorer."""
        self.batch_pictures.observe(pictures)
        self.batch_seconds.observe(seconds)

    def watch_waiting(self, waiting: Callable[[], int]) -> None:
        """Ask this function for the length of the queue."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
