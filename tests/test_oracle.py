"""Oracles without Spark: the suite that every oracle passes, and what settings make of them."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
from oracle_checks import OracleChecks, grid
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor

from mtl.basis import Boosting, Refitting
from mtl.config import OracleSettings, load_settings
from mtl.errors import ConfigError
from mtl.oracle import make_fit_all, make_oracle, make_strategy
from mtl.oracle.boosters import booster_oracle
from mtl.oracle.linear import fit_ridge
from mtl.oracle.parallel import fit_to_row
from mtl.oracle.scikit import scikit_oracle
from mtl.prior import COEFFICIENT_PRECISION
from mtl.regressors import Oracle


def booster(kind: str) -> Oracle | None:
    return booster_oracle(kind, {}) if find_spec(kind) else None


ORACLES = {
    "ridge": fit_ridge,
    "sklearn Ridge": scikit_oracle(Ridge, {"alpha": 0.5}),
    "sklearn GradientBoosting": scikit_oracle(GradientBoostingRegressor, {"max_depth": 2, "random_state": 0}),
    "sklearn HistGradientBoosting": scikit_oracle(
        HistGradientBoostingRegressor, {"min_samples_leaf": 1, "max_iter": 60, "random_state": 0}
    ),
    "xgboost": booster("xgboost"),
    "lightgbm": booster("lightgbm"),
}


class TestOracles(OracleChecks):
    @pytest.fixture(params=ORACLES.values(), ids=ORACLES)
    def oracle(self, request: pytest.FixtureRequest) -> Oracle:
        return request.param or pytest.skip("not installed")


def settings(**changes) -> OracleSettings:
    defaults = load_settings().oracle.model_dump()
    return OracleSettings(**defaults | {"residual": True} | changes)


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


# --- XGBoost and LightGBM ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["xgboost", "lightgbm"])
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


def test_a_booster_says_nothing_and_uses_one_thread(kind: str, capfd: pytest.CaptureFixture) -> None:
    z, target = grid(60)
    function = make_oracle(settings(kind=kind))(z, target, np.ones(60))
    function.predict(z)
    assert capfd.readouterr() == ("", "")
    assert function.get_params()["n_jobs"] == 1


def test_a_boosters_parameters_are_the_users(kind: str) -> None:
    z, target = grid(60)
    params = {"n_estimators": 3, "max_depth": 1, "n_jobs": 2}
    function = make_oracle(settings(kind=kind, params=params))(z, target, np.ones(60))
    assert params.items() <= function.get_params().items()


@pytest.mark.parametrize(("name", "value"), [("alhpa", 1), ("max_depth", "deep")])
def test_a_booster_does_not_pass_over_a_mistake_in_its_parameters(kind: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"oracle.params do not fit .*Regressor: .*{name}") as raised:
        make_oracle(settings(kind=kind, params={name: value}))
    assert "\n" not in str(raised.value)


def test_a_booster_that_is_not_installed_is_one_line_on_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("xgboost", "lightgbm"):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(ConfigError, match=re.escape(f"pip install 'oracle-mtl[{kind}]'")):
            make_oracle(settings(kind=kind))


# --- How functions are fitted -----------------------------------------------------------------------------------------


def test_a_task_that_fits_a_function_says_what_went_wrong_instead_of_failing() -> None:
    z, target = grid(20)

    def broken(*_):
        raise ValueError("no solver today")

    class Unstorable(Ridge):
        def __reduce_ex__(self, protocol):
            raise TypeError("it holds a lock")

    row = fit_to_row(scikit_oracle(Ridge, {}), z, target, np.ones(20), 1)
    expected = Ridge().fit(z, target).predict(z)
    np.testing.assert_allclose(np.frombuffer(row["predictions"]), expected)
    np.testing.assert_allclose(cloudpickle.loads(row["fitted"]).predict(z), expected)
    for oracle, reason in ((broken, "ValueError: no solver today"), (scikit_oracle(Unstorable, {}), "it holds a lock")):
        row = fit_to_row(oracle, z, target, np.ones(20), 1)
        assert reason in row["problem"]
        assert "basis function 1" in row["problem"]


def session(cores: int) -> SimpleNamespace:
    return SimpleNamespace(sparkContext=SimpleNamespace(defaultParallelism=cores))


@pytest.mark.parametrize(
    ("kind", "parallel", "expected"),
    [
        ("sklearn", "auto", True),
        ("xgboost", "auto", True),
        ("linear", "auto", False),
        ("linear", True, True),
        ("sklearn", False, False),
        ("spark", "auto", False),
        ("identity", False, False),
    ],
)
def test_black_boxes_are_fitted_at_once_unless_told_otherwise(kind: str, parallel: object, expected: bool) -> None:
    assert bool(make_fit_all(settings(kind=kind, parallel=parallel), session(cores=4))) == expected
    assert bool(make_fit_all(settings(kind=kind, parallel=parallel), session(cores=2))) == (parallel is True)


@pytest.mark.parametrize("kind", ["identity", "spark"])
def test_what_is_not_fitted_on_one_machine_cannot_be_fitted_at_once(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"oracle.parallel is for oracles fitted on one machine, not .* {kind}"):
        make_fit_all(settings(kind=kind, parallel=True), spark=None)


def test_boosting_needs_an_oracle() -> None:
    assert make_strategy("oracle", settings()) == Refitting()
    assert make_strategy("boosted", settings(shrinkage=0.2)) == Boosting(0.2)
    with pytest.raises(ConfigError, match="identity has none"):
        make_strategy("boosted", settings(kind="identity"))


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
