"""The half-steps against brute force, and the central identity: order, batches and partitions do not matter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import certain, definite, gaussians, planted
from scipy import sparse
from sklearn.linear_model import Ridge

from mtl import alternation, gaussian
from mtl.alternation import Extended
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.prior import Prior

# --- Brute force ------------------------------------------------------------------------------------------------------

USERS, INPUTS, D, MEAN_LABEL = 3, 4, 3, 0.8


def nodes(mean: Array, covariance: Array) -> list[tuple[float, Array]]:
    """Gauss–Hermite points of a Gaussian, three a dimension: E of any polynomial of degree 5 a dimension is exact."""
    root = np.linalg.cholesky(covariance)
    points = ((1 / 6, -np.sqrt(3)), (2 / 3, 0.0), (1 / 6, np.sqrt(3)))
    return [
        (float(np.prod([p for p, _ in choice])), mean + root @ [x for _, x in choice])
        for choice in product(points, repeat=len(mean))
    ]


def expectation(of, posterior: Posterior, i: int):
    """E[of(v)] over the i-th Gaussian."""
    covariance = gaussian.unpack(posterior.covariance, posterior.mean.shape[1])[i]
    return sum(p * of(v) for p, v in nodes(posterior.mean[i], covariance))


@pytest.fixture(scope="module")
def small():
    """Events as a list, with the same user and input more than once and one user without any; both sides' Gaussians."""
    random = np.random.default_rng(0)
    events = [(u, x, random.normal(), random.uniform(0.2, 3)) for u, x in ((0, 0), (0, 0), (0, 2), (1, 1), (1, 2))]
    return events, gaussians(1, USERS, D), gaussians(2, INPUTS, D)


def matrices(events, shape=(USERS, INPUTS)):
    """c and c·y as matrices (users, inputs)."""
    if not events:
        return sparse.csr_matrix(shape), sparse.csr_matrix(shape)
    u, x, y, c = map(np.array, zip(*events, strict=True))
    return (sparse.coo_matrix((value, (u, x)), shape=shape).tocsr() for value in (c, c * y))


def test_user_sums_are_the_expectations_over_every_event(small) -> None:
    events, _, inputs = small
    a, b = alternation.user_sums(*matrices(events), Features.of(inputs.mean, inputs.covariance, MEAN_LABEL))
    A, B = np.zeros((USERS, D, D)), np.zeros((USERS, D))
    for u, x, y, c in events:
        A[u] += c * expectation(lambda v: np.outer(phi(v), phi(v)), inputs, x)
        B[u] += c * expectation(lambda v, y=y: phi(v) * (y - MEAN_LABEL - v[0]), inputs, x)
    np.testing.assert_allclose(gaussian.unpack(a, D), A, atol=1e-12)
    np.testing.assert_allclose(b, B, atol=1e-12)


def test_input_sums_are_the_expectations_over_every_event(small) -> None:
    events, users, _ = small
    sums = alternation.input_sums(*matrices(events), Extended.of(users))
    A, B = np.zeros((INPUTS, D + 1, D + 1)), np.zeros((INPUTS, D + 1))
    for u, x, y, c in events:
        A[x] += c * expectation(lambda w: np.outer([1, *w], [1, *w]), users, u)
        B[x] += c * expectation(lambda w, y=y: y * np.array([1, *w]), users, u)
    np.testing.assert_allclose(gaussian.unpack(sums.second, D + 1), A, atol=1e-12)
    np.testing.assert_allclose(sums.first, B, atol=1e-12)


def test_the_evidence_of_an_input_is_a_regression_of_what_its_users_leave_over(small) -> None:
    events, users, _ = small
    precision, information = alternation.input_evidence(
        alternation.input_sums(*matrices(events), Extended.of(users)), MEAN_LABEL
    )
    A, B = np.zeros((INPUTS, D, D)), np.zeros((INPUTS, D))
    for u, x, y, c in events:
        A[x] += c * expectation(lambda w: np.outer(phi(w), phi(w)), users, u)
        B[x] += c * expectation(lambda w, y=y: phi(w) * (y - MEAN_LABEL - w[0]), users, u)
    np.testing.assert_allclose(gaussian.unpack(precision, D), A, atol=1e-12)
    np.testing.assert_allclose(information, B, atol=1e-12)


def test_the_squared_error_is_the_expectation_over_both_sides(small) -> None:
    events, users, inputs = small
    exact = 0.0
    for u, x, y, c in events:
        exact += c * expectation(
            lambda w, x=x, y=y: expectation(lambda v: (y - MEAN_LABEL - v[0] - w @ phi(v)) ** 2, inputs, x), users, u
        )
    sums = alternation.input_sums(*matrices(events), Extended.of(users))
    labels = sum(c * y**2 for _, _, y, c in events)
    assert alternation.squared_error(sums, inputs, MEAN_LABEL) + labels == pytest.approx(exact, rel=1e-10)


def phi(vector: Array) -> Array:
    """[offset or intercept, factors] → what the other side's vector is multiplied with, [1, factors]."""
    return np.array([1.0, *vector[1:]])


# --- The central identity ---------------------------------------------------------------------------------------------

event = st.tuples(st.integers(0, 2), st.integers(0, 3), st.floats(-5, 5), st.floats(0.01, 100))
histories = st.lists(event, min_size=1, max_size=40)


def prior_of(d: int, seed: int) -> Prior:
    """A prior with a full covariance and a mean that is not 0."""
    return Prior(np.ones((1, 1)), definite(seed, 1, d)[0], np.random.default_rng(seed).normal(size=(1, d)))


def at_once(events, features: Features, prior: Prior, noise: float) -> Posterior:
    return prior.posteriors(*alternation.user_sums(*matrices(events), features), np.ones((USERS, 1)), noise)


def one_by_one(events, features: Features, prior: Prior, noise: float) -> tuple[Array, Array]:
    """Sherman–Morrison: w and Λ⁻¹ of every user after its events, one rank-one update an event, no inverse ever."""
    w = np.tile(prior.coefficients[0], (USERS, 1))
    P = np.tile(prior.covariance, (USERS, 1, 1))
    for u, x, y, c in events:
        phi = features.phi[x]
        gain = P[u] @ phi / (noise / c + phi @ P[u] @ phi)
        w[u] += gain * (y - features.offset[x] - phi @ w[u])
        P[u] -= np.outer(gain, phi @ P[u])
    return w, P


def features_of(d: int, seed: int, exact: bool) -> Features:
    inputs = gaussians(seed, INPUTS, d)
    inputs = certain(inputs.mean) if exact else inputs
    return Features.of(inputs.mean, inputs.covariance, MEAN_LABEL)


def assert_same(left: Posterior, mean: Array, covariance: Array) -> None:
    d = mean.shape[1]
    np.testing.assert_allclose(left.mean, mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(gaussian.unpack(left.covariance, d), covariance, rtol=1e-8, atol=1e-8)


@given(histories, st.integers(1, 6), st.integers(0, 100), st.floats(0.05, 5), st.randoms(use_true_random=False))
def test_one_event_at_a_time_in_any_order_gives_what_the_whole_history_at_once_gives(
    events, d, seed, noise, random
) -> None:
    features, prior = features_of(d, seed, exact=True), prior_of(d, seed)
    whole = at_once(events, features, prior, noise)
    random.shuffle(events)
    assert_same(whole, *one_by_one(events, features, prior, noise))


@given(histories, st.integers(1, 6), st.integers(0, 100), st.floats(0.05, 5), st.booleans(), st.data())
def test_micro_batches_in_any_order_and_partition_give_what_the_whole_history_at_once_gives(
    events, d, seed, noise, exact, data
) -> None:
    features, prior = features_of(d, seed, exact), prior_of(d, seed)
    whole = at_once(events, features, prior, noise)
    batch_of = data.draw(st.lists(st.integers(0, 3), min_size=len(events), max_size=len(events)))
    a, b = np.zeros((USERS, gaussian.packed_length(d))), np.zeros((USERS, d))
    for batch in data.draw(st.permutations(range(4))):
        chosen = [e for e, mine in zip(events, batch_of, strict=True) if mine == batch]
        if chosen:
            more = alternation.user_sums(*matrices(chosen), features)
            a, b = a + more[0], b + more[1]
    batches = prior.posteriors(a, b, np.ones((USERS, 1)), noise)
    assert_same(batches, whole.mean, gaussian.unpack(whole.covariance, d))


@given(histories, st.integers(1, 6), st.integers(0, 100), st.floats(0.05, 5), st.booleans(), st.data())
def test_removing_an_event_leaves_what_never_having_seen_it_gives(events, d, seed, noise, exact, data) -> None:
    features, prior = features_of(d, seed, exact), prior_of(d, seed)
    gone = data.draw(st.integers(0, len(events) - 1))
    (a, b), (less_a, less_b) = (
        alternation.user_sums(*matrices(some), features) for some in (events, events[gone : gone + 1])
    )
    left = prior.posteriors(a - less_a, b - less_b, np.ones((USERS, 1)), noise)
    never = at_once(events[:gone] + events[gone + 1 :], features, prior, noise)
    assert_same(left, never.mean, gaussian.unpack(never.covariance, d))


@given(histories, st.integers(1, 6), st.integers(0, 100), st.floats(0.05, 5), st.floats(0.05, 5))
def test_a_user_with_certain_features_is_the_weighted_ridge_regression_of_its_events(
    events, d, seed, noise, variance
) -> None:
    features = features_of(d, seed, exact=True)
    users = at_once(events, features, Prior.start(np.ones((1, 1)), d, variance), noise)
    for u in range(USERS):
        mine = [e for e in events if e[0] == u]
        expected = np.zeros(d)
        if mine:
            _, x, y, c = map(np.array, zip(*mine, strict=True))
            ridge = Ridge(alpha=noise / variance, fit_intercept=False, solver="svd")
            expected = ridge.fit(features.phi[x], y - features.offset[x], sample_weight=c).coef_
        np.testing.assert_allclose(users.mean[u], expected, rtol=1e-7, atol=1e-7)


def test_an_uncertain_input_tells_less_of_a_user_than_a_certain_one() -> None:
    event = [(0, 0, 4.0, 1.0)]
    prior = Prior.start(np.ones((1, 1)), 2, 1.0)
    mean, spread = np.array([[0.0, 2.0]] * INPUTS), np.tile([0.0, 0.0, 1.5], (INPUTS, 1))
    certainly = at_once(event, Features.of(mean, 0 * spread, 0.0), prior, 1.0)
    perhaps = at_once(event, Features.of(mean, spread, 0.0), prior, 1.0)
    # Λ = I + [[1, 2], [2, 4 + V]], η = [4, 8].
    np.testing.assert_allclose(certainly.mean[0], np.linalg.solve([[2, 2], [2, 5]], [4, 8]))
    np.testing.assert_allclose(perhaps.mean[0], np.linalg.solve([[2, 2], [2, 6.5]], [4, 8]))
    assert abs(perhaps.mean[0, 1]) < abs(certainly.mean[0, 1])


@pytest.mark.parametrize("cache_bytes", [0, 8 * 10 * 3, 1 << 20])
def test_products_by_columns_are_the_whole_products(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(alternation, "_FEWEST_COLUMNS", 2)
    problem = planted(3)
    block, features = problem.block(), problem.engine(3).features
    a, _ = alternation.user_sums(block.weight_matrix, block.label_matrix, features.take(block.inputs))
    np.testing.assert_allclose(a, block.weight_matrix.toarray() @ features.second_moment[block.inputs], atol=1e-12)
    users = gaussians(1, len(block), 4)
    said = alternation.input_sums(block.weight_matrix, block.label_matrix, Extended.of(users))
    mean = np.column_stack([np.ones(len(block)), users.mean])
    second = gaussian.outer(mean)
    second[:, 5:] += users.covariance
    np.testing.assert_allclose(said.second, block.weight_matrix.toarray().T @ second, atol=1e-12)
