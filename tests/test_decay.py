"""Forgetting: what is left of events is a function of the times alone, whatever the batches and their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import planted

from mtl import decay
from mtl.losses import LOSSES
from mtl.train import Schedule, alternate

DAY = 86_400_000_000

USERS = 3
events = st.lists(
    st.tuples(st.integers(0, USERS - 1), st.integers(-20_000 * DAY, 80_000 * DAY), st.floats(-5, 5), st.integers(0, 4)),
    min_size=1,
    max_size=30,
)
half_lives = st.floats(0.1, 1e5)


def add(row: np.ndarray, time: np.ndarray, value: np.ndarray, state: tuple, half_life: float) -> tuple:
    reference, sums = state
    reference, of_sums, of_events = decay.age(row, time, reference, half_life)
    return reference, sums * of_sums + np.bincount(row, value * of_events, minlength=USERS)


def nothing() -> tuple:
    return np.full(USERS, decay.NEVER), np.zeros(USERS)


@given(events, half_lives)
def test_any_batches_in_any_order_give_what_a_loop_over_the_events_gives(drawn: list, half_life: float) -> None:
    row, time, value, batch = map(np.array, zip(*drawn, strict=True))
    state = nothing()
    for now in range(5):
        mine = batch == now
        state = add(row[mine], time[mine], value[mine], state, half_life)
    reference, sums = state
    for user in range(USERS):
        mine = [(t, v) for u, t, v, _ in drawn if u == user]
        if not mine:
            assert (reference[user], sums[user]) == (decay.NEVER, 0)
            continue
        last = max(t for t, _ in mine)
        assert reference[user] == last
        expected = sum(v * 2 ** (-((last - t) / DAY) / half_life) for t, v in mine)
        assert sums[user] == pytest.approx(expected, abs=1e-11)


def test_by_hand_a_day_of_a_two_day_half_life_and_an_event_that_comes_late() -> None:
    """Events on days 0, 2 and, in a second batch, 4 and −2: ages 4, 2, 0 and 6 days count ¼, ½, 1 and ⅛."""
    one = np.zeros(2, int)
    state = add(one, np.array([0, 2]) * DAY, np.array([8.0, 8.0]), nothing(), half_life=2)
    assert state[1][0] == 8 / 2 + 8
    reference, sums = add(one, np.array([4, -2]) * DAY, np.array([8.0, 8.0]), state, half_life=2)
    assert reference[0] == 4 * DAY
    assert sums[0] == 8 / 4 + 8 / 2 + 8 + 8 / 8


def test_only_late_events_leave_the_sums_as_they_are() -> None:
    before = np.array([DAY, decay.NEVER, 0])
    after, of_sums, of_events = decay.age(np.array([0]), np.array([0]), before, 1.0)
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(of_sums, 1)
    np.testing.assert_array_equal(of_events, [0.5])


def test_a_huge_half_life_forgets_nothing_and_years_of_a_short_one_all() -> None:
    row, time = np.array([0, 0]), np.array([0, 10_000 * DAY])
    for half_life, expected in ((1e15, 1.0), (1.0, 0.0)):
        _, _, of_events = decay.age(row, time, np.full(1, decay.NEVER), half_life)
        np.testing.assert_allclose(of_events, [expected, 1], atol=1e-9)


def test_the_noise_is_of_an_event_of_weight_1_where_events_count_what_is_left_of_them() -> None:
    """Aged events are of the same noise, and not of more: divided by their number it would come out four times too small."""
    problem = planted(1, users=40, inputs=20, k=1, events=4000, noise=0.5, weighted=False)
    left = 0.5 ** np.random.default_rng(0).uniform(0, 6, len(problem))
    aged = replace(problem, weight=left)
    found = {}
    for n in (left.sum(), len(problem)):
        priors, variance = (aged.user_prior(1), aged.input_prior(1)), aged.label_variance * left.sum() / n
        found[n] = alternate(aged.engine(1), *priors, LOSSES["squared"], n, variance, Schedule(30)).noise
    assert found[left.sum()] == pytest.approx(0.5**2, rel=0.2)
    assert found[len(problem)] < 0.1
