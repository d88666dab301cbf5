"""What leaves a connection, and in how many pieces: uvicorn's protocol over a transport that remembers what is written."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from mtl.serving.wire import Protocol

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n"


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


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def broken(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    raise ValueError("after the head")


def written(app: Any, *parts: bytes) -> tuple[list[bytes], bool]:
    """Writes after what the client sent, part by part, and whether the connection was closed."""

    async def exchange() -> tuple[list[bytes], bool]:
        config = uvicorn.Config(app, http=Protocol, log_config=None, access_log=False, lifespan="off")
        config.load()
        protocol, transport = Protocol(config=config, server_state=ServerState(), app_state={}), Remembering()
        protocol.connection_made(transport)
        for part in parts:
            protocol.data_received(part)
            for _ in range(10):
                await asyncio.sleep(0)
        return transport.written, transport.is_closed

    return asyncio.run(exchange())


def test_an_answer_is_one_write() -> None:
    (first, second), is_closed = written(echo, HEAD + b"\r\nhi", HEAD + b"\r\nho")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\nhi")
    assert second.endswith(b"\r\n\r\nho")
    assert not is_closed


def test_who_asks_whether_to_go_on_is_told_before_the_body_is_there() -> None:
    told, answer = written(echo, HEAD + b"expect: 100-continue\r\n\r\n", b"hi")[0]
    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.endswith(b"\r\n\r\nhi")


def test_requests_that_come_in_one_piece_are_answered_each() -> None:
    answers, _ = written(echo, (HEAD + b"\r\nhi") * 2)
    assert [answer[-2:] for answer in answers] == [b"hi", b"hi"]


def test_the_last_answer_leaves_before_the_connection_closes() -> None:
    (answer,), is_closed = written(echo, HEAD + b"connection: close\r\n\r\nhi")
    assert answer.endswith(b"\r\n\r\nhi")
    assert is_closed


def test_a_head_whose_body_fails_leaves_with_the_end_of_the_connection() -> None:
    (head,), is_closed = written(broken, HEAD + b"\r\nhi")
    assert head.startswith(b"HTTP/1.1 200")
    assert is_closed


def test_what_is_no_http_is_told_so() -> None:
    (answer,), is_closed = written(echo, b"nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert is_closed
