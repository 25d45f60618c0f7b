"""What serving processes count, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram."""


class RequestMetrics:
    """The requests of one serving process: how many, how they ended, and how long they took.

    ``process``: ``replica`` or ``front``; it is part of the metrics' names. ``registry`` takes
    further collectors.
    """

    def __init__(self, process: str) -> None:
        self.registry = CollectorRegistry()
        self.outstanding = 0
        """Requests that are not answered yet. Changed by the event loop's thread alone."""
        self._requests = Counter(
            f"ckpt_{process}_requests",
            "Requests that were answered, by status.",
            ["code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"ckpt_{process}_request_seconds",
            "From a request's head to its whole answer.",
            registry=self.registry,
            buckets=SECONDS,
        )
        Gauge(
            f"ckpt_{process}_outstanding", "Requests not answered yet.", registry=self.registry
        ).set_function(lambda: self.outstanding)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Count a request as outstanding meanwhile."""
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics of the registry."""
        return generate_latest(self.registry)
