"""What is asked for in one turn of the event loop, answered together.

Most of the time of a small request goes into calls: NumPy's for a few kilobytes, LMDB's for a transaction. Those of all requests
that came at once are the same calls on longer arrays, so that the busier a worker is, the less each request costs it. Nobody
waits for others to come: who has asked is answered when the loop has gone round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Together(Generic[Asked, Answer]):
    """One piece of work for all of a kind who ask for it in a turn; for one event loop.

    Args:
        work: answers to what was asked, in its order. What it raises is raised for each of them.
    """

    def __init__(self, work: Callable[[Sequence[Asked]], Sequence[Answer]]):
        self._work = work
        self._waiting: dict[Hashable, list[tuple[Asked, asyncio.Future[Answer]]]] = {}

    def ask(self, kind: Hashable, what: Asked) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._answer)
        answer = loop.create_future()
        self._waiting.setdefault(kind, []).append((what, answer))
        return answer

    def _answer(self) -> None:
        turn, self._waiting = self._waiting, {}
        for alike in turn.values():
            try:
                answers = self._work([what for what, _ in alike])
            except Exception as error:
                for _, waiting in alike:
                    if not waiting.cancelled():
                        waiting.set_exception(error)
                continue
            for (_, waiting), answer in zip(alike, answers, strict=True):
                if not waiting.cancelled():
                    waiting.set_result(answer)
