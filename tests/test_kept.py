"""Users' rows in memory against a dictionary of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mtl import gaussian
from mtl.arrow import lists
from mtl.decay import NEVER, timestamps
from mtl.kept import KeptUsers
from mtl.schema import N_EVENTS, PRIOR_MEAN, USER_ID
from mtl.users import WRITTEN, prior_mean_rows

D = 3


def rows_of(users: list[str], rng: np.random.Generator) -> pa.Table:
    n = len(users)
    vectors = (lists(rng.normal(size=(n, width))) for width in (gaussian.packed_length(D), D, D, D))
    counts, reference = rng.integers(1, 100, n), rng.integers(0, 10**15, n)
    reference[::3] = NEVER
    return pa.table([pa.array(users, pa.string()), *vectors, pa.array(counts), timestamps(reference)], list(WRITTEN))


def by_user(rows: pa.Table) -> dict[str, dict]:
    return {row[USER_ID]: row for row in rows.to_pylist()}


@pytest.mark.parametrize("seed", range(5))
def test_the_last_row_of_every_user_is_found_to_the_last_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"u{i}" for i in range(60)]
    some = rows_of(names[:20], rng)
    kept, expected = KeptUsers(some, D), by_user(some)
    for _ in range(12):
        now = rows_of(rng.choice(names, rng.integers(1, 30), replace=False).tolist(), rng)
        kept.put(now)
        expected |= by_user(now)
        asked = rng.choice([*names, "nobody"], 15).tolist()  # some of them twice
        found = kept.rows(pa.array(asked))
        assert found.num_rows == len(set(asked) & expected.keys())
        assert by_user(found) == {user: expected[user] for user in asked if user in expected}
        assert set(kept.without(pa.array(asked)).to_pylist()) == set(asked) - expected.keys()
    assert by_user(kept.rows()) == expected
    assert len(kept) == len(expected) == kept.rows().num_rows


def test_no_one_to_describe_is_nothing_to_encode() -> None:
    class Model:
        d = D

        def prior_mean_of_new(self, rows: object) -> None:
            raise ValueError("an empty frame")

    nobody = pa.table({USER_ID: pa.array([], pa.string()), "story": pa.array([], pa.string())})
    described = prior_mean_rows(nobody, Model())  # type: ignore[arg-type]
    assert (described.num_rows, described.column_names) == (0, [USER_ID, PRIOR_MEAN])


def test_no_users_at_all() -> None:
    rng = np.random.default_rng(0)
    kept = KeptUsers(rows_of([], rng), D)
    assert kept.rows().num_rows == kept.rows(pa.array(["u"])).num_rows == 0
    kept.put(rows_of(["u"], rng))
    assert kept.rows()[N_EVENTS].to_pylist() == kept.rows(pa.array(["u"]))[N_EVENTS].to_pylist() != []
