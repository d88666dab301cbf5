"""Who of a turn is answered with whom."""

from __future__ import annotations

import asyncio
from typing import Any

from mtl.serving.turn import Came, Turn


def add(turn: Turn, body: bytes, token: bytes | None = None) -> Came:
    headers = [(b"authorization", token)] if token is not None else []
    scope: dict[str, Any] = {"path": "/", "method": "POST", "headers": headers, "state": {}}
    turn.add(scope, bytearray(body))
    return scope["state"]["came"]


def test_all_of_a_turn_are_taken_once() -> None:
    async def taking() -> None:
        turn = Turn("/")
        first, second = add(turn, b"1"), add(turn, b"2")
        assert turn.take(second) == [first, second]
        assert turn.take(first) == []

    asyncio.run(taking())


def test_what_nobody_took_is_not_of_the_next_turn() -> None:
    async def passing() -> None:
        turn = Turn("/")
        add(turn, b"1")
        await asyncio.sleep(0)
        second = add(turn, b"2")
        assert turn.take(second) == [second]

    asyncio.run(passing())


def test_nothing_is_done_for_who_has_another_authorization() -> None:
    async def guarded() -> None:
        turn = Turn("/")
        first = add(turn, b"1", b"Bearer right")
        add(turn, b"2", b"Bearer wrong")
        add(turn, b"3")
        last = add(turn, b"4", b"Bearer right")
        assert turn.take(first) == [first, last]

    asyncio.run(guarded())
