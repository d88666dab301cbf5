"""A latency objective held under load: worse answers first, fewer answers last.

What may be traded for time is a ladder of :class:`Rung`, from the best answers to the cheapest: shorter deadlines first, then
coarser classes. On the last rung, and only there, requests are refused. The controller is a state machine with no clock and
no thread: once a tick it is shown what happened (:class:`Window`) and says what holds next (:class:`State`).

Of the last ticks on a rung (older ones counting less) it knows how many requests ended, and how many of them took longer than
a threshold: 1% of n by chance alone may be np + 3√(np) + 2 with p = 0.01, and below that it does nothing. Down, at once: one
rung where more were above ``headroom`` · objective. And by Little's law the requests in the server at a completion rate X will
take in_flight/X: with that above it, too (and not by chance), one more for every factor of 2. Up, slowly: one rung after
``patience`` ticks in a row with no more than 1% above ``ease`` · objective, and only where fewer requests arrive than ``ease`` of
what the better rung was last found too slow for. That memory fades by 0.1% a tick, so that it is tried again some day.

Refusing: on the last rung, where all that is not enough, no more than N requests are let into the server at once, with
N + 3√N = headroom · objective · X, so that those who are find the objective kept, until nobody has been refused for a patience
of calm ticks.
Who is refused is told to come back after a time drawn from [1, 1 + refused/admitted] seconds, up to 30: spread, or they would
all come back at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mtl.errors import ConfigError
from mtl.gaussian import Array

_MAY_EXCEED = 0.01  # p: the objective is about the 99th percentile
_KEEP = 0.75  # of the counts, by tick: a memory of four ticks
_KEEP_RATE = 0.98  # of the completion rate: a server that became slower is found out
_LONGEST_RETRY = 30.0  # seconds
_LEAST_LIMIT = 2  # requests in the server: one at work and one to follow
_FADE = 1.001  # of what a rung was too slow for, by tick


@dataclass(frozen=True)
class Rung:
    """What a request is given."""

    deadline_ms: float  # of evaluations (mtl.serving.executor)
    coarseness: int  # place among the class functions, 0 the exact one


def ladder(deadlines_ms: Sequence[float], coarseness: int) -> tuple[Rung, ...]:
    """Deadlines from the longest to the shortest with exact classes, then with the shortest the coarser ones.

    Raises:
        ConfigError: there is no deadline, or they do not fall.
    """
    if not deadlines_ms or any(b >= a for a, b in itertools.pairwise(deadlines_ms)):
        raise ConfigError(f"deadlines {list(deadlines_ms)}: one at least, each shorter than the one before")
    shortest = deadlines_ms[-1]
    return (*(Rung(ms, 0) for ms in deadlines_ms), *(Rung(shortest, c) for c in range(1, coarseness + 1)))


@dataclass(frozen=True)
class Window:
    """One tick of the server."""

    seconds: float
    admitted: int
    refused: int
    in_flight: int  # admitted and not completed, at its end
    latencies_ms: Array  # of those completed, (n,)


class Counts(NamedTuple):
    """Of the last ticks on a rung, older ones counting less."""

    seconds: float
    arrived: float
    ended: float
    above: float  # of those, above headroom of the objective
    above_ease: float


_NOTHING = Counts(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class State:
    """What holds until the next tick, and what the next decision needs to remember."""

    rung: int = 0
    limit: int | None = None  # requests in the server at once; None: no limit
    retry_seconds: float = 1.0  # the longest that a refused request is told to wait
    counts: Counts = _NOTHING
    too_many: tuple[float, ...] = ()  # arrivals a second that each rung, the best first, was too slow for
    rate: float = 0.0  # completions a second while refusing
    calm: int = 0  # ticks in a row below ease
    steps_down: int = 0  # decisions since the server started, for its metrics
    steps_up: int = 0
    ticks_limited: int = 0


@dataclass(frozen=True)
class Controller:
    """The objective, and how it is pursued."""

    rungs: tuple[Rung, ...]
    objective_ms: float  # of the 99th percentile
    ease: float = 0.6  # of the objective: below it there is room for better answers
    patience: int = 3  # ticks
    headroom: float = 0.7

    def after(self, state: State, window: Window) -> State:
        """The next state, given one tick."""
        before = state.too_many or (math.inf,) * len(self.rungs)
        state = replace(state, counts=self._counted(state, window), too_many=tuple(_FADE * rate for rate in before))
        of = state.counts
        arrivals = of.arrived / of.seconds
        coming_ms = self._coming(of, window.in_flight)
        was_last = state.rung == len(self.rungs) - 1
        is_over = coming_ms > self.headroom * self.objective_ms or _is_many(of.above, of.ended)
        if is_over:
            state = self._down(state, coming_ms, arrivals)
        else:
            state = self._up(state, of.above_ease <= _MAY_EXCEED * of.ended and not window.refused, arrivals)
        return self._admission(state, window, is_over and was_last)

    def admits(self, state: State, in_flight: int) -> bool:
        """Whether one more request may enter beside ``in_flight`` others."""
        return state.limit is None or in_flight < state.limit

    def retry_after(self, state: State, uniform: float) -> int:
        """Whole seconds for the header of a refusal, from a draw of [0, 1)."""
        return math.ceil(1 + uniform * (state.retry_seconds - 1))

    def _counted(self, state: State, window: Window) -> Counts:
        late, arrived = window.latencies_ms / self.objective_ms, window.admitted + window.refused
        above, above_ease = int(np.sum(late > self.headroom)), int(np.sum(late > self.ease))
        now = window.seconds, arrived, len(late), above, above_ease
        return Counts(*(_KEEP * before + count for before, count in zip(state.counts, now, strict=True)))

    def _coming(self, of: Counts, in_flight: int) -> float:
        """What the last of those in the server will have taken (ms); 0 where that may be chance."""
        expected = self.objective_ms / 1000 * of.ended / of.seconds
        if in_flight <= expected + 2 * math.sqrt(expected) + 1:
            return 0.0
        return self.objective_ms * in_flight / expected if expected else math.inf

    def _down(self, state: State, coming_ms: float, arrivals: float) -> State:
        last = len(self.rungs) - 1
        by = 1 + int(math.log2(min(max(coming_ms / self.objective_ms, 1.0), 2.0**last)))
        rung = min(state.rung + by, last)
        # On the last rung the counts may be of load that has ended, and the arrivals of now say nothing of the better ones.
        known = state.rung if rung > state.rung else -1
        too_many = [min(rate, arrivals) if i <= known else rate for i, rate in enumerate(state.too_many)]
        return replace(
            state,
            rung=rung,
            counts=_NOTHING if rung > state.rung else state.counts,
            too_many=tuple(too_many),
            calm=0,
            steps_down=state.steps_down + rung - state.rung,
        )

    def _up(self, state: State, is_calm: bool, arrivals: float) -> State:
        state = replace(state, calm=state.calm + 1 if is_calm else 0)
        if state.rung == 0 or state.calm < self.patience or state.limit is not None:
            return state
        if arrivals > self.ease * state.too_many[state.rung - 1]:
            return state
        return replace(state, rung=state.rung - 1, counts=_NOTHING, calm=0, steps_up=state.steps_up + 1)

    def _admission(self, state: State, window: Window, is_all_used: bool) -> State:
        is_limited = state.rung == len(self.rungs) - 1 and (
            is_all_used or (state.limit is not None and state.calm < self.patience)
        )
        if not is_limited:
            return replace(state, limit=None, retry_seconds=1.0, rate=0.0)
        rate = max(len(window.latencies_ms) / window.seconds, _KEEP_RATE * state.rate)
        return replace(
            state,
            limit=max(_LEAST_LIMIT, _held(self.headroom * self.objective_ms / 1000 * rate)),
            retry_seconds=min(1 + window.refused / max(window.admitted, 1), _LONGEST_RETRY),
            rate=rate,
            ticks_limited=state.ticks_limited + 1,
        )


def _is_many(above: float, ended: float) -> bool:
    expected = _MAY_EXCEED * ended
    return above > expected + 3 * math.sqrt(expected) + 2


def _held(n: float) -> int:
    """How many may queue where n would be served in time on average, for 99% of them to be: N + 3√N = n."""
    return int((math.sqrt(n + 2.25) - 1.5) ** 2)
