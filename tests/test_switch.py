"""Which version should be live, by what both predicted of the same events."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.config import SwitchSettings, load_settings
from mtl.switch import Validated, compare, has_drifted


def policy(**changes: object) -> SwitchSettings:
    return load_settings().switch.model_copy(update={"min_events": 10, "tolerance": 0.1, **changes})


def test_losses_are_compared_over_the_stretch_that_both_have_read_whole() -> None:
    candidate = [Validated((3, -1), 10, 5.0), Validated((5, -1), 20, 30.0), Validated((6, -1), 7, 7.0)]
    live = [Validated((2, -1), 50, 1.0), Validated((3, 4), 9, 9.0), Validated((5, -1), 31, 62.0)]
    # From commit 2, where the candidate began and the live version ended a batch, to commit 5, where both ended one.
    comparison = compare(candidate, (2, -1), live, (1, -1))
    assert (comparison.n, comparison.candidate, comparison.live) == (30, 35 / 30, 71 / 40)


def test_without_a_common_stretch_it_waits() -> None:
    comparison = compare([Validated((4, 1), 100, 1.0)], (2, -1), [Validated((4, 2), 100, 1.0)], (1, -1))
    assert comparison.n == 0
    assert math.isnan(comparison.live)
    assert comparison.verdict(policy()) == "wait"


@pytest.mark.parametrize(
    ("n", "candidate", "verdict"),
    [(9, 0.1, "wait"), (10, 1.09, "promote"), (10, 1.11, "refuse"), (10, math.nan, "refuse")],
)
def test_a_candidate_may_be_worse_by_the_tolerance_and_no_more(n: int, candidate: float, verdict: str) -> None:
    batch = [Validated((2, -1), n, n * candidate)]
    assert compare(batch, (1, -1), [Validated((2, -1), n, n * 1.0)], (1, -1)).verdict(policy()) == verdict


@given(ends=st.lists(st.tuples(st.integers(2, 9), st.integers(-1, 3)), min_size=1, unique=True), data=st.data())
def test_the_same_losses_in_other_batches_compare_as_equal(ends: list[tuple[int, int]], data: st.DataObject) -> None:
    """Two versions with one and the same loss on every event, their batches cut anywhere."""
    ends = sorted(ends)
    kept = [*sorted(data.draw(st.sets(st.sampled_from(ends)))), ends[-1]]
    costs = [1.0 + i for i in range(len(ends))]
    live = [Validated(end, 1, cost) for end, cost in zip(ends, costs, strict=True)]
    candidate, before = [], -1
    for end in dict.fromkeys(kept):
        i = ends.index(end)
        candidate.append(Validated(end, i - before, sum(costs[before + 1 : i + 1])))
        before = i
    comparison = compare(candidate, (1, -1), live, (1, -1))
    assert comparison.n == len(ends)
    assert comparison.candidate == pytest.approx(comparison.live)


def test_drift_is_surprise_beyond_the_limit_over_enough_events() -> None:
    assert has_drifted(1.6, 10, policy())
    assert not has_drifted(1.6, 9, policy())
    assert not has_drifted(1.4, 10, policy())
