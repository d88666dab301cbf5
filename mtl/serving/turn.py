"""Requests of one route that came in one turn of the event loop.

Most of the time of a small request goes into calls: NumPy's for a few kilobytes, LMDB's for a transaction. Those of all requests
that came at once are the same calls on longer arrays, so that the busier a worker is, the less each request costs it. The server
reads all that has come before it begins to answer, so that nobody waits for others to come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec


class Answer(Protocol):
    """What sends the answer to one request."""

    def __call__(self, content: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None: ...


class Came(msgspec.Struct, gc=False, eq=False):
    """A request of which everything is there. It is to be answered, or to be passed on."""

    body: bytearray
    headers: Iterable[tuple[bytes, bytes]]
    answer: Answer
    pass_on: Callable[[], None]  # to the application, which answers all
    at: float = msgspec.field(default_factory=time.perf_counter)


class Turn:
    """For one event loop.

    Args:
        path: of the route; requests are by POST.
        see_to: answers all requests of a turn or passes them on, and does not raise.
    """

    def __init__(self, path: str, see_to: Callable[[list[Came]], None]):
        self._path, self._see_to = path, see_to
        self._came: list[Came] = []

    def __len__(self) -> int:
        return len(self._came)

    def takes(self, scope: Mapping[str, Any]) -> bool:
        return scope["path"] == self._path and scope["method"] == "POST"

    def add(self, came: Came) -> None:
        if not self._came:
            asyncio.get_running_loop().call_soon(self._end)  # after all that is read in this turn
        self._came.append(came)

    def _end(self) -> None:
        came, self._came = self._came, []
        self._see_to(came)
