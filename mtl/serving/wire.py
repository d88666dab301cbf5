"""HTTP as uvicorn speaks it, its answers in one piece and requests of one route by way of :mod:`mtl.serving.turn`.

uvicorn writes head and body of an answer apart, and each write is a system call that may wake the client: measured, half
the price of a short answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mtl.serving.turn import Came, Turn

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

    A request that the turn takes is not the application's yet: it is added to the turn if its body came with its head, and
    started as any other if not.
    """

    def __init__(self, *args: Any, turn: Turn, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._turn = turn
        self._held: tuple[RequestResponseCycle, Any] | None = None  # and the application; while the parser runs

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedTransport(transport))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._release()

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        self._release()  # of requests that came one after the other the next

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._turn.takes(cycle.scope) and cycle.keep_alive and not cycle.waiting_for_100_continue:
            self._held = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _release(self) -> None:
        if self._held is None:
            return
        (cycle, app), self._held = self._held, None
        start = partial(super()._start_asgi_task, cycle, app)
        if cycle.more_body or self.flow.write_paused:
            start()
        else:
            self._turn.add(Came(cycle.body, cycle.scope["headers"], partial(self._answer, cycle), start))

    def _answer(
        self,
        cycle: RequestResponseCycle,
        content: bytes,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """As ``cycle.send`` does, in one step."""
        if cycle.disconnected:
            return
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b"
            % (STATUS_LINE[status], len(content), lines, content)
        )
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:  # the server ends
            self.transport.close()
        self.on_response_complete()
