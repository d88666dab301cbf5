"""What came in one turn of the loop is worked on at once, each gets its own, and one that left harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from mtl.serving.together import Together


class Doubling:
    def __init__(self) -> None:
        self.turns: list[list[int]] = []
        self.together: Together[int, int] = Together(self.work)

    def work(self, asked: Sequence[int]) -> list[int]:
        self.turns.append(list(asked))
        if -1 in asked:
            raise ValueError("-1")
        return [2 * one for one in asked]

    async def ask(self, one: int, kind: str = "") -> int:
        return await self.together.ask(kind, one)

    async def ask_all(self, *asked: int) -> list[int]:
        return await asyncio.gather(*map(self.ask, asked))


def test_one_turn_is_one_piece_of_work() -> None:
    doubling = Doubling()
    assert asyncio.run(doubling.ask_all(3, 1, 2)) == [6, 2, 4]
    assert asyncio.run(doubling.ask(5)) == 10
    assert doubling.turns == [[3, 1, 2], [5]]


def test_of_each_kind_it_is_one_piece() -> None:
    doubling = Doubling()

    async def mixed() -> list[int]:
        return await asyncio.gather(doubling.ask(1, "a"), doubling.ask(2, "b"), doubling.ask(3, "a"))

    assert asyncio.run(mixed()) == [2, 4, 6]
    assert doubling.turns == [[1, 3], [2]]


def test_who_comes_in_the_next_turn_is_in_the_next_piece() -> None:
    doubling = Doubling()

    async def one_after_the_other() -> list[int]:
        first = asyncio.create_task(doubling.ask(1))
        while not doubling.turns:
            await asyncio.sleep(0)
        return [await doubling.ask(2), await first]

    assert asyncio.run(one_after_the_other()) == [4, 2]
    assert doubling.turns == [[1], [2]]


def test_what_fails_of_one_kind_does_no_harm_to_another() -> None:
    doubling = Doubling()

    async def mixed() -> list[object]:
        asking = doubling.ask(-1, "a"), doubling.ask(2, "b"), doubling.ask(3, "a")
        return await asyncio.gather(*asking, return_exceptions=True)

    first, other, last = asyncio.run(mixed())
    assert (type(first), other, type(last)) == (ValueError, 4, ValueError)


def test_what_work_raises_is_raised_for_each_and_the_next_turn_goes_on() -> None:
    doubling = Doubling()

    async def failing() -> list[object]:
        return await asyncio.gather(doubling.ask(1), doubling.ask(-1), return_exceptions=True)

    found = asyncio.run(failing())
    assert [type(one) for one in found] == [ValueError, ValueError]
    assert asyncio.run(doubling.ask(4)) == 8


@pytest.mark.parametrize("other", [2, -1])
def test_one_that_was_cancelled_takes_no_answer_from_the_others(other: int) -> None:
    doubling = Doubling()

    async def leaving() -> list[object]:
        tasks = [asyncio.create_task(doubling.ask(one)) for one in (1, other)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    gone, answered = asyncio.run(leaving())
    assert isinstance(gone, asyncio.CancelledError)
    assert answered == 4 or isinstance(answered, ValueError)
