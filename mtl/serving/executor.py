"""Evaluations that end by a deadline, however slow a function is, or hung.

Every function has a *lane*: a queue and a few daemon threads of its own, so that a slow function keeps none but its own
waiting. The thread that answers a request never runs a function: it hands evaluations to lanes, waits for what comes back and
leaves at the deadline with what there is. An evaluation that has not begun by its deadline never begins.

A thread cannot be killed, so a hung function keeps the thread that called it. What that may cost is bounded: a thread busy for
longer than ``hung_after`` seconds is written off and replaced, the replacements after 1, 2, 4 … times that pause, and no more
than ``most_hung`` of them. While it has no thread left, a lane is *out*: it refuses evaluations at once, and costs no request
any time, until a replacement is due or a hung thread comes back. A lane so holds ``threads + most_hung`` threads at most, for
ever, and no other lane is touched.

What this cannot do: a function that hangs in native code without giving up the interpreter's lock stops the process, and
one that computes in Python for ever slows it. Such functions belong in a process of their own, behind a function that waits.
A thread that computes in Python is asked for the lock only every ``sys.getswitchinterval()`` (5 ms unless set), and a full
garbage collection stops every thread (for 47 ms, measured, with the libraries of this project loaded). So a server that is to
keep deadlines sets the interval to 1 ms or less, and calls ``gc.collect()`` and ``gc.freeze()`` once it has loaded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from mtl.serving.anytime import Step

log = logging.getLogger("mtl")

Function = Callable[[Any, tuple[Any, ...]], Any]
"""(what is evaluated, results of the steps that it needs) → a result."""

_SMOOTHING = 0.1  # of a new cost in the running mean
_QUEUED_PER_THREAD = 64  # evaluations that may wait for a thread; more would not begin by any deadline
_PATIENCE = 2.0  # expected costs that a running evaluation is waited for before the next begins beside it
_LEAST_PATIENCE = 0.001  # seconds


@dataclass(frozen=True)
class LaneCounts:
    """What became of a lane's evaluations, and where its threads are."""

    done: int
    failed: int  # raised
    late: int  # done after their deadline
    dropped: int  # not begun by their deadline
    refused: int  # lane out or queue full
    hung: int  # threads that are written off now
    is_out: bool
    seconds: float  # expected cost of one evaluation


@dataclass
class _Evaluation:
    function: Function
    place: int
    argument: Any
    needed: tuple[Any, ...]
    deadline: float
    results: SimpleQueue[tuple[int, Any, bool]]
    is_wanted: bool = True


class Lane:
    """The threads of one function."""

    def __init__(
        self,
        name: str,
        function: Function,
        threads: int = 2,
        hung_after: float = 1.0,
        most_hung: int = 8,
        seconds: float = 0.001,
    ) -> None:
        """A lane whose threads start with the first evaluations.

        Args:
            threads: that evaluate at once.
            hung_after: seconds after which a busy thread is written off.
            most_hung: threads that may be written off at one time.
            seconds: expected cost of an evaluation, until there are measurements.
        """
        self.name, self.function = name, function
        self._threads, self._hung_after, self._most_hung = threads, hung_after, most_hung
        self._seconds = seconds
        self._queue: deque[_Evaluation] = deque()
        self._ready = threading.Condition()
        self._busy: dict[threading.Thread, float] = {}  # since when
        self._idle = 0
        self._closed = False
        self._hung: set[threading.Thread] = set()
        self._replaced_at, self._pause = -float("inf"), hung_after
        self._done = self._failed = self._late = self._dropped = self._refused = 0

    @property
    def seconds(self) -> float:
        """Expected cost of one evaluation."""
        return self._seconds

    def counts(self) -> LaneCounts:
        with self._ready:
            self._write_off(time.monotonic())
            told = self._done, self._failed, self._late, self._dropped, self._refused
            return LaneCounts(*told, len(self._hung), bool(self._hung) and not self._working(), self._seconds)

    def close(self) -> None:
        """Take no more evaluations and let the threads go, a hung one when it comes back."""
        with self._ready:
            self._closed = True
            self._queue.clear()
            self._ready.notify_all()

    def submit(self, evaluation: _Evaluation) -> bool:
        """Queue an evaluation; False where none can be taken."""
        with self._ready:
            now = time.monotonic()
            self._write_off(now)
            while self._queue and not self._queue[0].is_wanted:
                self._queue.popleft()
                self._dropped += 1
            if not self._closed and len(self._queue) >= self._idle and self._may_start(now):
                self._start()
            if self._closed or not self._working() or len(self._queue) >= _QUEUED_PER_THREAD * self._threads:
                self._refused += 1
                return False
            self._queue.append(evaluation)
            self._ready.notify()
            return True

    def queue(self, argument: Any) -> bool:
        """:meth:`submit` an evaluation that nobody waits for."""
        return self.submit(_Evaluation(self.function, 0, argument, (), float("inf"), SimpleQueue()))

    def _working(self) -> int:
        """Threads that are not written off."""
        return len(self._busy) - len(self._hung) + self._idle

    def _may_start(self, now: float) -> bool:
        if self._working() >= self._threads:
            return False
        if not self._hung:
            return True
        if len(self._hung) >= self._most_hung or now < self._replaced_at + self._pause:
            return False
        self._replaced_at, self._pause = now, 2 * self._pause
        return True

    def _write_off(self, now: float) -> None:
        for thread, since in self._busy.items():
            if now - since > self._hung_after and thread not in self._hung:
                self._hung.add(thread)
                self._learn(now - since)

    def _learn(self, seconds: float) -> None:
        self._seconds += _SMOOTHING * (seconds - self._seconds)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"lane {self.name}", daemon=True)
        self._busy[thread] = time.monotonic()  # until it waits
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads: what there is goes on
            del self._busy[thread]
            log.warning("serving: %s: a thread cannot be started", self.name)

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._ready:
                del self._busy[me]
                if me in self._hung:  # back after all; another may have its place
                    self._hung.remove(me)
                    self._pause = self._hung_after
                    if self._working() >= self._threads:
                        return
                self._idle += 1
                while not self._queue and not self._closed:
                    self._ready.wait()
                self._idle -= 1
                if self._closed:
                    return
                evaluation, began = self._queue.popleft(), time.monotonic()
                self._busy[me] = began
                if not evaluation.is_wanted or began >= evaluation.deadline:
                    self._dropped += 1
                    continue
            try:
                result, is_good = evaluation.function(evaluation.argument, evaluation.needed), True
            except BaseException as error:  # even SystemExit is the function's affair, not the thread's
                log.warning("serving: %s failed: %s: %s", self.name, type(error).__name__, error)
                result, is_good = None, False
            ended = time.monotonic()
            evaluation.results.put((evaluation.place, result, is_good))
            with self._ready:
                self._done += is_good
                self._failed += not is_good
                self._late += ended > evaluation.deadline
                if me not in self._hung:
                    self._learn(ended - began)


def evaluate(
    steps: Sequence[Step],
    lanes: Sequence[Lane],
    order: Sequence[int],
    argument: Any,
    deadline: float,
    at_once: int = 1,
) -> dict[int, Any]:
    """Results of the steps that ended by the deadline, by their place.

    Steps go in their order, ``at_once`` at a time while they take what they are expected to; one that takes twice that is no
    longer waited for, and the next begins beside it. A step that is not expected to end by the deadline makes way for later ones
    that are, and is tried when nothing else is left. Steps that need a failed one are left out.

    Args:
        steps, lanes: a lane a step.
        order: places of steps, each after those that it needs.
        argument: what the functions are given.
        deadline: on the clock of ``time.monotonic``.
        at_once: more than 1 gains where functions wait for something else than this machine's cores.
    """
    results: SimpleQueue[tuple[int, Any, bool]] = SimpleQueue()
    found: dict[int, Any] = {}
    waiting, running, failed = list(order), dict[int, _Evaluation](), set[int]()
    until = dict[int, float]()  # when patience with a running step ends
    try:
        while (waiting or running) and (now := time.monotonic()) < deadline:
            patient = [until[place] for place in running if until[place] > now]
            if len(patient) < at_once:
                waiting = [place for place in waiting if failed.isdisjoint(steps[place].after)]
                place = _next(steps, lanes, waiting, found, deadline - now)
                if place >= 0:
                    waiting.remove(place)
                    needed = tuple(found[before] for before in steps[place].after)
                    task = _Evaluation(lanes[place].function, place, argument, needed, deadline, results)
                    if lanes[place].submit(task):
                        running[place] = task
                        until[place] = now + max(_PATIENCE * lanes[place].seconds, _LEAST_PATIENCE)
                    else:
                        failed.add(place)
                    continue
                if not running:
                    break
            wake = min([deadline, *patient]) if waiting else deadline
            try:
                place, result, is_good = results.get(timeout=max(wake - time.monotonic(), 0.0))
            except Empty:
                continue
            del running[place]
            if is_good:
                found[place] = result
            else:
                failed.add(place)
    finally:
        for task in running.values():
            task.is_wanted = False
    return found


def _next(
    steps: Sequence[Step], lanes: Sequence[Lane], waiting: Sequence[int], found: dict[int, Any], left: float
) -> int:
    """The first step that can begin and is expected to end in time; failing that, the first that can begin; or −1."""
    able = [place for place in waiting if all(before in found for before in steps[place].after)]
    return next((place for place in able if lanes[place].seconds <= left), able[0] if able else -1)
