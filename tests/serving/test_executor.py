"""Evaluations by a deadline: a function that hangs costs its own threads, a bounded number, and no answer its time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mtl.serving.anytime import Step
from mtl.serving.executor import Lane, evaluate

SOON = 0.05  # seconds; long beside the work of these tests, short beside a hang
FAR = 30.0
NUMBERS = itertools.count()  # threads are told apart by the names of their lanes


def add(argument: int, needed: tuple[int, ...]) -> int:
    return argument + sum(needed)


def lanes_of(*functions: Callable, **options: float) -> tuple[list[Step], list[Lane]]:
    steps = [Step(f"f{next(NUMBERS)}", (i,)) for i in range(len(functions))]
    return steps, [Lane(step.name, function, **options) for step, function in zip(steps, functions, strict=True)]  # type: ignore[arg-type]


@pytest.fixture
def hang():
    """A function that hangs until the test is over, or its event is set."""
    release = threading.Event()

    def function(argument: int, needed: tuple[int, ...]) -> int:
        release.wait()
        return argument

    function.release = release  # type: ignore[attr-defined]
    yield function
    release.set()


def threads_of(lane: Lane) -> int:
    return sum(thread.name == f"lane {lane.name}" for thread in threading.enumerate())


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def test_steps_get_the_results_of_those_that_they_need() -> None:
    steps = [Step("encode", ()), Step("f1", (1,), (0,)), Step("f2", (2,), (0, 1))]
    lanes = [Lane(step.name, add) for step in steps]
    assert evaluate(steps, lanes, [0, 1, 2], 5, time.monotonic() + FAR) == {0: 5, 1: 10, 2: 20}


def test_a_hung_function_is_left_behind_at_the_deadline_and_the_others_are_reached(hang) -> None:
    steps, lanes = lanes_of(add, hang, add, add)
    started = time.monotonic()
    found = evaluate(steps, lanes, [1, 0, 3, 2], 5, started + 5 * SOON)
    assert sorted(found) == [0, 2, 3]
    assert time.monotonic() - started < FAR / 10


def test_without_anything_hung_nobody_waits_for_the_deadline() -> None:
    steps, lanes = lanes_of(add, add)
    started = time.monotonic()
    evaluate(steps, lanes, [0, 1], 1, started + FAR)
    assert time.monotonic() - started < FAR / 10


def test_steps_run_as_many_at_once_as_is_said() -> None:
    """Functions that end only together."""
    for at_once, reached in ((3, 3), (2, 0)):
        meet = threading.Barrier(3)

        def together(argument: int, needed: tuple[int, ...], meet: threading.Barrier = meet) -> int:
            meet.wait()
            return argument

        steps, lanes = lanes_of(together, together, together, seconds=FAR)
        deadline = time.monotonic() + (FAR if reached else SOON)
        assert len(evaluate(steps, lanes, [0, 1, 2], 1, deadline, at_once)) == reached
        meet.abort()


def test_hung_threads_are_bounded_and_a_lane_without_any_other_refuses_at_once(hang) -> None:
    steps, (lane,) = lanes_of(hang, threads=2, hung_after=0.01, most_hung=3)

    def ask() -> dict:
        return evaluate(steps, [lane], [0], 1, time.monotonic() + 0.02)

    assert eventually(lambda: ask() == {} and lane.counts().hung == 3)
    ends = time.monotonic() + 10 * SOON  # many times the pause after which another thread would be tried
    while time.monotonic() < ends:
        ask()
        time.sleep(0.005)
    counts = lane.counts()
    assert (counts.hung, counts.is_out) == (3, True)
    assert threads_of(lane) <= 2 + 3
    started = time.monotonic()
    assert evaluate(steps, [lane], [0], 1, started + FAR) == {}
    assert time.monotonic() - started < FAR / 10
    assert lane.counts().refused == counts.refused + 1
    # The function is well again: threads come back, none is lost, none is too many.
    hang.release.set()
    assert eventually(lambda: lane.counts().hung == 0)
    assert evaluate(steps, [lane], [0], 7, time.monotonic() + FAR) == {0: 7}
    assert threads_of(lane) <= 2


def test_a_lane_that_writes_nothing_off_lets_every_request_wait(hang) -> None:
    """The guard off: with no thread ever written off, a request waits for its deadline, hung lane or not."""
    steps, (lane,) = lanes_of(hang, threads=2, hung_after=float("inf"))
    for _ in range(5):
        evaluate(steps, [lane], [0], 1, time.monotonic() + 0.02)
    started = time.monotonic()
    assert evaluate(steps, [lane], [0], 1, started + 2 * SOON) == {}
    assert time.monotonic() - started >= 2 * SOON
    assert not lane.counts().is_out


def test_one_hung_lane_takes_no_thread_of_another(hang) -> None:
    steps, lanes = lanes_of(hang, add, threads=1, hung_after=4 * SOON)
    for _ in range(30):
        assert evaluate(steps, lanes, [0, 1], 1, time.monotonic() + 4 * SOON)[1] == 1
    assert threads_of(lanes[1]) == 1


def test_a_function_that_exits_ends_no_thread() -> None:
    def leave(argument: int, needed: tuple[int, ...]) -> int:
        raise SystemExit

    steps, (lane,) = lanes_of(leave, threads=1)
    for _ in range(3):
        assert evaluate(steps, [lane], [0], 1, time.monotonic() + FAR) == {}
    assert lane.counts().failed == 3
    assert threads_of(lane) == 1


def test_a_failed_step_takes_those_with_it_that_need_it() -> None:
    def fail(argument: int, needed: tuple[int, ...]) -> int:
        raise ValueError("no")

    steps = [Step("bad", (0,)), Step("next", (1,), (0,)), Step("last", (2,), (1,)), Step("other", (3,))]
    lanes = [Lane("bad", fail), *(Lane(step.name, add) for step in steps[1:])]
    started = time.monotonic()
    assert evaluate(steps, lanes, [0, 1, 2, 3], 5, started + FAR) == {3: 5}
    assert time.monotonic() - started < FAR / 10
    assert lanes[0].counts().failed == 1


def test_what_has_not_begun_by_its_deadline_never_begins(hang) -> None:
    seen = list[int]()

    def first_hangs(argument: int, needed: tuple[int, ...]) -> int:
        seen.append(argument)
        return hang(argument, needed) if argument == 0 else argument

    steps, (lane,) = lanes_of(first_hangs, threads=1, hung_after=FAR)
    lane.queue(0)
    assert eventually(lambda: seen == [0])
    for argument in (1, 2, 3):
        evaluate(steps, [lane], [0], argument, time.monotonic() + 0.01)
    hang.release.set()
    assert eventually(lambda: lane.counts().dropped == 3)
    assert evaluate(steps, [lane], [0], 9, time.monotonic() + FAR) == {0: 9}
    assert seen == [0, 9]


def test_a_step_too_slow_for_the_time_left_makes_way() -> None:
    asked = list[str]()  # of whom first; which of two threads runs first is the machine's to say

    class Recorded(Lane):
        def submit(self, evaluation: Any) -> bool:
            asked.append(self.name)
            return super().submit(evaluation)

    def told(argument: int, needed: tuple[int, ...]) -> int:
        return argument

    steps = [Step("slow", (0,)), Step("quick", (1,))]
    lanes = [Recorded("slow", told, seconds=2 * FAR), Recorded("quick", told, seconds=0.001)]
    evaluate(steps, lanes, [0, 1], 1, time.monotonic() + FAR)
    assert asked == ["quick", "slow"]


def test_costs_are_learnt() -> None:
    def slow(argument: int, needed: tuple[int, ...]) -> int:
        time.sleep(0.02)
        return argument

    steps, (lane,) = lanes_of(slow, seconds=0.001)
    for _ in range(30):
        evaluate(steps, [lane], [0], 1, time.monotonic() + FAR)
    assert lane.seconds == pytest.approx(0.02, rel=0.5)


def test_a_closed_lane_lets_its_threads_go() -> None:
    steps, (lane,) = lanes_of(add, threads=2)
    assert evaluate(steps, [lane], [0], 1, time.monotonic() + FAR) == {0: 1}
    lane.close()
    assert eventually(lambda: threads_of(lane) == 0)
    assert evaluate(steps, [lane], [0], 1, time.monotonic() + FAR) == {}
