"""Implicit feedback from tables to tables: zeros of all pairs in every user's weights, and in no user's sums."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F
from streaming import PROBLEM, TRAINED, append, broken, rows, settings

from mtl import features, gaussian, schema
from mtl.arrow import matrix
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.layout import SCHEMAS
from mtl.model import Model
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, INPUTS, LABEL, USER_ATTRIBUTES, USER_ID, USERS, WEIGHT
from mtl.score import PREDICTION, score
from mtl.tables import Tables
from mtl.update import update

ZERO_WEIGHT = 0.1


def filled(tables: Tables) -> Tables:
    """Choices, all of label 1: u90 has made none, and x12 was never chosen."""
    tables.create(*SCHEMAS)
    random = np.random.default_rng(0)
    inputs = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(13)], "year": random.normal(size=13)})
    users = pd.DataFrame({USER_ID: [*(f"u{i}" for i in range(15)), "u90"], "age": random.normal(size=16)})
    tables.append(INPUTS, tables.spark.createDataFrame(inputs), evolve=True)
    tables.append(USER_ATTRIBUTES, tables.spark.createDataFrame(users), evolve=True)
    append(tables, rows(np.arange(TRAINED)).assign(**{LABEL: 1.0}))
    return tables


def zeros_of(tables: Tables, model: Model) -> tuple[Array, Array]:
    known = features.from_rows(tables.of_version(schema.FEATURES, model.version).toArrow(), model.d)
    return ZERO_WEIGHT * known.second_moment.sum(0), -ZERO_WEIGHT * known.offset_phi.sum(0)


def assert_users_have_their_sums_and_the_zeros(tables: Tables, model: Model, zeros: tuple[Array, Array]) -> None:
    found = tables.read(USERS).where(F.col(schema.MODEL_VERSION) == model.version).toArrow()
    d, noise, S = model.d, model.noise, np.linalg.inv(model.artefact.users.covariance)
    a, b, w, mean = (
        matrix(found[name], width)
        for name, width in (
            (schema.A, gaussian.packed_length(d)),
            (schema.B, d),
            (schema.W, d),
            (schema.PRIOR_MEAN, d),
        )
    )
    Lambda = S + gaussian.unpack(a + zeros[0], d) / noise
    eta = mean @ S + (b + zeros[1]) / noise
    np.testing.assert_allclose(w, np.linalg.solve(Lambda, eta[..., None])[..., 0], rtol=1e-8, atol=1e-9)


@pytest.mark.long
def test_users_and_stream_keep_plain_sums_and_weights_that_know_the_zeros(tables: Tables) -> None:
    filled(tables)
    report = retrain(tables, settings(f"model.implicit_weight={ZERO_WEIGHT}", "train.partitions=3"))
    assert np.diff(report["objective"]).max() <= 0
    model = load_model(tables)
    of_events = PROBLEM.weight[:TRAINED].sum()
    users, inputs = tables.read(USERS).count(), 13
    assert model.mu == pytest.approx(of_events / (of_events + ZERO_WEIGHT * users * inputs))
    assert (model.label_min, model.label_max) == (0, 1)

    zeros = zeros_of(tables, model)
    assert_users_have_their_sums_and_the_zeros(tables, model, zeros)
    nobody = tables.read(USERS).where(F.col(USER_ID) == "u90").first()
    assert not np.any(nobody[schema.A])
    assert not np.allclose(nobody[schema.W], nobody[schema.PRIOR_MEAN])

    # More choices of pairs known and new, of a new user, and of an input that came after training.
    later = rows(np.arange(TRAINED, 400)).assign(**{LABEL: 1.0})
    later.loc[::9, USER_ID] = "new"
    later.loc[::11, INPUT_ID] = "x99"
    tables.append(INPUTS, tables.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["x99"], "year": [0.3]})), evolve=True)
    append(tables, later)
    tally = update(tables, settings())
    assert tally["applied"] == len(later)
    assert_users_have_their_sums_and_the_zeros(tables, model, zeros)
    assert broken(tables) == []

    pairs = pd.DataFrame({USER_ID: ["new", "nobody"], INPUT_ID: ["x0", "x0"], WEIGHT: 1.0})
    scored = score(tables, model, tables.spark.createDataFrame(pairs)).toPandas()
    assert np.isfinite(scored[PREDICTION]).all()


@pytest.mark.long
def test_a_locked_users_prior_gets_the_zeros_of_its_new_features_once(tables: Tables) -> None:
    implicit = (f"model.implicit_weight={ZERO_WEIGHT}", "train.iterations=2")
    retrain(filled(tables), settings(*implicit))
    retrain(tables, settings(*implicit, 'train.lock=["users"]'))
    first, second = load_model(tables, 1), load_model(tables, 2)
    np.testing.assert_array_equal(second.artefact.users.covariance, first.artefact.users.covariance)
    assert_users_have_their_sums_and_the_zeros(tables, second, zeros_of(tables, second))


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (("model.loss=logistic",), 'model.implicit_weight is for model.loss = "squared", not logistic'),
        (("train.holdout=0.1",), r"model.implicit_weight: set train.holdout = 0"),
        (("train.max_events_per_user=5",), r"model.implicit_weight: set train.max_events_per_user = 0"),
        (("train.reduction=distributed",), r'model.implicit_weight works with train.reduction = "driver" only'),
    ],
)
def test_what_has_no_zeros_is_told(tables: Tables, assignments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        retrain(filled(tables), settings(f"model.implicit_weight={ZERO_WEIGHT}", *assignments))
