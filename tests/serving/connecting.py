"""uvicorn's protocol over a transport that remembers what is written, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from mtl.serving.turn import Turn
from mtl.serving.wire import Protocol


class Remembering(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connect(app: Any, turn: Turn) -> tuple[Protocol, Remembering]:
    """A new connection to an ASGI application; in a running loop."""
    config = uvicorn.Config(app, http=Protocol, log_config=None, access_log=False, lifespan="off")
    config.load()
    protocol = Protocol(config=config, server_state=ServerState(), app_state={}, turn=turn)
    transport = Remembering()
    protocol.connection_made(transport)
    return protocol, transport


async def settle() -> None:
    """Let the loop go round until all that was read is answered."""
    for _ in range(10):
        await asyncio.sleep(0)


def posted(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = b"POST " + path.encode() + b" HTTP/1.1", b"host: a", b"content-length: %d" % len(body), *headers
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
