"""A worker's side of the load controller: it measures, asks the controller once a tick, and lets requests in or not.

A worker answers on one event loop. What a request waits for before the loop turns to it shows in no request's own time, so
the loop's lag, how late a timer comes, is added to each; and those that wait count as in the server (:attr:`Admission.begun`).
A request is in the server once its body is there: how long clients take to send is not the server's load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mtl.serving.load import Controller, Rung, State, Window, ladder

TICK_SECONDS = 0.25
_BEAT_SECONDS = 0.01  # between two looks at the lag


class Admission:
    """Requests of one worker under an objective."""

    def __init__(self, objective_ms: float, deadlines_ms: Sequence[float], coarser: int, seed: int | None = None):
        """
        Args:
            objective_ms: of the 99th percentile of latency.
            deadlines_ms: from the longest to the shortest.
            coarser: how many classes coarser than the exact one there are.
        """
        self.controller = Controller(ladder(deadlines_ms, coarser), objective_ms)
        self.state = State()
        self.begun: Callable[[], int] = lambda: (
            0
        )  # requests that the server has read and not answered, where it can tell
        self.inside = self.admitted = self.refused = 0
        self._uploads = 0  # requests of which the body is still to come
        self.lag = 0.0  # seconds
        self._latencies: list[float] = []  # seconds
        self._ticked = time.monotonic()
        self._random = np.random.default_rng(seed)

    @property
    def rung(self) -> Rung:
        """What requests are given now."""
        return self.controller.rungs[self.state.rung]

    @property
    def in_flight(self) -> int:
        return max(self.inside, self.begun() - self._uploads)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """While the body of a request is waited for."""
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    def enter(self) -> bool:
        """Whether one more request may be answered; it must :meth:`leave` then."""
        # One that was read is among those that have begun.
        waiting = self.begun() - self._uploads - 1
        if self.state.limit is not None and not self.controller.admits(self.state, max(self.inside, waiting)):
            self.refused += 1
            return False
        self.inside += 1
        self.admitted += 1
        return True

    def leave(self, seconds: float) -> None:
        self.inside -= 1
        self._latencies.append(seconds + self.lag)

    def retry_after(self) -> int:
        """Whole seconds that a refused request is told to wait."""
        return self.controller.retry_after(self.state, self._random.random())

    def tick(self) -> None:
        """Decide by what was measured since the last tick."""
        now = time.monotonic()
        latencies, self._latencies = 1000 * np.array(self._latencies), []
        window = Window(max(now - self._ticked, 1e-3), self.admitted, self.refused, self.in_flight, latencies)
        self.admitted = self.refused = 0
        self._ticked = now
        self.state = self.controller.after(self.state, window)

    async def run(self) -> None:
        """Measure and decide for ever."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_BEAT_SECONDS)
            now = time.monotonic()
            self.lag = max(now - before - _BEAT_SECONDS, 0.0)
            if now - self._ticked >= TICK_SECONDS:
                self.tick()
