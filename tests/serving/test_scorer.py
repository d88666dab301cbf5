"""Scores against the arithmetic of mtl.working, top-k against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import covariances, features

from mtl import gaussian
from mtl.losses import LOSSES
from mtl.serving import scorer
from mtl.working import belief


def user(random: np.random.Generator, d: int) -> tuple[scorer.Weights, np.ndarray]:
    mean, covariance = random.normal(size=(1, d)), covariances(random, 1, d, 0.3)
    return scorer.Weights(mean[0], scorer.quadratics(mean, covariance)[0], 3), covariance


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("d", [1, 2, 21])
def test_scores_are_those_of_belief(loss: str, d: int) -> None:
    random = np.random.default_rng(d)
    inputs, (weights, covariance) = features(random, 50, d), user(random, d)
    second = covariance + gaussian.outer(weights.mean[None])
    expected = belief(np.tile(weights.mean, (50, 1)), np.tile(second, (50, 1)), inputs)
    rows = scorer.feature_rows(inputs)
    np.testing.assert_allclose(scorer.belief(rows, weights), expected, atol=1e-11)
    chosen = LOSSES[loss]
    found = scorer.score(rows, weights, chosen, 0.5)
    np.testing.assert_allclose(found[0], chosen.response(*expected), atol=1e-11)
    np.testing.assert_allclose(found[1], chosen.deviation(*expected, 0.5), atol=1e-11)


@pytest.mark.parametrize("n_inputs", [0, 1, 10])
def test_several_users_are_scored_as_each_alone_to_the_last_bit(n_inputs: int) -> None:
    random = np.random.default_rng(n_inputs)
    users = [user(random, 5)[0]._replace(offset=offset) for offset in (0.0, 0.5, -3.0)]
    rows = np.stack([scorer.feature_rows(features(random, n_inputs, 5)) for _ in users])
    mean, quadratic = (np.stack([getattr(one, name) for one in users]) for name in ("mean", "quadratic"))
    together = scorer.belief(rows, scorer.Several(mean, quadratic, np.array([[one.offset] for one in users])))
    for i, one in enumerate(users):
        for found, expected in zip(together, scorer.belief(rows[i], one), strict=True):
            assert found[i].tolist() == expected.tolist()


def test_rows_and_users_come_back_as_they_were() -> None:
    random = np.random.default_rng(0)
    inputs, (weights, covariance) = features(random, 9, 4), user(random, 4)
    for name, values in vars(scorer.features_of(scorer.feature_rows(inputs), 4)).items():
        np.testing.assert_allclose(values, getattr(inputs, name), atol=1e-12)
    np.testing.assert_allclose(scorer.covariance_of(weights), covariance[0], atol=1e-12)


@given(st.integers(0, 6000), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_largest_is_what_sorting_finds(n: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=n).astype(np.float32)
    scores[random.random(n) < 0.1] = -np.inf
    found = scorer.largest(scores, k)
    expected = np.sort(scores[np.isfinite(scores)])[::-1][:k]
    assert np.array_equal(scores[found], expected)
    assert len(set(found.tolist())) == len(found)


def test_largest_finds_them_all_in_one_group_and_among_equals() -> None:
    scores = np.zeros(300_000, np.float32)
    scores[1500:1540] = np.arange(40)
    assert list(scorer.largest(scores, 10)) == list(range(1539, 1529, -1))
    assert len(scorer.largest(np.ones(300_000, np.float32), 10)) == 10


def test_linear_scores_order_as_the_mean_does() -> None:
    random = np.random.default_rng(1)
    inputs, (weights, _) = features(random, 400, 6), user(random, 6)
    rows = scorer.feature_rows(inputs)
    mean, _ = scorer.belief(rows, weights)
    linear = scorer.linear_scores(scorer.top_columns(rows, 6), weights)
    np.testing.assert_allclose(linear - linear[0], mean - mean[0], atol=1e-4)


@pytest.mark.parametrize("offset", [0.5, 1e8, -1e12])
def test_an_offset_of_any_size_leaves_the_deviation_as_it_was(offset: float) -> None:
    random = np.random.default_rng(2)
    inputs, (weights, covariance) = scorer.feature_rows(features(random, 20, 4)), user(random, 4)
    mean, variance = scorer.belief(inputs, weights)
    shifted = scorer.moved(weights, offset, 0.25)
    np.testing.assert_allclose(scorer.belief(inputs, shifted)[0], mean + offset, rtol=1e-15)
    np.testing.assert_allclose(scorer.belief(inputs, shifted)[1], variance + 0.25, rtol=1e-12)
    expected = covariance[0].copy()
    expected[0] += 0.25
    np.testing.assert_allclose(scorer.covariance_of(shifted), expected, atol=1e-12)
