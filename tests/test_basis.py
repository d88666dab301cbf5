"""Basis functions by an oracle: what the oracle is given, what comes of it, and what happens when it misbehaves."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import cloudpickle
import numpy as np
import pytest
from problems import certain, gaussians, planted

from mtl import alternation, gaussian
from mtl.alternation import Extended, InputSums
from mtl.basis import Boosting, OracleBasis, Refitting, fit_one, integrated_weights
from mtl.errors import OracleError
from mtl.gaussian import Array
from mtl.oracle.linear import NormalEquations, fit_ridge
from mtl.prior import Moments
from mtl.regressors import Linear

D, MEAN_LABEL, NOISE = 3, 0.6, 0.4


@dataclass(frozen=True)
class Fixed:
    """Predicts what it was made with, whatever it is asked."""

    values: object

    def predict(self, attributes: Array) -> object:
        return self.values


def least_squares(attributes: Array, target: Array, weight: Array) -> Linear:
    """An exact oracle: no other linear function has a smaller weighted error."""
    root = np.sqrt(weight)
    return Linear(np.linalg.lstsq(attributes * root[:, None], root * target, rcond=None)[0])


class Recorder:
    """An oracle that keeps what it is given and remembers every target as it is."""

    def __init__(self) -> None:
        self.given = []

    def __call__(self, attributes: Array, target: Array, weight: Array) -> Fixed:
        self.given.append((attributes, target, weight))
        return Fixed(target)


def at_once(oracle, attributes: Array, target: Array, weight: Array, which: list[int]) -> list:
    """What Spark tasks do, here."""
    return [fit_one(oracle, attributes, target[:, j], weight[:, j], i) for j, i in enumerate(which)]


@pytest.fixture(scope="module")
def problem():
    return planted(3, users=15, inputs=8, events=200)


@pytest.fixture(scope="module")
def sums(problem) -> InputSums:
    block = problem.block()
    return alternation.input_sums(block.weight_matrix, block.label_matrix, Extended.of(gaussians(0, len(block), D)))


@pytest.fixture(scope="module")
def evidence(sums: InputSums) -> tuple[Array, Array]:
    return alternation.input_evidence(sums, MEAN_LABEL)


def refit(basis: OracleBasis, evidence, attributes: Array) -> OracleBasis:
    return basis.refit(*evidence, attributes, NOISE)


# --- Without residuals: the paper's weighted dataset ------------------------------------------------------------------


def test_the_oracle_is_given_the_weighted_dataset_of_the_design_and_nothing_else(problem, sums, evidence) -> None:
    z = problem.input_attributes
    oracle = Recorder()
    basis = refit(OracleBasis.start(oracle, D, 0.2, residual=False), evidence, z)
    assert len(oracle.given) == D
    A = gaussian.unpack(sums.second, D + 1)
    # Over the extended vector [o, intercept, f_1, f_2]: f of the intercept is 1, o holds μ.
    f = np.insert(np.zeros((8, D)), 1, 1.0, axis=1)
    f[:, 0] = MEAN_LABEL
    for i, place in enumerate((0, 2, 3)):
        others = sum(A[:, place, m] * f[:, m] for m in range(D + 1) if m != place)
        target = (sums.first[:, place] - others) / A[:, place, place] - (MEAN_LABEL if place == 0 else 0)
        attributes, given, weight = oracle.given[i]
        np.testing.assert_array_equal(attributes, z)
        np.testing.assert_allclose(weight, A[:, place, place] / NOISE)
        np.testing.assert_allclose(given, target, rtol=1e-9)
        f[:, place] = given + (MEAN_LABEL if place == 0 else 0)
    np.testing.assert_allclose(basis.mean(z), np.column_stack([given for _, given, _ in oracle.given]), rtol=1e-12)


def test_without_residuals_inputs_are_what_the_oracle_says_and_certain(problem, evidence) -> None:
    z = problem.input_attributes
    basis = refit(OracleBasis.start(least_squares, D, 0.2, residual=False), evidence, z)
    inputs = basis.posteriors(*evidence, z, NOISE)
    np.testing.assert_array_equal(inputs.mean, basis.mean(z))
    np.testing.assert_array_equal(inputs.covariance, 0)
    moments = basis.moments(inputs, z)
    assert basis.divergence(moments) == 0
    assert basis.learn(moments) is basis


def test_inputs_of_which_no_event_tells_are_not_shown_to_the_oracle(problem, evidence) -> None:
    z = np.vstack([problem.input_attributes, np.full((2, 3), 9.0)])
    more = tuple(np.vstack([array, np.zeros((2, array.shape[1]))]) for array in evidence)
    shown = []

    def oracle(attributes, target, weight):
        shown.append(attributes)
        assert (weight > 0).all()
        return least_squares(attributes, target, weight)

    basis = refit(OracleBasis.start(oracle, D, 0.2, residual=True), more, z)
    assert all(len(attributes) == 8 for attributes in shown)
    assert basis.mean(z).shape == (10, D)


# --- With residuals: the joint fit ------------------------------------------------------------------------------------


def negative_log_evidence(evidence, g: Array, S: Array) -> float:
    """−log N(A⁻¹b; g, S + σ²A⁻¹) over the inputs, up to a constant: what the events say of g alone."""
    A, b = gaussian.unpack(evidence[0], D), evidence[1]
    gap = np.linalg.solve(A, b[..., None])[..., 0] - g
    spread = S + NOISE * np.linalg.inv(A)
    return float(np.einsum("ni,nij,nj->", gap, np.linalg.inv(spread), gap)) / 2


def full_covariance() -> Array:
    return np.array([[0.5, 0.2, -0.1], [0.2, 0.4, 0.1], [-0.1, 0.1, 0.3]])


@pytest.mark.parametrize("strategy", [Refitting(), Boosting(0.5)], ids=["refitted", "boosted"])
@pytest.mark.parametrize("fit_all", [None, at_once], ids=["in turn", "at once"])
def test_cycles_of_an_exact_oracle_end_at_generalized_least_squares(problem, evidence, fit_all, strategy) -> None:
    z, S = problem.input_attributes, full_covariance()
    basis = OracleBasis(least_squares, S, True, strategy=strategy, fit_all=fit_all)
    values = [negative_log_evidence(evidence, basis.mean(z), S)]
    for cycle in range(200):
        basis = refit(basis, evidence, z)
        values.append(negative_log_evidence(evidence, basis.mean(z), S))
        # Refused at most where the target was out of date, or rounding is all that is left to gain.
        assert fit_all or basis.refused == 0 or values[-2] - values[-1] < 1e-9, cycle
    assert np.diff(values).max() <= 1e-9
    # All functions at once: min over B of Σ (m − Bᵀz)ᵀ (S + σ²A⁻¹)⁻¹ (m − Bᵀz).
    A, b = gaussian.unpack(evidence[0], D), evidence[1]
    precision = np.linalg.inv(S + NOISE * np.linalg.inv(A))
    told = np.einsum("nij,nj->ni", precision, np.linalg.solve(A, b[..., None])[..., 0])
    normal = np.einsum("np,nq,nij->piqj", z, z, precision).reshape(3 * D, 3 * D)
    B = np.linalg.solve(normal, np.einsum("np,ni->pi", z, told).ravel()).reshape(3, D)
    np.testing.assert_allclose(basis.mean(z), z @ B, atol=1e-6)


def test_what_is_left_is_shrunk_towards_the_oracle(problem, evidence) -> None:
    z = problem.input_attributes
    basis = refit(OracleBasis(least_squares, full_covariance(), residual=True), evidence, z)
    # σ² huge: the events say nothing and the oracle everything; σ² tiny: the events everything.
    silent = basis.posteriors(*evidence, z, 1e12)
    np.testing.assert_allclose(silent.mean, basis.mean(z), atol=1e-6)
    loud = basis.posteriors(*evidence, z, 1e-9)
    A, b = gaussian.unpack(evidence[0], D), evidence[1]
    np.testing.assert_allclose(loud.mean, np.linalg.solve(A, b[..., None])[..., 0], atol=1e-6)


def test_the_learnt_residual_covariance_is_the_best_there_is(problem, evidence) -> None:
    z = problem.input_attributes
    basis = refit(OracleBasis.start(least_squares, D, 0.2, residual=True), evidence, z)
    moments = basis.moments(basis.posteriors(*evidence, z, NOISE), z)
    learnt = basis.learn(moments)
    best, random = learnt.divergence(moments), np.random.default_rng(0)
    assert best < basis.divergence(moments)
    for _ in range(20):
        stretch = np.eye(D) + 0.05 * random.normal(size=(D, D))
        other = OracleBasis(least_squares, stretch @ learnt.covariance @ stretch.T, True, basis.functions)
        assert other.divergence(moments) > best


def test_the_divergence_of_inputs_that_are_as_their_prior_is_0() -> None:
    S = full_covariance()
    basis = OracleBasis(least_squares, S, residual=True)
    vectors = certain(np.zeros((5, D)))._replace(
        covariance=np.tile(gaussian.pack(S), (5, 1)), log_determinant=np.full(5, np.linalg.slogdet(S)[1])
    )
    assert basis.divergence(Moments.of(vectors, np.empty((5, 0)))) == pytest.approx(0, abs=1e-12)


# --- Oracles that misbehave -------------------------------------------------------------------------------------------


class CannotPredict:
    def predict(self, attributes):
        raise RuntimeError("not fitted")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Fixed(np.full(8, np.nan)), "8 values that are not finite"),
        (Fixed(np.array([np.inf, *range(7)])), "1 values that are not finite"),
        (Fixed(np.zeros(7)), r"shape \(7,\) for 8 rows"),
        (Fixed(np.zeros((8, 1))), r"shape \(8, 1\)"),
        (Fixed(0.0), r"shape \(\)"),
        (Fixed(["a"] * 8), "cannot predict"),
        (CannotPredict(), "RuntimeError: not fitted"),
        (None, "no solver today"),
    ],
)
@pytest.mark.parametrize("i", range(D))
def test_an_oracle_that_fails_is_an_error_naming_its_function_and_the_reason(
    problem, evidence, answer, reason: str, i: int
) -> None:
    calls = []

    def oracle(attributes, target, weight):
        calls.append(target)
        if len(calls) <= i:
            return least_squares(attributes, target, weight)
        if answer is None:
            raise ValueError("no solver today")
        return answer

    with pytest.raises(OracleError, match=reason) as raised:
        refit(OracleBasis.start(oracle, D, 0.2, residual=True), evidence, problem.input_attributes)
    assert f"basis function {i}" in str(raised.value)


@pytest.fixture(scope="module")
def good(problem, evidence) -> OracleBasis:
    """What one round of exact fits gives; another round still gains."""
    return refit(OracleBasis.start(least_squares, D, 0.2, residual=True), evidence, problem.input_attributes)


def stretched(times: float, good: OracleBasis, which: int):
    """The exact oracle, but function ``which`` goes ``times`` as far from what it is as it should."""
    calls = []

    def oracle(attributes: Array, target: Array, weight: Array) -> Linear:
        calls.append(target)
        best = least_squares(attributes, target, weight)
        if len(calls) != which + 1:
            return best
        now = good.functions[which].coefficients
        return Linear(now + times * (best.coefficients - now))

    return oracle


@pytest.mark.parametrize("times", [1.8, 2.5, 40.0])
def test_a_fit_that_goes_too_far_is_damped_to_the_best_step_and_counted(problem, evidence, good, times: float) -> None:
    z = problem.input_attributes
    exact = refit(good, evidence, z)
    damped = refit(replace(good, oracle=stretched(times, good, 1)), evidence, z)
    assert damped.counts == {"damped_oracle_steps": 1, "refused_oracle_steps": 0}
    np.testing.assert_allclose(damped.mean(z), exact.mean(z), atol=1e-9)
    fresh = z.copy()  # evaluated, not remembered
    np.testing.assert_allclose(damped.mean(fresh), exact.mean(fresh), atol=1e-9)


def test_a_fit_that_gains_nearly_as_much_as_its_best_step_is_taken_whole(problem, evidence, good) -> None:
    z = problem.input_attributes
    oracle = stretched(1.5, good, 2)
    basis = refit(replace(good, oracle=oracle), evidence, z)
    assert set(basis.counts.values()) == {0}
    assert (basis.functions[2].coefficients != refit(good, evidence, z).functions[2].coefficients).all()


def test_a_fit_of_which_no_step_gains_is_refused_and_counted(problem, evidence, good) -> None:
    z = problem.input_attributes
    after = refit(replace(good, oracle=stretched(-1.0, good, 1)), evidence, z)
    assert after.counts == {"damped_oracle_steps": 0, "refused_oracle_steps": 1}
    assert after.functions[1] is good.functions[1]
    assert after.functions[0] is not good.functions[0]


def test_the_first_fit_is_measured_against_nothing_at_all(problem, evidence) -> None:
    z = problem.input_attributes
    basis = refit(OracleBasis.start(lambda *_: Fixed(np.full(8, 50.0)), D, 0.2, residual=True), evidence, z)
    assert basis.damped + basis.refused == D
    assert np.abs(basis.mean(z)).max() < 5


def collapsed_objective(basis: OracleBasis, evidence, z: Array) -> float:
    W, v = integrated_weights(*evidence, basis.covariance, NOISE)
    g = np.column_stack([f.predict(z) for f in basis.functions]) if basis.functions else np.zeros_like(v)
    return float(np.einsum("ni,nij,nj->", g, W, g) / 2 - np.sum(v * g))


def rises(problem, evidence, strategy, fit_all, residual: bool) -> float:
    """The largest rise of Q, relative to its size, in refits by oracles that are half right."""
    z, worst = problem.input_attributes, 0.0
    for seed in range(10):
        random = np.random.default_rng(seed)

        def oracle(attributes: Array, target: Array, weight: Array, random=random) -> Linear:
            return Linear(least_squares(attributes, target, weight).coefficients + random.normal(size=3))

        covariance = full_covariance() if residual else np.zeros((D, D))
        basis = OracleBasis(oracle, covariance, residual, strategy=strategy, fit_all=fit_all)
        values = [0.0]
        for _ in range(6):
            basis = refit(basis, evidence, z)
            values.append(collapsed_objective(basis, evidence, z))
        worst = max(worst, np.diff(values).max() / np.ptp(values))
    return worst


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("strategy", [Refitting(), Boosting(0.7)], ids=["refitted", "boosted"])
@pytest.mark.parametrize("fit_all", [None, at_once], ids=["in turn", "at once"])
def test_what_the_functions_are_fitted_to_never_rises(
    problem, evidence, monkeypatch: pytest.MonkeyPatch, strategy, fit_all, residual: bool
) -> None:
    assert rises(problem, evidence, strategy, fit_all, residual) < 1e-8
    monkeypatch.setattr("mtl.basis._step", lambda *_: 1.0)
    assert rises(problem, evidence, strategy, fit_all, residual) > 1e-3


def silenced(evidence: tuple[Array, Array], i: int) -> tuple[Array, Array]:
    """The evidence of users whose weight on function i is 0 for certain, as on a category that none is of."""
    A, b = gaussian.unpack(evidence[0], D), evidence[1].copy()
    A[:, i], A[:, :, i], b[:, i] = 0.0, 0.0, 0.0
    return gaussian.pack(A), b


@pytest.mark.parametrize("fit_all", [None, at_once], ids=["in turn", "at once"])
def test_a_function_of_which_no_event_tells_stays_and_the_others_are_as_without_it(problem, evidence, fit_all) -> None:
    z, told = problem.input_attributes, [0, 2]
    start = OracleBasis(least_squares, full_covariance(), True, fit_all=fit_all)
    found = refit(start, silenced(evidence, 1), z)
    assert not found.functions[1].coefficients.any()
    A = gaussian.pack(gaussian.unpack(silenced(evidence, 1)[0], D)[:, told][:, :, told])
    without = refit(replace(start, covariance=full_covariance()[np.ix_(told, told)]), (A, evidence[1][:, told]), z)
    np.testing.assert_allclose(found.mean(z)[:, told], without.mean(z), atol=1e-9)
    W, v = integrated_weights(*silenced(evidence, 1), full_covariance(), NOISE)
    by_sums = NormalEquations.of(W, v, z).solve(())
    by_rows = refit(replace(start, oracle=fit_ridge, fit_all=None), silenced(evidence, 1), z).functions
    for one, other in zip(by_sums, by_rows, strict=True):
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-9)


def test_events_that_say_nothing_at_all_are_refused(problem, evidence) -> None:
    nothing = tuple(np.zeros_like(array) for array in evidence)
    with pytest.raises(OracleError, match="no event says anything of any basis function"):
        refit(OracleBasis.start(least_squares, D, 0.2, residual=True), nothing, problem.input_attributes)
    W, v = integrated_weights(*nothing, full_covariance(), NOISE)
    with pytest.raises(OracleError, match="no event says anything of any basis function"):
        NormalEquations.of(W, v, problem.input_attributes).solve(())


# --- All functions at once --------------------------------------------------------------------------------------------


def test_functions_fitted_at_once_are_given_targets_of_the_same_functions(problem, evidence, good) -> None:
    z, oracle = problem.input_attributes, Recorder()
    W, v = integrated_weights(*evidence, good.covariance, NOISE)
    refit(replace(good, oracle=oracle, fit_all=at_once), evidence, z)
    for i, (_, target, weight) in enumerate(oracle.given):
        newton = (v - np.einsum("nij,nj->ni", W, good.mean(z)))[:, i] / W[:, i, i]
        np.testing.assert_allclose(target, good.mean(z)[:, i] + newton, rtol=1e-9)
        np.testing.assert_array_equal(weight, W[:, i, i])


def test_one_function_alone_is_fitted_here(problem, evidence) -> None:
    one = tuple(array[:, :1] for array in evidence)

    def elsewhere(*_):
        raise AssertionError

    basis = OracleBasis.start(least_squares, 1, 0.2, True, fit_all=elsewhere)
    assert len(refit(basis, one, problem.input_attributes).functions) == 1


# --- Boosting ---------------------------------------------------------------------------------------------------------


def test_a_boosted_function_moves_by_a_part_of_the_fitted_newton_step(problem, evidence, good) -> None:
    z, oracle = problem.input_attributes, Recorder()
    basis = refit(replace(good, oracle=oracle, strategy=Boosting(0.3)), evidence, z)
    W, v = integrated_weights(*evidence, good.covariance, NOISE)
    newton = (v - np.einsum("nij,nj->ni", W, good.mean(z)))[:, 0] / W[:, 0, 0]
    np.testing.assert_allclose(oracle.given[0][1], newton)
    np.testing.assert_allclose(basis.mean(z)[:, 0], good.mean(z)[:, 0] + 0.3 * newton)
    # Fixed predicts the target wherever it is asked, so the sum of stages can be evaluated at z alone.
    np.testing.assert_allclose(basis.functions[0].predict(z), basis.mean(z)[:, 0])


def test_boosted_lines_stay_lines(problem, evidence) -> None:
    basis = OracleBasis.start(fit_ridge, D, 0.2, True, Boosting(0.5))
    for _ in range(3):
        basis = refit(basis, evidence, problem.input_attributes)
    assert [type(f).__name__ for f in basis.functions] == D * ["Linear"]


def test_a_round_of_boosting_evaluates_its_new_stages_only(problem, evidence) -> None:
    z, calls = problem.input_attributes, []

    class Counted(Fixed):
        def predict(self, attributes: Array) -> object:
            calls.append(len(attributes))
            return self.values

    basis = OracleBasis.start(lambda _, target, __: Counted(target), D, 0.2, True, Boosting(0.3))
    for _ in range(4):
        basis = refit(basis, evidence, z)
        basis = basis.learn(basis.moments(basis.posteriors(*evidence, z, NOISE), z))
    assert calls == 4 * D * [8]
    assert [len(f.stages) for f in basis.functions] == D * [4]


# --- Storing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_stored_basis_predicts_the_same_without_its_oracle_or_training_rows(problem, evidence, module) -> None:
    lock = iter(())  # what an oracle may hold and no pickle takes
    z = np.repeat(problem.input_attributes, 1000, axis=0)
    many = tuple(np.repeat(array, 1000, axis=0) for array in evidence)

    def oracle(*dataset):
        return least_squares(*dataset) if lock else None

    basis = refit(OracleBasis.start(oracle, D, 0.2, residual=True), many, z)
    stored = module.dumps(basis)
    assert len(stored) < 4000
    back = module.loads(stored)
    assert back.oracle is None
    new = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(back.mean(new), basis.mean(new))
    np.testing.assert_array_equal(back.covariance, basis.covariance)
    assert basis.oracle is oracle


def test_no_inputs_have_no_predictions_whatever_the_regressor_thinks_of_it() -> None:
    class Refusing:
        def predict(self, attributes: Array) -> Array:
            raise ValueError("Found array with 0 sample(s)")

    basis = replace(OracleBasis.start(fit_ridge, 2, 0.2, residual=True), functions=(Refusing(), Refusing()))
    assert basis.mean(np.empty((0, 3))).shape == (0, 2)
