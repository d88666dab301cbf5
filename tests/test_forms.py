"""Forms: given entries are certain, and each configuration equals an implementation of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, planted
from sklearn.linear_model import LogisticRegression, PoissonRegressor

from mtl import blocks, gaussian
from mtl.basis import OracleBasis
from mtl.engine import LocalEngine
from mtl.features import Features
from mtl.forms import Form, Given, PartlyGiven, partly_given
from mtl.losses import LOSSES
from mtl.oracle.linear import fit_ridge
from mtl.prior import Prior, VectorPrior
from mtl.train import Schedule
from mtl.working import settle
from mtl.zeros import WithZeros

FORMS = {
    "shared_basis": Form(2),
    "biases": Form(0),
    "multilevel": Form(0, (1, 2)),
    "glmix": Form(0, (1, 2), (1,)),
    "all": Form(1, (2,), (1, 2)),
}


def labels_for(problem: Problem, loss: str) -> Problem:
    """The planted labels as labels of the loss."""
    random = np.random.default_rng(0)
    h = problem.expected - problem.expected.mean()
    if loss == "logistic":
        label = (random.uniform(size=len(h)) < 1 / (1 + np.exp(-h))).astype(float)
        label[:2] = 0, 1
    elif loss == "poisson":
        label = random.poisson(np.exp(np.clip(h, -4, 3))).astype(float)
        label[0] = 1
    else:
        label = problem.label
    return Problem(**{**vars(problem), "label": label})


# --- The objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=14)
@given(seed=st.integers(0, 10_000), events=st.integers(8, 100), residual=st.booleans(), linear=st.booleans())
def test_the_objective_never_rises(form: Form, loss: str, seed: int, events: int, residual: bool, linear: bool) -> None:
    problem = labels_for(planted(seed, events=events), loss)
    fit = problem.train(form, Schedule(6), fit_ridge if linear else None, residual, loss=loss)
    assert np.isfinite(fit.objective).all()
    rises = np.diff(fit.objective)
    assert (rises <= 1e-9 * np.abs(fit.objective[:-1])).all(), rises.max()
    if loss != "poisson":  # exact steps and bounds need no damping
        assert fit.damped == 0


# --- Equal to others --------------------------------------------------------------------------------------------------


def test_per_user_and_per_input_effects_are_the_joint_ridge_solution() -> None:
    """GLMix: without learnt products the model is linear, and the alternation must end at the joint posterior mean."""
    problem = planted(3, users=6, inputs=5, events=60)
    form, noise, variance = Form(0, (1, 2), (1,)), 0.3, 0.5
    engine = problem.engine(form)
    user_prior = partly_given(Prior.start(np.eye(3), 3, variance), form.users)
    input_prior = partly_given(Prior.start(np.eye(3), 2, variance), form.inputs)
    for _ in range(300):
        engine.update_users(user_prior, noise)
        engine.update_inputs(input_prior, noise)

    z_u, z_x = problem.user_attributes[problem.user], problem.input_attributes[problem.input]
    of_user = np.eye(6)[problem.user][:, :, None] * np.column_stack([np.ones(60), z_x[:, 1:]])[:, None]
    of_input = np.eye(5)[problem.input][:, :, None] * np.column_stack([np.ones(60), z_u[:, 1]])[:, None]
    X = np.column_stack([of_user.reshape(60, -1), of_input.reshape(60, -1)])
    weighted = X * problem.weight[:, None] / noise
    solution = np.linalg.solve(
        X.T @ weighted + np.eye(X.shape[1]) / variance, weighted.T @ (problem.label - problem.mean_label)
    )
    np.testing.assert_allclose(engine.inputs.mean[:, [0, 3]], solution[18:].reshape(5, 2), atol=1e-7)
    np.testing.assert_allclose(engine.inputs.mean[:, 1:3], problem.input_attributes[:, 1:])


def test_one_random_effect_is_that_of_a_mixed_model() -> None:
    """statsmodels' MixedLM with a random intercept and slope: the same predictors under its variances and fixed effects."""
    mixed_lm = pytest.importorskip("statsmodels.regression.mixed_linear_model").MixedLM
    random = np.random.default_rng(1)
    n, users = 600, 30
    user, x = random.integers(users, size=n), random.normal(size=n)
    effects = random.multivariate_normal([0, 0], [[0.8, 0.2], [0.2, 0.4]], size=users)
    y = 2 - x + effects[user, 0] + effects[user, 1] * x + 0.5 * random.normal(size=n)
    z = np.column_stack([np.ones(n), x])
    theirs = mixed_lm(y, z, groups=user, exog_re=z).fit()
    features = Features(
        z @ theirs.fe_params, z, gaussian.outer(z), (z @ theirs.fe_params)[:, None] * z, offset_variance=np.zeros(n)
    )
    prior = Prior(np.eye(1), np.asarray(theirs.cov_re), np.zeros((1, 2)))
    block = blocks.build(_ids(user), np.arange(n), y, np.ones(n), _ids(np.arange(users)), np.ones((users, 1)))
    posteriors = partial(prior.posteriors, attributes=block.attributes, noise=theirs.scale)
    ours = posteriors(*settle(block.weight_matrix, block.label_matrix, features, posteriors, LOSSES["squared"]))
    wanted = pd.DataFrame({f"u{u}": effect.to_numpy() for u, effect in theirs.random_effects.items()}).T
    np.testing.assert_allclose(ours.mean, wanted.loc[block.users.to_pylist()].to_numpy(), atol=1e-6)


def test_multilevel_training_finds_the_variances_of_a_mixed_model() -> None:
    """From nothing, with inputs that never repeat; what differs is our weak ridge on the fixed effects."""
    mixed_lm = pytest.importorskip("statsmodels.regression.mixed_linear_model").MixedLM
    random = np.random.default_rng(2)
    n, users = 6000, 150
    user, x = random.integers(users, size=n), random.normal(size=n)
    effects = random.multivariate_normal([0, 0], [[0.8, 0.2], [0.2, 0.4]], size=users)
    y = 2 - x + effects[user, 0] + effects[user, 1] * x + 0.5 * random.normal(size=n)
    z = np.column_stack([np.ones(n), x])
    theirs = mixed_lm(y, z, groups=user, exog_re=z).fit(reml=False)
    problem = Problem(user, np.arange(n), y, np.ones(n), np.ones((users, 1)), z, y)
    form = Form(0, (1,))
    fit = problem.train(form, Schedule(60), fit_ridge, residual=False)
    assert fit.noise == pytest.approx(theirs.scale, rel=0.02)
    np.testing.assert_allclose(fit.users.covariance, theirs.cov_re, atol=0.03)


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_a_user_of_many_events_has_the_weights_of_a_generalized_linear_model(loss: str) -> None:
    random = np.random.default_rng(4)
    n, d = 4000, 3
    z = np.column_stack([np.ones(n), random.normal(size=(n, d - 1))])
    h = z @ [0.3, 0.8, -0.5]
    y = random.uniform(size=n) < 1 / (1 + np.exp(-h)) if loss == "logistic" else random.poisson(np.exp(h))
    features = Features(np.zeros(n), z, gaussian.outer(z), np.zeros((n, d)), np.zeros(n))
    prior = Prior(np.eye(1), np.eye(d), np.zeros((1, d)))
    block = blocks.build(
        _ids(np.zeros(n, int)), np.arange(n), y.astype(float), np.ones(n), _ids(np.zeros(1, int)), np.ones((1, 1))
    )
    posteriors = partial(prior.posteriors, attributes=block.attributes, noise=1.0)
    ours = posteriors(*settle(block.weight_matrix, block.label_matrix, features, posteriors, LOSSES[loss]))
    if loss == "logistic":
        theirs = LogisticRegression(C=1.0, fit_intercept=False).fit(z, y).coef_[0]
    else:
        theirs = PoissonRegressor(alpha=1 / n, fit_intercept=False, tol=1e-8).fit(z, y).coef_
    np.testing.assert_allclose(ours.mean[0], theirs, atol=5e-3)


# --- Given entries ----------------------------------------------------------------------------------------------------


def test_given_entries_come_back_certain_and_learnt_ones_as_if_they_were_known() -> None:
    random = np.random.default_rng(5)
    given, z = Given(3, (1,), (2,)), random.normal(size=(4, 3))
    prior = PartlyGiven(Prior(np.eye(3), np.diag([0.5, 2.0]), random.normal(size=(3, 2))), given)
    root = random.normal(size=(4, 3, 3))
    precision, information = root @ root.transpose(0, 2, 1), random.normal(size=(4, 3))
    found = prior.posteriors(gaussian.pack(precision), information, z, 0.7)
    np.testing.assert_allclose(found.mean[:, 1], z[:, 2])
    covariance = gaussian.unpack(found.covariance, 3)
    assert not covariance[:, 1].any()
    # By hand: condition the joint Gaussian with an all but certain middle entry.
    mean = np.insert(z @ prior.learnt.coefficients, 1, z[:, 2], axis=1)
    S_inverse = np.diag([2.0, 1e9, 0.5])
    full = precision / 0.7 + S_inverse
    np.testing.assert_allclose(
        found.mean, np.linalg.solve(full, (information / 0.7 + mean @ S_inverse)[..., None])[..., 0], atol=1e-6
    )
    np.testing.assert_allclose(covariance, np.linalg.inv(full), atol=1e-6)


@pytest.mark.parametrize("kind", ["learnt", "partly given", "with zeros", "oracle", "certain oracle"])
def test_means_alone_are_those_of_the_posteriors(kind: str) -> None:
    random = np.random.default_rng(6)
    n, d = 30, 4
    prior = Prior(np.eye(3), np.diag([0.5, 2.0, 0.7, 1.0]), random.normal(size=(3, d)))
    of: VectorPrior = {
        "learnt": lambda: prior,
        "partly given": lambda: PartlyGiven(
            Prior(np.eye(3), np.eye(3), prior.coefficients[:, 1:]), Given(d, (2,), (1,))
        ),
        "with zeros": lambda: WithZeros(prior, gaussian.pack(np.eye(d)), np.arange(4.0)),
        "oracle": lambda: replace(
            OracleBasis.start(fit_ridge, d, 0.3, residual=True), covariance=np.diag([0.5, 2, 1, 1])
        ),
        "certain oracle": lambda: OracleBasis.start(fit_ridge, d, 0.3, residual=False),
    }[kind]()
    root = random.normal(size=(n, d, d))
    evidence = (
        gaussian.pack(root @ root.transpose(0, 2, 1)),
        random.normal(size=(n, d)),
        random.normal(size=(n, d)),
        0.7,
    )
    np.testing.assert_allclose(of.conditional_mean(*evidence), of.conditional(*evidence).mean, atol=1e-12)


def test_an_oracle_is_fitted_on_what_given_entries_leave() -> None:
    """With φ = x given, the offset's weighted dataset is the one of y − w·x."""
    problem = planted(6, users=8, inputs=30, events=200)
    form = Form(0, (1, 2))
    engine = problem.engine(form)
    engine.update_users(problem.user_prior(form), 0.3)
    prior = problem.input_prior(form, fit_ridge, residual=False)
    refitted = engine.refit(prior, 0.3)
    assert isinstance(prior, PartlyGiven)
    assert isinstance(prior.learnt, OracleBasis)
    precision, information = engine._evidence(1.0)
    full = gaussian.unpack(precision, form.d)
    z = problem.input_attributes
    target = (information[:, 0] - np.einsum("nj,nj->n", full[:, 0, 1:], z[:, 1:])) / full[:, 0, 0]
    seen = full[:, 0, 0] > 0
    wanted = fit_ridge(z[seen], target[seen], full[seen, 0, 0] / 0.3)
    np.testing.assert_allclose(refitted.mean(z)[:, 0], wanted.predict(z), atol=1e-9)


def test_partitions_and_passes_do_not_change_what_a_loss_learns() -> None:
    problem = labels_for(planted(7, users=9, events=150), "logistic")
    one, three = (problem.engine(Form(2), partitions=n, loss="logistic") for n in (1, 3))
    fits = [problem.train(Form(2), Schedule(4), engine=engine, loss="logistic") for engine in (one, three)]
    np.testing.assert_allclose(fits[0].objective, fits[1].objective, rtol=1e-9)
    np.testing.assert_allclose(one.inputs.mean, three.inputs.mean, atol=1e-8)


def test_a_restored_engine_goes_the_same_way_again() -> None:
    problem = labels_for(planted(8), "poisson")
    engine: LocalEngine = problem.engine(2, loss="poisson")
    users, inputs = problem.user_prior(2), problem.input_prior(2)
    engine.update_users(users, 1.0)
    snapshot = engine.snapshot()
    went = [(engine.update_inputs(inputs, 1.0)[1], engine.update_users(users, 1.0)[1]) for _ in range(2)]
    engine.restore(snapshot)
    assert [(engine.update_inputs(inputs, 1.0)[1], engine.update_users(users, 1.0)[1]) for _ in range(2)] == went


def _ids(numbers: np.ndarray):
    return blocks.pa.array([f"u{i}" for i in numbers])
