"""Basis functions by an oracle: what the oracle is given, what comes of it, and what happens when it misbehaves."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import cloudpickle
import numpy as np
import pytest
from problems import certain, gaussians, planted

from mtl import alternation, gaussian
from mtl.alternation import InputSums
from mtl.basis import OracleBasis
from mtl.errors import OracleError
from mtl.gaussian import Array
from mtl.oracle.linear import fit_ridge
from mtl.prior import Moments

D, MEAN_LABEL, NOISE = 3, 0.6, 0.4


@dataclass(frozen=True)
class Fixed:
    """Predicts what it was made with, whatever it is asked."""

    values: object

    def predict(self, attributes: Array) -> object:
        return self.values


@dataclass(frozen=True)
class Linear:
    coefficients: Array

    def predict(self, attributes: Array) -> Array:
        return attributes @ self.coefficients


def least_squares(attributes: Array, target: Array, weight: Array) -> Linear:
    """An exact oracle: no other linear function has a smaller weighted error."""
    root = np.sqrt(weight)
    return Linear(np.linalg.lstsq(attributes * root[:, None], root * target, rcond=None)[0])


class Recorder:
    """An oracle that keeps what it is given and answers with fixed predictions, function by function."""

    def __init__(self, answers: Array):
        self.answers, self.given = answers, []

    def __call__(self, attributes: Array, target: Array, weight: Array) -> Fixed:
        self.given.append((attributes, target, weight))
        return Fixed(self.answers[:, len(self.given) - 1])


@pytest.fixture(scope="module")
def problem():
    return planted(3, users=15, inputs=8, events=200)


@pytest.fixture(scope="module")
def sums(problem) -> InputSums:
    block = problem.block()
    return alternation.input_sums(block.weight_matrix, block.label_matrix, gaussians(0, len(block), D))


@pytest.fixture(scope="module")
def evidence(sums: InputSums) -> tuple[Array, Array]:
    return alternation.input_evidence(sums, MEAN_LABEL)


def refit(basis: OracleBasis, evidence, attributes: Array) -> OracleBasis:
    return basis.refit(*evidence, attributes, NOISE)


# --- Without residuals: the paper's weighted dataset ------------------------------------------------------------------


def test_the_oracle_is_given_the_weighted_dataset_of_the_design_and_nothing_else(problem, sums, evidence) -> None:
    z = problem.input_attributes
    answers = np.random.default_rng(0).normal(size=(8, D))
    oracle = Recorder(answers)
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
        f[:, place] = answers[:, i] + (MEAN_LABEL if place == 0 else 0)
    np.testing.assert_array_equal(basis.mean(z), answers)


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


def test_cycles_of_an_exact_oracle_end_at_generalized_least_squares(problem, evidence) -> None:
    z, S = problem.input_attributes, full_covariance()
    basis = OracleBasis(least_squares, S, residual=True)
    values = [negative_log_evidence(evidence, basis.mean(z), S)]
    for cycle in range(200):
        basis = refit(basis, evidence, z)
        values.append(negative_log_evidence(evidence, basis.mean(z), S))
        # Refused at most where rounding is all that is left to gain.
        assert basis.refused == 0 or values[-2] - values[-1] < 1e-9, cycle
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


@pytest.mark.parametrize("residual", [True, False])
def test_a_fit_worse_than_what_is_there_is_refused_and_counted(problem, evidence, residual: bool) -> None:
    z = problem.input_attributes
    good = refit(OracleBasis.start(least_squares, D, 0.2, residual), evidence, z)

    def bad_second_function(attributes, target, weight):
        calls.append(target)
        return Fixed(np.full(8, 50.0)) if len(calls) == 2 else least_squares(attributes, target, weight)

    calls = []
    basis = OracleBasis(bad_second_function, good.covariance, residual, good.functions)
    after = refit(basis, evidence, z)
    assert (basis.refused, after.refused) == (0, 1)
    assert after.functions[1] is good.functions[1]
    assert after.functions[0] is not good.functions[0]
    assert np.abs(after.mean(z)).max() < 50


def test_the_first_fit_of_a_function_is_taken_as_it_is(problem, evidence) -> None:
    basis = OracleBasis.start(lambda *_: Fixed(np.full(8, 50.0)), D, 0.2, residual=True)
    assert refit(basis, evidence, problem.input_attributes).refused == 0


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
