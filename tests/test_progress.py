"""Progressive validation: events predicted from what was known before them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import log_loss, mean_poisson_deviance
from test_users import events, inputs, model_of

from mtl import gaussian, progress, schema
from mtl.arrow import lists, matrix
from mtl.blocks import index_of
from mtl.forms import Form, PartlyGiven
from mtl.prior import Prior
from mtl.progress import SEEN, Progress, cost, measure
from mtl.score import PREDICTION, STATE, STD, add_scores
from mtl.users import add_events


def with_states(states: pa.RecordBatch, table: pa.Table) -> pa.Table:
    kept = states.select([schema.USER_ID, schema.A, schema.B, schema.PRIOR_MEAN, schema.N_EVENTS])
    return pa.concat_tables([table, pa.Table.from_batches([kept])], promote_options="default")


@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson"])
def test_it_is_the_scorer_s_error_before_the_events_are_added(loss: str) -> None:
    model, shared = model_of(loss), inputs()
    whole = events(80)
    first, second = whole.slice(0, 50), whole.slice(50)
    known = add_events(first, model, shared, model.prior_mean_of_unknown)
    table = with_states(known, second)
    found = measure(table, model, shared)
    scored = add_scores(table.rename_columns([STATE.get(n, n) for n in table.column_names]), model, shared)
    label, std = scored[schema.LABEL].to_numpy(), scored[STD].to_numpy()
    prediction = np.clip(scored[PREDICTION].to_numpy(), *model.prediction_range)
    assert found.n.sum() == 30
    assert found.absolute.sum() == pytest.approx(np.abs(label - prediction).sum())
    assert found.standardized.sum() == pytest.approx((((label - prediction) / std) ** 2).sum())
    assert found.loss.sum() == pytest.approx(cost(loss, prediction, label).sum())
    # The bins are by what the user had before this table.
    before = dict(zip(known[schema.USER_ID].to_pylist(), known[schema.N_EVENTS].to_pylist(), strict=True))
    had = np.array([before.get(user, 0) for user in second[schema.USER_ID].to_pylist()])
    np.testing.assert_array_equal(found.n, np.histogram(had, [*SEEN, np.inf])[0])


@pytest.mark.parametrize("first", [True, False])
def test_a_state_has_its_own_prior_mean_wherever_its_user_s_attributes_come(first: bool) -> None:
    model, shared = model_of("squared"), inputs()
    whole = events(80)
    known = add_events(whole.slice(0, 50), model, shared, model.prior_mean_of_unknown)
    table = with_states(known, whole.slice(50))
    elsewhere = lists(np.full((len(known), model.d), 9.0))
    described = pa.table({schema.USER_ID: known[schema.USER_ID], schema.PRIOR_MEAN: elsewhere})
    both = pa.concat_tables([described, table] if first else [table, described], promote_options="default")
    np.testing.assert_array_equal(measure(both, model, shared).pack(), measure(table, model, shared).pack())


@pytest.mark.parametrize("user_columns", [(), (0,)])
def test_beside_it_are_the_average_user_and_a_ridge_about_zero(user_columns: tuple[int, ...]) -> None:
    model, shared = model_of("squared"), inputs()
    prior = replace(model.artefact.users, coefficients=np.array([[0.3, -0.2, 0.4]]))
    model = replace(model, artefact=replace(model.artefact, users=prior))
    if user_columns:  # the last weight is an attribute of the user, which no prior mean of zero takes away
        form = Form(model.d - 2, (), user_columns)
        learnt = Prior(np.eye(1), prior.covariance[:-1, :-1], prior.coefficients[:, :-1])
        artefact = replace(model.artefact, users=PartlyGiven(learnt, form.users))
        model = replace(model, form=form, artefact=artefact)
    whole = events(80)
    known = add_events(whole.slice(0, 50), model, shared, model.prior_mean_of_unknown)
    second = whole.slice(50)
    found = measure(with_states(known, second), model, shared)

    def loss(state: bool, mean: np.ndarray) -> float:
        """By the definition, a user and an event at a time."""
        total, states = 0.0, pa.Table.from_batches([known])
        for event in second.to_pylist():
            own = (
                states.filter(pc.equal(states[schema.USER_ID], event[schema.USER_ID])) if state else states.slice(0, 0)
            )
            a, b = np.zeros((1, gaussian.packed_length(model.d))), np.zeros((1, model.d))
            if len(own):
                a, b = matrix(own[schema.A], a.shape[1]), matrix(own[schema.B], model.d)
            w = model.user_posteriors(a, b, mean[None]).mean[0]
            x = index_of(pa.array([event[schema.INPUT_ID]]), shared.ids)[0]
            prediction = shared.features.offset[x] + w @ shared.features.phi[x]
            total += (np.clip(prediction, *model.prediction_range) - event[schema.LABEL]) ** 2
        return total

    average = model.prior_mean_of_unknown
    zero = average * (np.arange(model.d) >= model.d - len(user_columns))
    assert found.average.sum() == pytest.approx(loss(False, average))
    assert found.ridge.sum() == pytest.approx(loss(True, zero))
    assert found.loss.sum() == pytest.approx(loss(True, average))
    assert len({found.loss.sum(), found.average.sum(), found.ridge.sum()}) == 3


def test_a_certain_prediction_that_is_right_is_no_surprise() -> None:
    """σ(40) is clipped, and the deviation with it: else a right label would be thousands of deviations away."""
    model, shared = model_of("logistic"), inputs()
    certain = replace(shared, features=replace(shared.features, offset=np.full(8, 40.0)))
    table = events(20)
    table = table.set_column(table.column_names.index(schema.LABEL), schema.LABEL, pa.array(np.ones(20)))
    assert measure(table, model, certain).standardized.sum() < 1


def test_costs_are_the_library_s() -> None:
    random = np.random.default_rng(0)
    p, y = random.uniform(0.05, 0.95, 50), random.integers(0, 2, 50).astype(float)
    assert cost("logistic", p, y).mean() == pytest.approx(log_loss(y, p))
    counts = random.poisson(2.0, 50).astype(float)
    assert cost("poisson", p, counts).mean() == pytest.approx(mean_poisson_deviance(counts, p))


def test_a_large_partition_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AT_MOST", 7)
    found = measure(events(40), model_of("squared"), inputs())
    assert found.n.sum() == 7


def test_packing_is_undone_and_sums_add_up() -> None:
    one = measure(events(20), model_of("squared"), inputs())
    again = Progress.unpack(one.pack())
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(again, name))
    assert (one + again).n.sum() == 40
    assert Progress.nothing(4).n.sum() == 0
