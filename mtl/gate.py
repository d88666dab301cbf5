"""Where batches pass one at a time until their query is to stop."""

from __future__ import annotations

import threading
from types import TracebackType


class ClosedError(Exception):
    """The batch came when its query was stopping: it is for the next run."""


class Gate:
    """A lock that can be closed: a batch that comes later is refused.

    A query's stop waits for its thread, which may be about to hand on a batch. Were the lock held meanwhile, to let the batch in
    hand end, the two would wait for each other for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_closed:
            self._lock.release()
            raise ClosedError("the query is being stopped: this batch is for the next run")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def close(self) -> None:
        """Wait for the batch in hand, and let no other in."""
        with self._lock:
            self._is_closed = True
