"""When what came is seen to, and that it is once."""

from __future__ import annotations

import asyncio

import pytest

from mtl.serving.turn import Came, Turn


def came(body: bytes) -> Came:
    return Came(bytearray(body), [], lambda content, status=200, headers=(): None, lambda: None)


def test_all_of_a_turn_are_seen_to_at_its_end_and_once() -> None:
    turns: list[list[Came]] = []

    async def passing() -> None:
        turn = Turn("/", turns.append)
        one, two, three = came(b"1"), came(b"2"), came(b"3")
        turn.add(one)
        turn.add(two)
        assert (len(turn), turns) == (2, [])
        await asyncio.sleep(0)
        assert (len(turn), turns) == (0, [[one, two]])
        turn.add(three)
        await asyncio.sleep(0)
        assert turns == [[one, two], [three]]
        await asyncio.sleep(0)
        assert len(turns) == 2

    asyncio.run(passing())


def test_what_comes_while_others_are_seen_to_is_of_the_next_turn() -> None:
    turns: list[list[Came]] = []

    async def passing() -> None:
        def see_to(some: list[Came]) -> None:
            turns.append(some)
            if len(turns) == 1:
                turn.add(came(b"next"))

        turn = Turn("/", see_to)
        turn.add(came(b"first"))
        await asyncio.sleep(0)
        assert len(turns) == 1
        await asyncio.sleep(0)

    asyncio.run(passing())
    assert [[bytes(one.body) for one in some] for some in turns] == [[b"first"], [b"next"]]


@pytest.mark.parametrize(
    ("path", "method", "is_taken"), [("/a", "POST", True), ("/b", "POST", False), ("/a", "GET", False)]
)
def test_requests_of_one_route_are_taken(path: str, method: str, is_taken: bool) -> None:
    assert Turn("/a", lambda some: None).takes({"path": path, "method": method}) == is_taken
