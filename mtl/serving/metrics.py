"""Counts and times of all workers together, in the text format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def share(folder: Path) -> None:
    """Keep the numbers of this process and its children in files under ``folder``; before the first :class:`Metrics`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.db"):
        file.unlink()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def forget(pid: int) -> None:
    """A process ended: what it told of itself alone is no longer so."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)


class Reading(NamedTuple):
    """What is read of a worker, again and again."""

    told: str
    value: float
    # "shown" is the same for all workers; "total" only grows, and counts of all are added; "sum" is the sum of those alive;
    # "each" is told by process.
    kind: Literal["shown", "total", "sum", "each"] = "shown"


class Metrics:
    """One worker's share.

    Args:
        state: readings by name.
    """

    def __init__(self, state: Callable[[], dict[str, Reading]]):
        # On import it looks for the folder of :func:`share`.
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
        from prometheus_client.core import GaugeMetricFamily, Metric
        from prometheus_client.multiprocess import MultiProcessCollector

        class State:
            def collect(self) -> Iterator[Metric]:
                for name, reading in state().items():
                    if reading.kind == "shown":
                        yield GaugeMetricFamily(name, reading.told, reading.value)

        own = CollectorRegistry()
        self._requests = Counter("mtl_requests", "Requests answered.", ["route", "status"], registry=own)
        self._seconds = Histogram(
            "mtl_request_seconds", "Time from request to answer.", ["route"], buckets=_BUCKETS, registry=own
        )
        self._state, self._own = state, own
        self._counter, self._gauge = Counter, Gauge
        self._made: dict[str, Any] = {}
        self._last: dict[str, float] = {}
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

    def publish(self) -> None:
        """Put what is read of this worker where all of them see it."""
        for name, (told, value, kind) in self._state().items():
            if kind == "total":
                if name not in self._made:
                    self._made[name] = self._counter(name, told, registry=self._own)
                before = self._last.get(name, 0.0)
                self._made[name].inc(value - before if value >= before else value)  # of a new version it begins at 0
                self._last[name] = value
            elif kind != "shown":
                if name not in self._made:
                    mode: Literal["livesum", "liveall"] = "livesum" if kind == "sum" else "liveall"
                    self._made[name] = self._gauge(name, told, registry=self._own, multiprocess_mode=mode)
                self._made[name].set(value)

    def text(self) -> bytes:
        self.publish()
        return self._generate(self._together)
