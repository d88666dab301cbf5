"""Models of many users at once against scikit-learn's, one user at a time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from mtl import glm
from mtl.losses import LOSSES

STRENGTHS = (0.3, 10.0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_user_has_the_model_that_scikit_learn_gives_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    n_users, n_inputs, n = 7, 12, 150
    z = np.column_stack([np.ones(n_inputs), random.normal(size=(n_inputs, 3))])
    user, place = random.integers(n_users - 1, size=n), random.integers(n_inputs, size=n)
    h = 0.4 + np.sum(random.normal(size=(n_users, 4))[user] * z[place], axis=1)
    label = {"squared": h, "logistic": random.random(n) < expit(h), "poisson": random.poisson(np.exp(h))}[name] * 1.0
    weight = random.uniform(0.5, 2, n)
    monkeypatch.setattr(glm, "_USERS_AT_ONCE", 3)
    w = glm.fit(user, place, label, weight, z, n_users, STRENGTHS, LOSSES[name], 0.0)
    for i, strength in enumerate(STRENGTHS):
        for u in range(n_users - 1):
            mine = user == u
            total = weight[mine].sum()
            alone = {
                "squared": Ridge(strength, fit_intercept=False),
                "logistic": LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, max_iter=10_000),
                "poisson": PoissonRegressor(alpha=strength / total, fit_intercept=False, tol=1e-10, max_iter=10_000),
            }[name]
            alone.fit(z[place[mine]], label[mine], sample_weight=weight[mine])
            np.testing.assert_allclose(w[i, u], alone.coef_.ravel(), atol=1e-4)
    assert not w[:, -1].any()  # without events: the offset alone


def test_an_offset_is_a_weight_that_nobody_pays_for() -> None:
    label, weight, z, nobody = np.array([1.0, 1.0, 0.0]), np.ones(3), np.zeros((1, 1)), np.zeros(3, int)
    assert glm.fit(nobody, nobody, label, weight, z, 1, (1.0,), LOSSES["logistic"], 0.7)[0, 0, 0] == 0
    one = np.ones((1, 1))
    w = glm.fit(nobody, nobody, label, weight, one, 1, (1e-9,), LOSSES["logistic"], 0.7)[0, 0, 0]
    assert w + 0.7 == pytest.approx(np.log(2), abs=1e-6)


def test_counts_of_thousands_do_not_overshoot() -> None:
    one, nobody = np.ones((1, 1)), np.zeros(2, int)
    w = glm.fit(nobody, nobody, np.array([5000.0, 7000.0]), np.ones(2), one, 1, (1e-6,), LOSSES["poisson"], -3.0)
    assert w[0, 0, 0] - 3 == pytest.approx(np.log(6000), abs=1e-6)
