"""Counts and times of all workers together, in the text format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def share(folder: Path) -> None:
    """Keep the numbers of this process and its children in files under ``folder``; before the first :class:`Metrics`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.db"):
        file.unlink()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


class Metrics:
    """One worker's share.

    Args:
        state: name → (help, value) of what is read at every scrape.
    """

    def __init__(self, state: Callable[[], dict[str, tuple[str, float]]]):
        # On import it looks for the folder of :func:`share`.
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
        from prometheus_client.core import GaugeMetricFamily, Metric
        from prometheus_client.multiprocess import MultiProcessCollector

        class State:
            def collect(self) -> Iterator[Metric]:
                for name, (told, value) in state().items():
                    yield GaugeMetricFamily(name, told, value)

        own = CollectorRegistry()
        self._requests = Counter("mtl_requests", "Requests answered.", ["route", "status"], registry=own)
        self._seconds = Histogram(
            "mtl_request_seconds", "Time from request to answer.", ["route"], buckets=_BUCKETS, registry=own
        )
        self._together = CollectorRegistry()
        MultiProcessCollector(self._together)
        self._together.register(State())
        self._generate = generate_latest
        self.media_type = CONTENT_TYPE_LATEST

    def of(self, route: str) -> Callable[[int, float], None]:
        """What counts one route's answers: (status, seconds)."""
        seconds = self._seconds.labels(route)
        by_status = {200: self._requests.labels(route, "200")}

        def count(status: int, elapsed: float) -> None:
            if status not in by_status:
                by_status[status] = self._requests.labels(route, str(status))
            by_status[status].inc()
            seconds.observe(elapsed)

        return count

    def text(self) -> bytes:
        return self._generate(self._together)
