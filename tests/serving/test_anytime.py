"""Features by a deadline: conditioning, what an evaluation is worth, and intervals that hold whatever was reached."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl import gaussian
from mtl.serving.anytime import Belief, Population, Step, order
from mtl.working import belief as belief_of_h

WITHIN = NormalDist().inv_cdf(0.95)  # standard deviations either side that hold 90%


def population(seed: int, d: int, stages: int = 0) -> Population:
    """Correlated functions of unequal size, and stages that say part of a function each."""
    random, m = np.random.default_rng(seed), d + stages
    root = random.normal(size=(m, m)) * np.exp(random.normal(size=m))[:, None] / m**0.5
    return Population(random.normal(size=m), root @ root.T, 0.05 * np.eye(d))


def singles(d: int) -> list[Step]:
    return [Step(f"f{i}", (i,)) for i in range(d)]


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 3), st.data())
def test_one_value_at_a_time_is_the_textbook_s_formula(seed: int, d: int, stages: int, data: st.DataObject) -> None:
    of = population(seed, d, stages)
    places = data.draw(st.permutations(range(d + stages)))[: data.draw(st.integers(0, d + stages))]
    values = np.random.default_rng(seed).normal(size=(3, len(places)))
    found = of.of(3).given(places, values)
    C, m = of.covariance, of.mean
    gain = np.linalg.solve(C[np.ix_(places, places)], C[places]).T
    scale = np.sqrt(np.outer(np.diag(C), np.diag(C)))
    np.testing.assert_allclose(found.covariance / scale, (C - gain @ C[places]) / scale, atol=1e-6)
    expected = m + (values - m[places]) @ gain.T
    np.testing.assert_allclose(found.mean, expected, atol=1e-5 * (1 + np.abs(expected).max()))


def test_all_evaluated_are_the_features_of_a_new_input() -> None:
    of, values = population(0, 4), np.random.default_rng(1).normal(size=(5, 4))
    features = of.of(5).given(range(4), values).features(2.0)
    np.testing.assert_array_equal(features.offset, 2.0 + values[:, 0])
    np.testing.assert_array_equal(features.phi[:, 1:], values[:, 1:])
    np.testing.assert_allclose(gaussian.unpack(features.vectors(2.0).covariance, 4), np.tile(of.residual, (5, 1, 1)))


def test_functions_that_are_one_another_s_are_told_by_one() -> None:
    C = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    start = Belief(np.zeros((1, 3)), C, np.zeros((3, 3)), np.diag(C))
    known = start.given([0], np.array([[0.5]]))
    np.testing.assert_allclose(known.mean, [[0.5, 1.0, 0.0]])
    np.testing.assert_allclose(known.covariance, np.diag([0, 0, 1.0]))
    np.testing.assert_allclose(known.given([1], np.array([[1.0]])).mean, [[0.5, 1.0, 0.0]])
    places, left = order(singles(3), [1.0, 1.0, 1.0], start, np.array([0.0, 1.0, 1.5]))
    assert places == [0, 2, 1]  # worth 9, 2.25 and, once the first is known, nothing
    assert left == pytest.approx([11.25, 2.25, 0.0, 0.0])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_independent_functions_go_by_their_variance_in_h_per_second(seed: int, d: int) -> None:
    random = np.random.default_rng(seed)
    variance, costs, w = random.uniform(0.1, 3, d), random.uniform(0.1, 3, d), random.normal(size=d)
    start = Belief(np.zeros((1, d)), np.diag(variance), np.zeros((d, d)), variance)
    weight = np.concatenate([[1.0], w[1:]])
    places, left = order(singles(d), costs.tolist(), start, w)
    assert places == np.argsort(-(weight**2) * variance / costs).tolist()
    np.testing.assert_allclose(left, np.concatenate([np.cumsum((weight**2 * variance)[places][::-1])[::-1], [0]]))


def test_worth_is_the_variance_of_h_that_is_removed_whatever_the_weights_are_unsure_of() -> None:
    of, d, n = population(3, 4), 4, 2000
    random = np.random.default_rng(0)
    w_mean, root = random.normal(size=d), random.normal(size=(d, d)) / 2
    # Draws whose mean and covariance are those of the population to rounding: averages of squares are then exact.
    draws = random.normal(size=(n, d))
    draws -= draws.mean(0)
    draws = draws @ np.linalg.inv(np.linalg.cholesky(draws.T @ draws / n)).T
    g = of.mean + draws @ np.linalg.cholesky(of.covariance).T
    start = of.of(n)
    known = start.given((1, 3), g[:, [1, 3]])
    w, second = (
        np.tile(w_mean, (n, 1)),
        np.tile(gaussian.pack((root @ root.T + np.outer(w_mean, w_mean))[None]), (n, 1)),
    )
    before, after = (belief_of_h(w, second, of_x.features(0.0))[1].mean() for of_x in (start, known))
    _, left = order([Step("two", (1, 3)), Step("rest", (0, 2))], [1.0, 1e9], start, w_mean)
    assert before - after == pytest.approx(left[0] - left[1], rel=1e-6)
    # With the weights' covariance in it, as in tr(E[wwᵀ](C − C')), it would be another number.
    unsure = float(np.sum((root @ root.T)[1:, 1:] * (of.covariance - known.covariance)[1:, 1:]))
    assert unsure > 0.1 * (before - after)


def test_stages_come_before_what_needs_them_and_are_chosen_together() -> None:
    # f_1 by two stages: the first says nearly nothing alone, both are worth more per second than f_2.
    d = 3
    C = np.zeros((4, 4))
    C[1, 1], C[2, 2], C[3, 3] = 10.0, 4.0, 1.0
    C[1, 3] = C[3, 1] = 0.1
    steps = [Step("encode", ()), Step("rough", (3,), (0,)), Step("f1", (1,), (1,)), Step("f2", (2,))]
    start = Belief(np.zeros((1, 4)), C, np.zeros((d, d)), np.diag(C))
    w = np.array([0.0, 1.0, 1.0])
    assert order(steps, [1.0, 1.0, 1.0, 2.0], start, w)[0] == [0, 1, 2, 3]
    assert order(steps, [3.0, 1.0, 3.0, 2.0], start, w)[0] == [3, 0, 1, 2]


@pytest.mark.parametrize("budget", [0.0, 1.0, 3.0, 6.0, np.inf])
def test_the_90_percent_interval_holds_90_percent_whatever_the_deadline(budget: float) -> None:
    """Labels of planted users and inputs; what is reached depends on each user's own order."""
    d, noise, users, per_user = 6, 0.3, 300, 60
    of, random = population(5, d, 2), np.random.default_rng(1)
    steps = [*singles(d)[:-1], Step("rough", (d,)), Step("f5", (d - 1,), (d - 1,))]
    costs = random.uniform(0.5, 2, len(steps))
    prior_root, inside, n = random.normal(size=(d, d)) / 2, {"ours": 0, "certain": 0}, 0
    for _ in range(users):
        w_mean, V = random.normal(size=d), 0.1 * prior_root @ prior_root.T
        w = random.multivariate_normal(w_mean, V)
        values = random.multivariate_normal(of.mean, of.covariance, per_user)
        c = values[:, :d] + random.multivariate_normal(np.zeros(d), of.residual, per_user)
        y = w[0] + c @ np.concatenate([[1.0], w[1:]]) + noise**0.5 * random.normal(size=per_user)
        start = of.of(per_user)
        places, _ = order(steps, costs.tolist(), start, w_mean)
        reached = [step for step, spent in zip(places, np.cumsum(costs[places]), strict=True) if spent <= budget]
        seen = [i for step in reached for i in steps[step].reveals]
        second = gaussian.pack((V + np.outer(w_mean, w_mean))[None]).repeat(per_user, 0)
        known = start.given(seen, values[:, seen])
        # The guard off: what was not reached has its conditional mean, but passes for certain.
        certain = replace(known, covariance=np.zeros_like(known.covariance))
        for name, of_x in (("ours", known), ("certain", certain)):
            mean, variance = belief_of_h(np.tile(w_mean, (per_user, 1)), second, of_x.features(0.0))
            inside[name] += int(np.sum(np.abs(y - mean) <= WITHIN * np.sqrt(noise + variance)))
        n += per_user
    assert 0.88 <= inside["ours"] / n <= 0.92
    assert (inside["certain"] / n < 0.85) == (budget <= 3.0)
