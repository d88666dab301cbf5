"""Oracles without Spark: the suite that every oracle passes, and what settings make of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from oracle_checks import OracleChecks, grid
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor

from mtl.basis import Oracle
from mtl.config import OracleSettings
from mtl.errors import ConfigError
from mtl.oracle import make_oracle
from mtl.oracle.linear import fit_ridge
from mtl.oracle.scikit import scikit_oracle
from mtl.prior import COEFFICIENT_PRECISION

ORACLES = {
    "ridge": fit_ridge,
    "sklearn Ridge": scikit_oracle(Ridge, {"alpha": 0.5}),
    "sklearn GradientBoosting": scikit_oracle(GradientBoostingRegressor, {"max_depth": 2, "random_state": 0}),
    "sklearn HistGradientBoosting": scikit_oracle(
        HistGradientBoostingRegressor, {"min_samples_leaf": 1, "max_iter": 60, "random_state": 0}
    ),
}


class TestOracles(OracleChecks):
    @pytest.fixture(params=ORACLES.values(), ids=ORACLES)
    def oracle(self, request: pytest.FixtureRequest) -> Oracle:
        return request.param


def settings(**changes) -> OracleSettings:
    return OracleSettings(**{"kind": "linear", "factory": "", "params": {}, "residual": True, "pipeline": ""} | changes)


# --- Ridge ------------------------------------------------------------------------------------------------------------


def test_ridge_is_that_of_scikit_learn_with_a_penalty_of_that_many_average_rows() -> None:
    z, target = grid(40)
    weight = np.random.default_rng(0).uniform(0.1, 3, 40)
    alpha = COEFFICIENT_PRECISION * weight.mean()
    expected = Ridge(alpha=alpha, fit_intercept=False).fit(z, target, sample_weight=weight)
    np.testing.assert_allclose(fit_ridge(z, target, weight).coefficients, expected.coef_, rtol=1e-8)


# --- scikit-learn -----------------------------------------------------------------------------------------------------


def test_an_estimator_of_scikit_learn_is_given_its_parameters_and_the_weights_scaled_to_mean_1() -> None:
    z, target = grid(40)
    weight = np.random.default_rng(0).uniform(1, 300, 40)
    function = scikit_oracle(Ridge, {"alpha": 7.0})(z, target, weight)
    expected = Ridge(alpha=7.0).fit(z, target, sample_weight=weight / weight.mean())
    np.testing.assert_allclose(function.predict(z), expected.predict(z))


def test_every_fit_is_of_an_estimator_of_its_own() -> None:
    oracle = scikit_oracle(LinearRegression, {})
    z, target = grid(20)
    first = oracle(z, target, np.ones(20))
    before = first.predict(z)
    oracle(z, -target, np.ones(20))
    np.testing.assert_array_equal(first.predict(z), before)


def test_an_estimator_that_takes_weights_among_other_keywords_is_taken() -> None:
    class Wrapped(Ridge):
        def fit(self, X, y, **kwargs):
            return super().fit(X, y, kwargs["sample_weight"])

    z, target = grid(20)
    assert scikit_oracle(Wrapped, {})(z, target, np.ones(20)).predict(z).shape == (20,)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_a_linear_basis_with_residuals_needs_no_oracle_for_it_is_solved_in_closed_form() -> None:
    assert make_oracle(settings()) is fit_ridge
    assert make_oracle(settings(kind="identity")) is None
    assert make_oracle(settings(residual=False)) is fit_ridge


def test_the_configured_estimator_is_made_and_fits() -> None:
    oracle = make_oracle(settings(kind="sklearn", factory="sklearn.linear_model:Ridge", params={"alpha": 2.0}))
    z, target = grid(20)
    np.testing.assert_allclose(
        oracle(z, target, np.ones(20)).predict(z), Ridge(alpha=2.0).fit(z, target, np.ones(20)).predict(z)
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "identity", "residual": False}, "needs oracle.residual = true"),
        ({"kind": "linear", "factory": "sklearn.linear_model:Ridge"}, "oracle.factory is for oracle.kind sklearn"),
        ({"kind": "sklearn"}, 'oracle.kind sklearn needs oracle.factory, such as "sklearn.linear_model:Ridge"'),
        ({"kind": "spark"}, "oracle.kind spark needs oracle.factory"),
        ({"kind": "sklearn", "factory": "sklearn.linear_model.Ridge"}, "write package.module:name"),
        ({"kind": "sklearn", "factory": "no_such_package:Ridge"}, "No module named 'no_such_package'"),
        ({"kind": "sklearn", "factory": "sklearn.linear_model:Rigde"}, "has no attribute 'Rigde'"),
        (
            {"kind": "sklearn", "factory": "sklearn.linear_model:Ridge", "params": {"alhpa": 1}},
            "oracle.params do not fit Ridge: .*alhpa",
        ),
        ({"kind": "sklearn", "factory": "sklearn.neighbors:KNeighborsRegressor"}, "takes no sample_weight"),
        ({"kind": "sklearn", "factory": "math:pi"}, "oracle.factory = 'math:pi' is no class"),
        ({"kind": "sklearn", "factory": "math:sqrt"}, "oracle.params do not fit sqrt"),
        ({"kind": "sklearn", "factory": "builtins:dict"}, "dict has no fit"),
    ],
)
def test_an_oracle_that_cannot_be_made_is_a_mistake_in_the_settings(changes: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        make_oracle(settings(**changes))
    assert "\n" not in str(raised.value)


def test_an_estimator_without_weights_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=re.escape("KNeighborsRegressor.fit takes no sample_weight")):
        scikit_oracle(KNeighborsRegressor, {})
