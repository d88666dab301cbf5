"""The thread that writes what a worker observes: whatever fails, requests get an answer."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mtl.serving import observations, observer
from mtl.serving.observations import Event, read, sealed
from mtl.serving.observer import Observer
from mtl.serving.overlay import Overlay

Make = Callable[..., Observer]


def event(i: int) -> Event:
    return Event(f"e{i}", "u", "x", 1.5, 1.0, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(observer, "_RETRY_SECONDS", 0.05)
    started: list[Observer] = []

    def make(segment_seconds: float) -> Observer:
        folders = (tmp_path / name for name in ("log", "feedback", "decisions"))
        started.append(Observer(Overlay(tmp_path), *folders, segment_seconds, 1e9))
        started[-1].start()
        return started[-1]

    yield make
    for one in started:
        one.stop()
        one.overlay.close()


def add(to: Observer, i: int) -> bool:
    return asyncio.run(asyncio.wait_for(to.add(event(i), False), 5))


def test_a_segment_that_cannot_be_renamed_is_handed_over_later(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, failures = observations._rename, [OSError("disk failed")] * 2

    def fail_twice(path: Path) -> None:
        if failures:
            raise failures.pop()
        rename(path)

    monkeypatch.setattr(observations, "_rename", fail_twice)
    to = make(0.0)
    for i in range(3):
        assert add(to, i)
        time.sleep(0.1)
    ends = time.monotonic() + 5
    while len(list(read(sealed(tmp_path / "log")))) < 3 and time.monotonic() < ends:
        time.sleep(0.05)
    assert sorted(one.event_id for one in read(sealed(tmp_path / "log"))) == ["e0", "e1", "e2"]
    assert not failures


def test_a_request_does_not_wait_for_a_segment_that_is_handed_over(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, rename = threading.Event(), threading.Event(), observations._rename

    def slowly(path: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        rename(path)

    monkeypatch.setattr(observations, "_rename", slowly)
    to = make(0.2)
    add(to, 0)
    assert begun.wait(10)
    is_free = to._condition.acquire(timeout=1)
    if is_free:
        to._condition.release()
    go_on.set()
    assert is_free


def test_of_an_id_that_comes_twice_at_once_the_first_is_kept_everywhere(make: Make, tmp_path: Path) -> None:
    to = make(1000.0)
    first = event(0)
    second = msgspec.structs.replace(first, label=9.0)

    async def both() -> list[bool]:
        with to._condition:  # the thread finds them in one group
            adding = [asyncio.ensure_future(to.add(one, False)) for one in (first, second)]
            for _ in range(10):
                await asyncio.sleep(0)
        return await asyncio.wait_for(asyncio.gather(*adding), 5)

    assert asyncio.run(both()) == [True, False]
    to.stop()
    assert [one.label for one in read(sealed(tmp_path / "log"))] == [first.label]
    assert [pending.event.label for pending in to.overlay.every().values()] == [first.label]


def test_a_worker_whose_observer_is_broken_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    to = make(1000.0)
    monkeypatch.setattr(to, "_seal_old", lambda: 1 / 0)
    add(to, 0)
    assert ended.wait(5)
