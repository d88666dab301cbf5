"""Blocks of events against a loop over the events, and their way through Arrow."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import planted

from mtl import blocks
from mtl.blocks import EventBlock, build, from_arrow, index_of, to_arrow
from mtl.encode import Activity

ARRAYS = [name for name in blocks.ARROW_SCHEMA.names if name != "users"]

event = st.tuples(st.integers(0, 4), st.integers(0, 5), st.floats(-10, 10), st.floats(0.1, 10))


def block_of(events, described: dict[int, list[float]], p: int = 2) -> EventBlock:
    u, x, y, c = (np.array([e[i] for e in events]) for i in range(4))
    attributes = np.array([[1.0, *z] for z in described.values()]).reshape(-1, p)
    return build(
        pa.array([f"u{i}" for i in u], pa.string()),
        x.astype(np.int64),
        y.astype(float),
        c.astype(float),
        pa.array([f"u{i}" for i in described], pa.string()),
        attributes,
    )


@given(st.lists(event, max_size=30), st.dictionaries(st.integers(2, 6), st.tuples(st.floats(-3, 3))))
def test_a_block_holds_the_sums_of_every_user_and_input_and_the_attributes_of_every_user(events, described) -> None:
    block = block_of(events, described)
    weight, label, count = defaultdict(float), defaultdict(float), defaultdict(int)
    for u, x, y, c in events:
        weight[f"u{u}", x] += c
        label[f"u{u}", x] += c * y
        count[f"u{u}"] += 1
    users = block.users.to_pylist()
    assert sorted(users) == sorted({f"u{e[0]}" for e in events} | {f"u{u}" for u in described})
    assert block.inputs.tolist() == sorted({e[1] for e in events})
    assert dict(zip(users, block.n_events.tolist(), strict=True)) == {user: count[user] for user in users}
    for i, user in enumerate(users):
        assert block.attributes[i].tolist() == [1.0, *described.get(int(user[1:]), (0.0,))]
        for j, x in enumerate(block.inputs.tolist()):
            assert block.weight_matrix[i, j] == pytest.approx(weight.get((user, x), 0.0))
            assert block.label_matrix[i, j] == pytest.approx(label.get((user, x), 0.0), abs=1e-12)


def test_events_that_cancel_keep_their_weight() -> None:
    block = block_of([(0, 3, 2.0, 1.0), (0, 3, -2.0, 1.0), (0, 1, 0.0, 1.0)], {})
    np.testing.assert_array_equal(block.weight_matrix.toarray(), [[1, 2]])
    np.testing.assert_array_equal(block.label_matrix.toarray(), [[0, 0]])
    assert block.n_events.tolist() == [3]


def test_users_with_attributes_but_without_events_are_in_the_block() -> None:
    block = block_of([(0, 1, 2.0, 1.0)], {7: [0.5]})
    assert dict(zip(block.users.to_pylist(), block.n_events.tolist(), strict=True)) == {"u0": 1, "u7": 0}
    only = block_of([], {7: [0.5], 8: [0.25]})
    assert len(only) == 2
    assert only.weight_matrix.shape == (2, 0)


def test_ids_in_chunks_are_the_same_ids() -> None:
    whole = pa.array(["b", "a", "b"])
    args = (np.array([2, 0, 2]), np.ones(3), np.ones(3), pa.chunked_array([["a"], ["c"]]), np.ones((2, 1)))
    parts = build(pa.chunked_array([whole[:1], whole[1:]]), *args)
    assert parts.users.to_pylist() == build(whole, *args).users.to_pylist() == ["b", "a", "c"]


@pytest.mark.parametrize("events", [0, 1, 50])
def test_a_block_comes_back_from_arrow_as_it_was(events: int) -> None:
    block = planted(0, events=events).block() if events else block_of([], {1: [2.0]})
    back, again = from_arrow([to_arrow(block)] * 2)
    for name in ARRAYS:
        assert blocks.buffer(back, name) == blocks.buffer(block, name)
    assert back.users == again.users == block.users


def test_a_pass_may_leave_the_users_ids_behind() -> None:
    block = planted(0).block()
    (back,) = from_arrow([to_arrow(block).drop_columns(["users"])])
    assert back.users is None
    np.testing.assert_array_equal(back.weight_matrix.toarray(), block.weight_matrix.toarray())


def test_an_id_that_the_catalogue_lacks_has_the_place_minus_one() -> None:
    catalogue = pa.array(["a", "b", "c"])
    assert index_of(pa.array(["c", "z", None, "a"]), catalogue).tolist() == [2, -1, -1, 0]
    assert index_of(pa.chunked_array([["c"], ["z"]]), catalogue).tolist() == [2, -1]
    assert index_of(pa.array([], pa.string()), catalogue).tolist() == []
    assert index_of(pa.array(["a"]), pa.array([], pa.string())).tolist() == [-1]


def test_parts_of_a_block_are_the_block() -> None:
    block = planted(1, users=11).block()
    parts = list(block.parts(4))
    assert [len(range(11)[part]) for part in parts] == [4, 4, 3]
    for values, matrix in ((block.weights, block.weight_matrix), (block.labels, block.label_matrix)):
        np.testing.assert_array_equal(np.concatenate([values[block.entries(part)] for part in parts]), values)
        np.testing.assert_array_equal(np.concatenate([matrix[part].data for part in parts]), values)


def test_activity_is_the_standardized_log_count_and_0_without_events() -> None:
    counts = np.array([0, 1, 3, 7])
    logs = np.log([2, 4, 8])
    z = Activity.fit(logs.sum(), logs @ logs, 3)(counts)
    np.testing.assert_allclose(z, [0, -np.sqrt(1.5), 0, np.sqrt(1.5)], atol=1e-12)
    assert Activity.fit(0.0, 0.0, 0)(counts)[0] == 0
    assert np.isfinite(Activity.fit(np.log(2) * 5, np.log(2) ** 2 * 5, 5)(counts)).all()
