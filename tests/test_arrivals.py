"""Inputs that came after training, learnt from their events as training would have."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from test_users import D, events, inputs, model_of

from mtl import arrivals, gaussian, schema
from mtl.features import feature_rows
from mtl.model import Model
from mtl.users import SharedInputs, add_events


def catalogue(model: Model, n_old: int = 5) -> tuple[pa.Table, SharedInputs]:
    """Features rows of 8 inputs of which the last came after training, and what is shared of them."""
    known = inputs()
    old, late = np.arange(n_old), np.arange(n_old, 8)
    as_it_came = model.features_about(known.features.vectors(model.mu).mean[late])
    parts = [(old, known.features.take(old), False), (late, as_it_came, True)]
    rows = pa.concat_tables(
        feature_rows(
            1, known.ids.take(pa.array(i)), of, np.zeros((len(i), D)), np.zeros((len(i), 0)), np.full(len(i), arrived)
        )
        for i, of, arrived in parts
    )
    return rows, arrivals.shared_inputs(rows, model)


def joint(model: Model, rows: pa.Table, table: pa.Table, x: str) -> np.ndarray:
    """E[c_x] by the normal equations written out, with users as they are before any event."""
    prior = model.artefact.inputs
    users = model.artefact.users
    d = model.d
    precision = np.linalg.inv(prior.covariance)
    i = rows[schema.INPUT_ID].to_pylist().index(x)
    mean = np.array(rows[schema.PHI][i].as_py())
    mean[0] = rows[schema.OFFSET][i].as_py() - model.mu
    information = precision @ mean
    w, V = model.prior_mean_of_unknown, users.covariance
    for event in table.to_pylist():
        if event[schema.INPUT_ID] != x:
            continue
        # h − μ = o + w_0 + Σ w_i f_i: the coefficients of c = (o, f) are (1, w_1 …), and w_0 goes to the label's side.
        coefficient = np.concatenate([[1.0], w[1:]])
        second = np.outer(coefficient, coefficient)
        second[1:, 1:] += V[1:, 1:]
        with_intercept = coefficient * w[0]
        with_intercept[1:] += V[1:, 0]
        c = event[schema.WEIGHT] / model.noise
        precision = precision + c * second
        information = information + c * ((event[schema.LABEL] - model.mu) * coefficient - with_intercept)
    assert d == len(information)
    return np.linalg.solve(precision, information)


def test_what_is_learnt_is_the_posterior_of_the_normal_equations() -> None:
    model = model_of("squared")
    rows, shared = catalogue(model)
    table = events(60)
    ids, found = arrivals.evidence(table, model, shared)
    assert sorted(ids.to_pylist()) == ["x5", "x6", "x7"]
    learnt = arrivals.learn(rows.filter(pc.is_in(rows[schema.INPUT_ID], ids)), found, model)
    for i, x in enumerate(learnt[schema.INPUT_ID].to_pylist()):
        expected = joint(model, rows, table, x)
        got = np.array(learnt[schema.PHI][i].as_py())
        got[0] = learnt[schema.OFFSET][i].as_py() - model.mu
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        assert learnt[schema.N_EVENTS][i].as_py() == table[schema.INPUT_ID].to_pylist().count(x)


@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson"])
def test_evidence_adds_up_and_users_sums_go_on_with_the_input_as_it_came(loss: str) -> None:
    model = model_of(loss)
    rows, shared = catalogue(model)
    table = events(60)
    ids, both = arrivals.evidence(table, model, shared)
    if loss == "squared":  # of users before either part
        parts = [arrivals.evidence(part, model, shared) for part in (table.slice(0, 25), table.slice(25))]
        total = {x: np.zeros(both.shape[1]) for x in ids.to_pylist()}
        for found, numbers in parts:
            for x, values in zip(found.to_pylist(), numbers, strict=True):
                total[x] += values
        np.testing.assert_allclose(both, [total[x] for x in ids.to_pylist()], rtol=1e-10)
    late = rows.filter(pc.is_in(rows[schema.INPUT_ID], ids))
    learnt = arrivals.learn(late, both, model)
    after = arrivals.renewed(shared, learnt, model)
    assert not np.allclose(after.current.offset, shared.current.offset)
    one, other = (add_events(table, model, x, model.prior_mean_of_unknown) for x in (shared, after))
    assert one.equals(other)
    stored = pa.concat_tables([rows.slice(0, 5), learnt])
    again = arrivals.shared_inputs(stored, model)
    np.testing.assert_allclose(again.features.second_moment, shared.features.second_moment, rtol=1e-12)
    np.testing.assert_allclose(again.current.phi, after.current.phi, rtol=1e-12)


def test_unlearning_gives_back_the_row_that_came() -> None:
    model = model_of("squared")
    rows, shared = catalogue(model)
    late = rows.filter(rows[schema.N_EVENTS].is_valid())
    ids, found = arrivals.evidence(events(60), model, shared)
    learnt = arrivals.learn(late.filter(pc.is_in(late[schema.INPUT_ID], ids)), found, model)
    back = arrivals.unlearnt(learnt, model)
    for name in (schema.PHI, schema.OFFSET, schema.SECOND_MOMENT, schema.RESIDUAL, schema.N_EVENTS, schema.A):
        got, expected = (np.concatenate([np.ravel(x) for x in of[name].to_pylist()]) for of in (back, late))
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_without_arrivals_there_is_no_evidence() -> None:
    model = model_of("squared")
    _, shared = catalogue(model, n_old=8)
    ids, numbers = arrivals.evidence(events(30), model, shared)
    assert (len(ids), numbers.shape) == (0, (0, gaussian.packed_length(D) + D + 1))


def test_counts_far_above_what_the_oracle_says_are_learnt_as_the_rate_they_are() -> None:
    """One Newton step from the oracle's rate of about 1 would end at a hundred thousand."""
    model = model_of("poisson")
    rows, shared = catalogue(model)
    table = events(60).set_column(2, schema.LABEL, pa.array(np.random.default_rng(2).poisson(20, 60).astype(float)))
    for _ in range(5):
        ids, found = arrivals.evidence(table, model, shared)
        mine = pc.is_in(rows[schema.INPUT_ID], ids)
        learnt = arrivals.learn(rows.filter(mine), found, model)
        rows = pa.concat_tables([rows.filter(pc.invert(mine)), learnt])
        shared = arrivals.shared_inputs(rows, model)
        rate = np.exp(learnt[schema.OFFSET].to_numpy() + learnt[schema.OFFSET_VARIANCE].to_numpy() / 2)
        assert (rate < 60).all()
    assert (rate > 5).all()


def test_an_input_that_is_forgotten_is_as_it_came() -> None:
    model = model_of("squared")
    rows, shared = catalogue(model)
    ids, found = arrivals.evidence(events(60), model, shared)
    late = rows.filter(pc.is_in(rows[schema.INPUT_ID], ids))
    forgotten = arrivals.unlearnt(arrivals.learn(late, found, model), model)
    for name in late.column_names:
        one, other = (np.array(of[name].to_pylist()) for of in (forgotten, late))
        np.testing.assert_allclose(one, other, atol=1e-12) if one.dtype.kind == "f" else np.testing.assert_array_equal(
            one, other
        )
