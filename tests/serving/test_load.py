"""The load controller against a simulated server: the objective held, answers refused last, recovery after."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.errors import ConfigError
from mtl.serving.load import Controller, Rung, State, Window, ladder

RUNGS = ladder((100.0, 50.0, 25.0), 2)
CONTROLLER = Controller(RUNGS, objective_ms=100.0)
# Mean service times on one core: saturation at 100 requests a second on the best rung, 500 on the last.
SERVICE = np.array([0.010, 0.006, 0.004, 0.003, 0.002])
TICK = 0.25


def test_the_ladder_gives_up_time_first_then_likeness() -> None:
    assert (Rung(100, 0), Rung(50, 0), Rung(25, 0), Rung(25, 1), Rung(25, 2)) == RUNGS
    for bad in ((), (10, 10), (5, 10)):
        with pytest.raises(ConfigError, match="each shorter"):
            ladder(bad, 1)


@dataclass
class Run:
    """What a simulated server saw, by tick."""

    states: list[State] = field(default_factory=list)
    latency: list[tuple[float, float]] = field(default_factory=list)  # (when it arrived, seconds)
    refused_on: list[int] = field(default_factory=list)  # rungs
    refused_at: list[float] = field(default_factory=list)


def simulate(rate, seconds: float, controller: Controller = CONTROLLER, seed: int = 0, is_on: bool = True) -> Run:
    """One core, first come first served, Poisson arrivals of ``rate(t)`` a second, exponential service by rung."""
    random, run, state = np.random.default_rng(seed), Run(), State()
    free_at, in_flight, t, next_tick = 0.0, list[float](), 0.0, TICK
    admitted = refused = 0
    done = list[tuple[float, float]]()
    while t < seconds:
        t += random.exponential(1 / rate(t))
        while t >= next_tick:
            while in_flight and in_flight[0] <= next_tick:
                heapq.heappop(in_flight)
            ended = [latency for end, latency in done if next_tick - TICK < end <= next_tick]
            done = [one for one in done if one[0] > next_tick]
            window = Window(TICK, admitted, refused, len(in_flight), 1000 * np.array(ended))
            state = controller.after(state, window) if is_on else state
            run.states.append(state)
            admitted = refused = 0
            next_tick += TICK
        while in_flight and in_flight[0] <= t:
            heapq.heappop(in_flight)
        if not controller.admits(state, len(in_flight)):
            refused += 1
            run.refused_on.append(state.rung)
            run.refused_at.append(t)
            continue
        admitted += 1
        free_at = max(free_at, t) + SERVICE[state.rung] * random.exponential()
        heapq.heappush(in_flight, free_at)
        done.append((free_at, free_at - t))
        run.latency.append((t, free_at - t))
    return run


def p99(run: Run, begin: float, end: float) -> float:
    return 1000 * float(np.quantile([seconds for t, seconds in run.latency if begin <= t < end], 0.99))


def ramp(top: float):
    """From 20 a second to ``top`` in 20 s, there for 20 s, then 20 again."""
    return lambda t: 20 + (top - 20) * min(t / 20, 1.0) if t < 40 else 20.0


def held(runs: list[Run]) -> bool:
    """The objective held while the load was on, in all runs of eight but one at most, and nearly in that."""
    found = sorted(p99(run, 0, 40) for run in runs)
    return found[-2] <= 100 and found[-1] <= 130


def test_three_times_saturation_is_held_by_worse_answers() -> None:
    runs = [simulate(ramp(300), 60, seed=seed) for seed in range(8)]
    assert held(runs)
    for run in runs:
        assert max(state.rung for state in run.states) >= 3
        assert len(run.refused_at) < 0.01 * len(run.latency)  # the last rung has room for nearly all


def test_what_the_last_rung_cannot_hold_is_refused_and_the_objective_kept() -> None:
    runs = [
        simulate(ramp(1000), 60, seed=seed) for seed in range(8)
    ]  # ten times saturation, twice what the last rung does
    assert held(runs)
    for run in runs:
        assert set(run.refused_on) == {len(RUNGS) - 1}
        at_top = sum(20 <= t < 40 for t, _ in run.latency) / 20
        assert at_top > 0.95 * 500  # no more is refused than must be


@pytest.mark.parametrize("top", [300, 1000])
def test_ten_seconds_after_answers_are_the_best_again(top: float) -> None:
    run = simulate(ramp(top), 60)
    after = run.states[int(50 / TICK) :]
    assert all(state.rung == 0 and state.limit is None for state in after)
    assert not [t for t in run.refused_at if t > 42]
    assert p99(run, 43, 60) <= 100


def test_without_the_controller_the_same_load_breaks_the_objective() -> None:
    assert not held([simulate(ramp(300), 60, seed=seed, is_on=False) for seed in range(8)])


def test_a_load_that_the_best_answers_hold_is_left_alone() -> None:
    run = simulate(lambda t: 20.0, 300)
    assert run.states[-1].steps_down <= 2  # in 1,200 ticks


def test_between_two_rungs_it_does_not_go_up_and_down_all_the_time() -> None:
    run = simulate(lambda t: 130.0, 300)  # more than the best rung holds
    late = run.states[int(100 / TICK) :]
    moves = late[-1].steps_down + late[-1].steps_up - late[0].steps_down - late[0].steps_up
    assert moves / len(late) < 0.1
    assert p99(run, 20, 300) <= 130
    # What a rung was too slow for is what keeps it from being tried again at once: with that forgotten, it is.
    forgetful = replace(CONTROLLER, ease=0.99)
    eager = simulate(lambda t: 130.0, 300, forgetful).states[int(100 / TICK) :]
    assert eager[-1].steps_up - eager[0].steps_up > late[-1].steps_up - late[0].steps_up


def window(admitted: int = 100, refused: int = 0, in_flight: int = 0, latencies=()) -> Window:
    return Window(1.0, admitted, refused, in_flight, np.array(latencies, float))


def test_a_burst_goes_down_several_rungs_at_once() -> None:
    burst = window(500, 0, 45, [50.0] * 100)
    assert CONTROLLER.after(State(), burst).rung == 3  # 450 ms are coming: 1 + ⌊log₂ 4.5⌋
    assert CONTROLLER.after(State(), window(50, 0, 50)).rung == 4  # nothing comes back at all
    assert CONTROLLER.after(State(), window(0)).rung == 0


def test_one_slow_answer_is_chance_and_several_are_not() -> None:
    assert CONTROLLER.after(State(), window(latencies=[5.0] * 99 + [500.0])).rung == 0
    assert CONTROLLER.after(State(), window(latencies=[5.0] * 90 + [500.0] * 10)).rung == 1


@given(
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(2, 50)),
    st.builds(window, *[st.integers(0, 10**4)] * 3, st.lists(st.floats(0, 1e6), max_size=30)),
)
def test_requests_are_refused_on_the_last_rung_only(rung: int, limit: int | None, tick: Window) -> None:
    limit = limit if rung == len(RUNGS) - 1 else None
    after = CONTROLLER.after(State(rung=rung, limit=limit), tick)
    assert 0 <= after.rung < len(RUNGS)
    # And not before it was tried: who comes to the last rung with this tick refuses nobody yet.
    assert after.limit is None or (rung == after.rung == len(RUNGS) - 1 and after.limit >= 2)
    assert CONTROLLER.admits(after, 0)
    assert 1 <= CONTROLLER.retry_after(after, 0.999) <= 30
    assert after.rung - rung == after.steps_down - after.steps_up


def test_who_is_refused_is_told_to_come_back_later_the_more_are_refused() -> None:
    last = State(rung=4, limit=40)
    few, many = (CONTROLLER.after(last, window(100, refused, 10, [70.0] * 100)) for refused in (10, 1000))
    assert CONTROLLER.retry_after(few, 0.0) == CONTROLLER.retry_after(many, 0.0) == 1
    assert CONTROLLER.retry_after(few, 0.99) == 2
    assert CONTROLLER.retry_after(many, 0.99) == 11
