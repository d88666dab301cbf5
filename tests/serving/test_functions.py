"""A model's functions as steps: all of them evaluated are the features of a new input, whatever the model is made of."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from sklearn.tree import DecisionTreeRegressor

from mtl.basis import OracleBasis
from mtl.config import load_settings
from mtl.encode import Encoder
from mtl.forms import Form, partly_given
from mtl.model import Artefact, Model
from mtl.prior import Locked, Prior
from mtl.regressors import Linear, Regressor, Stages
from mtl.serving.anytime import Population, order
from mtl.serving.executor import Lane, evaluate
from mtl.serving.functions import Plan, plan_of

K = 3


def attributes(n: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame({"size": random.normal(size=n), "age": random.exponential(size=n)})


FRAME = attributes(300)
ENCODER = Encoder.fit(FRAME, load_settings().encode)


def trees(seed: int, n: int = 4) -> Stages:
    random, z = np.random.default_rng(seed), ENCODER(FRAME)
    fits = [DecisionTreeRegressor(max_depth=4).fit(z, np.sin(z @ random.normal(size=z.shape[1]))) for _ in range(n)]
    return Stages(tuple((0.5, fit) for fit in fits))


def linear(seed: int) -> Linear:
    return Linear(np.random.default_rng(seed).normal(size=ENCODER.width), 0.3)


def model(form: Form, *functions: Regressor, locked: bool = False) -> Model:
    d = len(form.inputs.learnt)
    covariance = 0.1 * np.eye(d)
    if functions:
        prior = OracleBasis(lambda *_: linear(0), covariance, True, functions)
    else:
        random = np.random.default_rng(1)
        prior = Prior(np.eye(ENCODER.width), covariance, random.normal(size=(ENCODER.width, d)))  # type: ignore[assignment]
    inputs = partly_given(Locked(prior) if locked else prior, form.inputs)
    users = Prior(np.eye(1), np.eye(form.d), np.zeros((1, form.d)))
    artefact = Artefact(Encoder((), np.empty(0)), ENCODER, 0, 0, users, inputs)
    return Model(1, "live", form, "squared", 2.0, 1.0, -5.0, 5.0, 0, 0, artefact)


MODELS = {
    "linear": model(Form(K)),
    "linear, locked": model(Form(K), locked=True),
    "oracle": model(Form(K), linear(0), linear(1), trees(2, 1), trees(3)),
    "oracle and attributes": model(Form(K, (1, 2)), linear(0), trees(1), linear(2), trees(3)),
    "attributes": model(Form(K, (1,))),
}


def population(plan: Plan, of: Model) -> Population:
    return Population.fit(plan.values(of.encoded_inputs(FRAME)), of.artefact.inputs.covariance)


@pytest.mark.parametrize("name", MODELS)
def test_all_steps_give_the_features_of_a_new_input(name: str) -> None:
    of, rows = MODELS[name], attributes(7, 1)
    plan = plan_of(of)
    lanes = [Lane(f"{name} {step.name}", function) for step, function in zip(plan.steps, plan.functions, strict=True)]
    start = population(plan, of).of(7)
    places, left = order(plan.steps, [1.0] * len(lanes), start, np.random.default_rng(0).normal(size=of.d))
    assert left[-1] == pytest.approx(0.0, abs=1e-9 * left[0])
    found = evaluate(plan.steps, lanes, places, of.encoded_inputs(rows), time.monotonic() + 30)
    for lane in lanes:
        lane.close()
    reached = [place for place in places if plan.steps[place].reveals]
    where = [i for place in reached for i in plan.steps[place].reveals]
    known = start.given(where, np.column_stack([found[place] for place in reached]))
    expected = of.features_of_new(rows)
    for field, values in vars(known.features(of.mu)).items():
        np.testing.assert_allclose(values, getattr(expected, field), rtol=1e-9, atol=1e-9, err_msg=field)


def test_half_of_a_sum_says_what_the_whole_may_be() -> None:
    of = model(Form(0), trees(3, 10))
    plan = plan_of(of)
    assert [step.name for step in plan.steps] == ["f0 begun", "f0"]
    start = population(plan, of).of(1)
    _, left = order(plan.steps, [1.0] * 2, start, np.ones(1))
    assert left[0] == pytest.approx(start.covariance[0, 0])
    begun = start.given([1], np.zeros((1, 1))).covariance[0, 0]
    assert 0 < begun < 0.8 * left[0]
