"""HTTP as uvicorn speaks it, its answers in one piece and its requests in :mod:`mtl.serving.turn`.

uvicorn writes head and body of an answer apart, and each write is a system call that may wake the client: measured, half
the price of a short answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mtl.serving.turn import Turn

_CONTINUE = b"HTTP/1.1 100 "  # no answer, and the client waits for it


class JoinedTransport:
    """A transport that holds what is written until :meth:`flush`."""

    __slots__ = ("_parts", "_transport")

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)
        if data.startswith(_CONTINUE):
            self.flush()

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP over such a transport.

    Args:
        turn: what is told of requests that are complete; those that wait for another of their connection are not.
    """

    def __init__(self, *args: Any, turn: Turn, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._turn = turn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedTransport(transport))  # type: ignore[arg-type]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle = self.cycle  # none of a first request that is an upgrade
        if cycle and not cycle.response_complete and not self.pipeline:
            self._turn.add(cycle.scope, cycle.body)

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
