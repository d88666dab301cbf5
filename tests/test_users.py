"""Events added to users: batch after batch, in turns, and aged."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mtl import blocks, gaussian, schema
from mtl.arrow import matrix
from mtl.encode import Encoder
from mtl.errors import InputError
from mtl.features import Features
from mtl.forms import Form
from mtl.losses import LOSSES
from mtl.model import Artefact, Model
from mtl.prior import Prior
from mtl.schema import EVENT_TIME, INPUT_ID, LABEL, REFERENCE_TIME, USER_ID, WEIGHT
from mtl.users import TURN, SharedInputs, add_events

D = 3


def model_of(loss: str, half_life: float = 0.0) -> Model:
    prior, nothing = Prior(np.eye(1), np.eye(D), np.zeros((1, D))), Encoder((), np.empty(0))
    artefact = Artefact(nothing, nothing, 0, 0, prior, prior)
    return Model(1, schema.LIVE, Form(D - 1), loss, 0.2, 1.0, 0.0, 1.0, 0, 0, artefact, half_life)


def inputs() -> SharedInputs:
    random = np.random.default_rng(0)
    mean = random.normal(size=(8, D))
    covariance = np.tile(np.array([0.1, 0, 0, 0.1, 0, 0.1]), (8, 1))
    return SharedInputs(pa.array([f"x{i}" for i in range(8)]), Features.of(mean, covariance, 0.2))


def events(n: int, turn: np.ndarray | None = None) -> pa.Table:
    random = np.random.default_rng(1)
    empty = {name: pa.nulls(n, kind) for name, kind in _STATES.items()}
    columns = {
        USER_ID: [f"u{i}" for i in random.integers(3, size=n)],
        INPUT_ID: [f"x{i}" for i in random.integers(8, size=n)],
        LABEL: random.integers(0, 2, size=n).astype(float),
        WEIGHT: random.uniform(0.5, 2, size=n),
        EVENT_TIME: pa.array(random.integers(0, 100 * DAY, size=n), _TIME),
        **empty,
    }
    return pa.table(columns | ({TURN: turn} if turn is not None else {}))


DAY = 86_400_000_000  # µs
_TIME = pa.timestamp("us", tz="UTC")
_STATES = {
    REFERENCE_TIME: _TIME,
    schema.A: pa.list_(pa.float64()),
    schema.B: pa.list_(pa.float64()),
    schema.PRIOR_MEAN: pa.list_(pa.float64()),
    schema.N_EVENTS: pa.int64(),
}


@pytest.mark.parametrize("half_life", [0.0, 20.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_replay_in_turns_is_what_the_batches_gave_one_after_the_other(loss: str, half_life: float) -> None:
    turn = np.repeat([1, 2, 3], [30, 1, 29])  # the second has one user only
    model, shared, whole = model_of(loss, half_life), inputs(), events(60, turn)
    mean = model.prior_mean_of_unknown
    states = None
    for now in (1, 2, 3):
        batch = whole.filter(pa.array(turn == now)).drop_columns([TURN])
        table = batch if states is None else pa.concat_tables([batch, states], promote_options="default")
        after = pa.Table.from_batches([add_events(table, model, shared, mean)]).drop_columns([schema.W])
        states = (
            after
            if states is None
            else pa.concat_tables(
                [states.filter(pa.array(blocks.index_of(states[USER_ID], after[USER_ID].combine_chunks()) < 0)), after]
            )
        )
    replayed = pa.Table.from_batches([add_events(whole, model, shared, mean)]).sort_by(USER_ID)
    states = states.sort_by(USER_ID)
    for name, width in ((schema.A, 6), (schema.B, D)):
        np.testing.assert_allclose(matrix(replayed[name], width), matrix(states[name], width), rtol=1e-9, atol=1e-9)


def test_a_user_that_forgets_has_the_sums_of_a_loop_over_its_aged_events() -> None:
    model, shared, table = model_of("squared", 20.0), inputs(), events(60)
    found = add_events(table, model, shared, model.prior_mean_of_unknown)
    time, place = table[EVENT_TIME].cast(pa.int64()).to_numpy(), blocks.index_of(table[INPUT_ID], shared.ids)
    for i, user in enumerate(found[USER_ID].to_pylist()):
        mine = np.array(table[USER_ID].to_pylist()) == user
        a, b, last = np.zeros(6), np.zeros(D), time[mine].max()
        for t, x, c, y in zip(
            time[mine], place[mine], table[WEIGHT].to_numpy()[mine], table[LABEL].to_numpy()[mine], strict=True
        ):
            f = c * 0.5 ** ((last - t) / DAY / 20)
            a += f * shared.features.second_moment[x]
            b += f * (y * shared.features.phi[x] - shared.features.offset_phi[x])
        np.testing.assert_allclose(found[schema.A][i].values, a)
        np.testing.assert_allclose(found[schema.B][i].values, b, atol=1e-12)
        weights = np.linalg.solve(gaussian.unpack(a, D) + np.eye(D), b)  # prior N(0, I), noise 1
        np.testing.assert_allclose(found[schema.W][i].values, weights)
        assert found[REFERENCE_TIME][i].value == last
        assert found[schema.N_EVENTS][i].as_py() == mine.sum()


def test_an_event_without_a_time_cannot_age() -> None:
    table = events(5).set_column(4, EVENT_TIME, pa.nulls(5, _TIME))
    add_events(table, model_of("squared"), inputs(), np.zeros(D))
    with pytest.raises(InputError, match=r"an event of user u\d has no event_time, and model version 1 forgets"):
        add_events(table, model_of("squared", 20.0), inputs(), np.zeros(D))


def test_another_order_changes_little_and_squared_loss_nothing() -> None:
    shared = inputs()
    for loss, limit in (("squared", 1e-10), ("logistic", 0.1)):
        model = model_of(loss)
        w = [
            matrix(
                pa.Table.from_batches([add_events(events(60, turn), model, shared, np.zeros(D))]).sort_by(USER_ID)["w"],
                D,
            )
            for turn in (np.zeros(60, int), np.arange(60) % 4 + 1)
        ]
        assert np.abs(w[0] - w[1]).max() < limit
