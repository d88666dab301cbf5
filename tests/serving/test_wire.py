"""What leaves a connection, and in how many pieces; which of the requests that come are of a turn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from connecting import connect, posted, settle

from mtl.serving.turn import Turn

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n"


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
        protocol, transport = connect(app, Turn("/"))
        for part in parts:
            protocol.data_received(part)
            await settle()
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


class Recording:
    """Answers with the body, and keeps what was in the state of each request."""

    def __init__(self) -> None:
        self.came: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.came.append(scope["state"].get("came"))
        await echo(scope, receive, send)


def came_of(*parts: bytes) -> list[Any]:
    app = Recording()
    written(app, *parts)
    return app.came


def test_a_small_request_for_the_route_is_of_the_turn() -> None:
    (came,) = came_of(posted("/", b"hi"))
    assert came.body == b"hi"


@pytest.mark.parametrize(
    "other",
    [
        posted("/v1/observe", b"hi"),
        posted("/", b"h" * 20_000),
        posted("/", b"hi").replace(b"POST", b"PUT"),
    ],
)
def test_others_are_not(other: bytes) -> None:
    assert came_of(other) == [None]


def test_a_request_that_waits_for_another_of_its_connection_is_not() -> None:
    """What the one before does is not done yet."""
    first, second = came_of(posted("/", b"hi") * 2)
    assert first.body == b"hi"
    assert second is None


def test_a_request_whose_task_runs_before_its_body_is_there_has_nothing_in_its_state_yet() -> None:
    request = posted("/", b"hi")
    assert came_of(request[:-1], request[-1:]) == [None]
