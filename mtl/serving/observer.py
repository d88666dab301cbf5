"""Observations of one worker: written to the log, many to a sync, then put where every worker sees them."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from mtl.serving.contest import Record, Rival
from mtl.serving.observations import Choice, Event, Feedback, ObservationLog, parse, recover
from mtl.serving.overlay import Overlay

log = logging.getLogger("mtl")

_RETRY_SECONDS = 5.0  # after a segment could not be sealed


@dataclass
class Observer:
    """A thread that waits for the disk so that the event loop does not.

    Args:
        folder: of the log of observations.
        feedback: of the log of rewards.
        decisions: of the log of decisions.
        segment_seconds, segment_bytes: when a segment is handed over to ingest.
        rivals: versions (:mod:`mtl.serving.contest`) that are told what ``overlay`` is, unless they are over.
        record: of what their decisions earn.
    """

    overlay: Overlay
    folder: Path
    feedback: Path
    decisions: Path
    segment_seconds: float
    segment_bytes: float
    rivals: Sequence[Rival] = ()
    record: Record | None = None
    _waiting: list[tuple[Event | Feedback | Choice, bool, asyncio.Future[bool]]] = field(default_factory=list)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _stopped: bool = False
    _seal_after: float = 0.0  # on the clock of time.monotonic
    _failing: set[int] = field(default_factory=set)  # rivals that could not be told of the last observations

    def start(self) -> None:
        """Recover what workers that died left, then wait for observations."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = recover(self.folder, lambda lines: self._insert([(event, True) for event in parse(lines)]))
        found += sum(recover(folder, lambda lines: None) for folder in (self.feedback, self.decisions))
        if found:
            log.info("serve: recovered %d segments of the log", found)
        self._events, self._rewards = ObservationLog(self.folder), ObservationLog(self.feedback)
        self._choices = ObservationLog(self.decisions)
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits and hand the segments over."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()

    async def add(self, row: Event | Feedback | Choice, look_up: bool) -> bool:
        """Whether the row is new, once it is on disk and every worker sees it.

        Raises:
            OSError: it could not be written.
        """
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with self._condition:
            self._waiting.append((row, look_up, done))
            self._condition.notify()
        return await done

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            # Requests would wait for a thread that is gone: the supervisor starts another worker.
            log.exception("serve: nothing can be observed any more: ending this worker")
            os._exit(1)

    def _work(self) -> None:
        is_over = False
        while not is_over:
            with self._condition:
                if not self._waiting and not self._stopped:
                    self._condition.wait(1.0)
                group, self._waiting = self._waiting, []
                is_over = self._stopped and not group
            if group:
                self._answer(group)
            self._seal_old()
        for segment in (self._events, self._rewards, self._choices):
            self._seal(segment)

    def _answer(self, group: list[tuple[Event | Feedback | Choice, bool, asyncio.Future[bool]]]) -> None:
        try:
            new = self._write(group)
        except Exception as error:
            log.error("serve: observations could not be written: %s", error)
            for _, _, done in group:
                _resolve(done, error)
        else:
            for (_, _, done), is_new in zip(group, new, strict=True):
                _resolve(done, is_new)

    def _write(self, group: list[tuple[Event | Feedback | Choice, bool, asyncio.Future[bool]]]) -> list[bool]:
        for kind, segment in ((Feedback, self._rewards), (Choice, self._choices)):
            if rows := [row for row, _, _ in group if isinstance(row, kind)]:
                segment.append(rows)
                if self.record is not None:
                    self.record.add(rows)
        offered = [(row, look_up) for row, look_up, _ in group if isinstance(row, Event)]
        unknown: dict[str, Event] = {}  # of an id that came twice at once the first, as in the overlay
        for row, _ in offered:
            if not self.overlay.knows(row.event_id):
                unknown.setdefault(row.event_id, row)
        if unknown:
            self._events.append(list(unknown.values()))
        new = iter(self._insert(offered)) if offered else iter(())
        return [next(new) if isinstance(row, Event) else True for row, _, _ in group]

    def _insert(self, offered: list[tuple[Event, bool]]) -> list[bool]:
        new = self.overlay.insert(offered)
        for rival in self.rivals:
            if not rival.is_over:
                self._tell(rival, offered)
        return new

    def _tell(self, rival: Rival, offered: list[tuple[Event, bool]]) -> None:
        """Let a rival know; one that fails holds nobody up."""
        try:
            rival.overlay.insert(offered)
            self._failing.discard(rival.version)
        except lmdb.Error as error:
            if rival.version not in self._failing:
                log.error("serve: version %d is not told of observations: %s", rival.version, error)
            self._failing.add(rival.version)

    def _seal_old(self) -> None:
        if time.monotonic() < self._seal_after:
            return
        for segment in (self._events, self._rewards, self._choices):
            if segment.age() > self.segment_seconds or segment.size > self.segment_bytes:
                self._seal(segment)

    def _seal(self, segment: ObservationLog) -> None:
        try:
            segment.seal()
        except OSError as error:
            log.error("serve: a segment of %s is not handed over yet: %s", segment.folder, error)
            self._seal_after = time.monotonic() + _RETRY_SECONDS


def _resolve(done: asyncio.Future[bool], outcome: bool | Exception) -> None:
    def tell() -> None:
        if not done.done():
            done.set_exception(outcome) if isinstance(outcome, Exception) else done.set_result(outcome)

    done.get_loop().call_soon_threadsafe(tell)
