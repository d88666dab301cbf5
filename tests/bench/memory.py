"""Peak resident memory of this process and all its children, JVM and Python workers included."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

_PAGE = os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples while the ``with`` block runs; ``peak_gb`` afterwards. Pages that processes share count in each: an upper bound."""

    def __init__(self, every_seconds: float = 0.2):
        self.every_seconds = every_seconds
        self.peak_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak_gb = max(self.peak_gb, _resident_bytes(os.getpid()) / 1e9)
            time.sleep(self.every_seconds)


def _resident_bytes(root: int) -> int:
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                resident[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * _PAGE
            except OSError:
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry.name))
    total, pending = 0, [root]
    while pending:
        process = pending.pop()
        total += resident.get(process, 0)
        pending += children.get(process, [])
    return total
