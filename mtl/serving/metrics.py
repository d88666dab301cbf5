"""Counts and times of all workers together, in the text format of Prometheus."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

_IN_MEMORY = Path("/dev/shm")
_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def share(folder: str) -> None:
    """Keep the numbers of this process and its children in files in ``folder``; before the first :class:`Metrics`."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder


@contextmanager
def shared(store: Path) -> Iterator[None]:
    """Keep them, until the block ends, in a folder of the server on ``store``, of which there is one.

    The files are mapped and have holes: where no room is left to fill one, the process that writes to it is killed by SIGBUS.
    So they are not on the disk of the store, whose logs may fill it, but in memory where the system has files there.
    """
    where, known = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else Path(tempfile.gettempdir()), store.stat()
    prefix = f"mtl-metrics-{known.st_dev}-{known.st_ino}-"
    for left in where.glob(f"{prefix}*"):  # by a server that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=where, ignore_cleanup_errors=True) as folder:
        share(folder)
        yield


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
        self._publishing = threading.Lock()
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
        """Put what is read of this worker where all of them see it; by any thread."""
        with self._publishing:
            self._publish()

    def _publish(self) -> None:
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
