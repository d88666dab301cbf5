"""What leaves a connection, and in how many pieces; which way the requests go that come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from connecting import connect, posted, settle

from mtl.serving.turn import Came, Turn

HEAD = b"POST /other HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def broken(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    raise ValueError("after the head")


def nothing_is_taken(came: list[Came]) -> None:
    raise AssertionError


def written(
    app: Any, *parts: bytes, see_to: Callable[[list[Came]], None] = nothing_is_taken
) -> tuple[list[bytes], bool]:
    """Writes after what the client sent, part by part, and whether the connection was closed."""

    async def exchange() -> tuple[list[bytes], bool]:
        protocol, transport = connect(app, Turn("/", see_to))
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


def shout(came: list[Came]) -> None:
    for one in came:
        one.answer(one.body.upper())


def pass_on(came: list[Came]) -> None:
    for one in came:
        one.pass_on()


def bodies(answers: list[bytes]) -> list[bytes]:
    return [answer.partition(b"\r\n\r\n")[2] for answer in answers]


def test_a_request_that_the_turn_takes_is_answered_without_the_application() -> None:
    answers, is_closed = written(broken, posted("/", b"hi"), posted("/", b"ho"), see_to=shout)
    assert answers == [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n" + b for b in (b"HI", b"HO")
    ]
    assert not is_closed


def test_it_may_be_answered_with_another_status_and_more_headers() -> None:
    def refuse(came: list[Came]) -> None:
        came[0].answer(b"no", 503, ((b"retry-after", b"1"),))

    (answer,), _ = written(broken, posted("/", b"hi"), see_to=refuse)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 503 Service Unavailable"
    assert b"retry-after: 1" in head.split(b"\r\n")
    assert body == b"no"


def test_what_is_passed_on_is_answered_by_the_application() -> None:
    assert bodies(written(echo, posted("/", b"hi"), see_to=pass_on)[0]) == [b"hi"]


@pytest.mark.parametrize(
    "other",
    [
        (posted("/v1/observe", b"hi"),),
        (posted("/", b"hi").replace(b"POST", b"PUT"),),
        (posted("/", b"hi", b"connection: close"),),
        (posted("/", b"hi").replace(b"HTTP/1.1", b"HTTP/1.0"),),
        (posted("/", b"hi")[:-1], b"i"),
    ],
    ids=["another route", "another method", "the last of its connection", "an old version", "in parts"],
)
def test_others_go_to_the_application(other: tuple[bytes, ...]) -> None:
    assert bodies(written(echo, *other, see_to=shout)[0]) == [b"hi"]


def test_who_waits_to_be_told_to_go_on_goes_to_the_application() -> None:
    told, answer = written(echo, posted("/", b"hi", b"expect: 100-continue"), see_to=shout)[0]
    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert bodies([answer]) == [b"hi"]


def test_requests_that_come_in_one_piece_are_answered_in_their_order() -> None:
    """Each when the one before it is, whichever way they go."""
    pieces = posted("/", b"one") + posted("/slow", b"two") + posted("/", b"three") + posted("/", b"four")
    assert bodies(written(echo, pieces, see_to=shout)[0]) == [b"ONE", b"two", b"THREE", b"FOUR"]


def test_of_requests_in_one_piece_the_last_may_lack_its_end() -> None:
    first, second = posted("/", b"one"), posted("/", b"two")
    assert bodies(written(echo, first + second[:-1], second[-1:], see_to=shout)[0]) == [b"ONE", b"two"]


def test_a_body_that_never_comes_is_the_applications_to_wait_for() -> None:
    started: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["path"])

    written(app, posted("/", b"one") + posted("/", b"two")[:-1], see_to=shout)
    assert started == ["/"]


def test_nothing_is_written_to_who_is_gone() -> None:
    async def leaving() -> list[bytes]:
        protocol, transport = connect(broken, Turn("/", shout))
        protocol.data_received(posted("/", b"hi"))
        protocol.connection_lost(None)
        await settle()
        return transport.written

    assert asyncio.run(leaving()) == []


def test_who_does_not_read_answers_is_waited_for() -> None:
    async def slow() -> tuple[list[bytes], list[bytes]]:
        protocol, transport = connect(echo, Turn("/", shout))
        protocol.pause_writing()
        protocol.data_received(posted("/", b"hi"))
        await settle()
        before = list(transport.written)
        protocol.resume_writing()
        await settle()
        return before, transport.written

    before, after = asyncio.run(slow())
    assert before == []
    assert bodies(after) == [b"hi"]


def test_when_the_server_ends_what_came_is_answered_before_the_connection_closes() -> None:
    async def ending() -> tuple[list[bytes], bool]:
        protocol, transport = connect(broken, Turn("/", shout))
        protocol.data_received(posted("/", b"hi"))
        protocol.shutdown()
        assert not transport.is_closed
        await settle()
        return transport.written, transport.is_closed

    answers, is_closed = asyncio.run(ending())
    assert bodies(answers) == [b"HI"]
    assert is_closed


def test_an_idle_connection_is_closed_after_a_while() -> None:
    async def idling() -> tuple[bool, bool]:
        protocol, transport = connect(broken, Turn("/", shout))
        protocol.timeout_keep_alive = 0.05  # type: ignore[assignment]
        protocol.data_received(posted("/", b"hi"))
        await settle()
        before = transport.is_closed
        await asyncio.sleep(0.2)
        return before, transport.is_closed

    assert asyncio.run(idling()) == (False, True)
