"""Small requests of one route that came in one turn of the event loop.

Most of the time of a small request goes into calls: NumPy's for a few kilobytes, LMDB's for a transaction. Those of all requests
that came at once are the same calls on longer arrays, so that the busier a worker is, the less each request costs it. The server
reads all that has come before it begins to answer: whoever is the first to be answered can see to the others, and nobody waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

_SMALL = 16 * 1024  # bytes of a body


class Came(msgspec.Struct, gc=False, eq=False):
    """A request of which everything is there."""

    body: bytes  # or what nobody has taken of it yet
    headers: list[tuple[bytes, bytes]]
    turn: Turn
    answer: bytes | None = None  # where it is found already; to be sent when all that is to be checked was checked


class Turn:
    """For one event loop."""

    def __init__(self, path: str):
        self._path = path
        self._came: list[Came] = []

    def add(self, scope: Mapping[str, Any], body: bytearray) -> None:
        """A request that will be answered in the loop's next turn; who answers it finds it in its state as ``came``."""
        if scope["path"] != self._path or scope["method"] != "POST" or len(body) > _SMALL:
            return
        if not self._came:
            # After the first of them has begun, and before the second: what nobody took is everyone's own matter.
            asyncio.get_running_loop().call_soon(self._end)
        came = Came(bytes(body), scope["headers"], self)
        scope["state"]["came"] = came
        self._came.append(came)

    def take(self, first: Came) -> list[Came]:
        """All of the turn with the authorization of one of them, which is not to be asked for again."""
        came, self._came = self._came, []
        token = _authorization(first)
        return [one for one in came if _authorization(one) == token]

    def _end(self) -> None:
        self._came = []


def _authorization(came: Came) -> bytes | None:
    return dict(came.headers).get(b"authorization")
