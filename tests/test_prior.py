"""Learnt priors: that what is learnt is the best there is, and that the sums it is learnt from add."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from problems import gaussians

from mtl import gaussian
from mtl.prior import COEFFICIENT_PRECISION, Moments, Prior


def vectors_with_attributes(seed: int, n: int = 9, d: int = 3, p: int = 3):
    attributes = np.random.default_rng([seed, 2]).normal(size=(n, p))
    attributes[:, 0] = 1.0
    return gaussians(seed, n, d), attributes


def kl(mean: np.ndarray, covariance: np.ndarray, mean_0: np.ndarray, covariance_0: np.ndarray) -> float:
    """KL(N(mean, covariance) ‖ N(mean_0, covariance_0)) of two Gaussians, as in any textbook."""
    precision, gap = np.linalg.inv(covariance_0), mean_0 - mean
    ratio = np.linalg.slogdet(covariance_0)[1] - np.linalg.slogdet(covariance)[1]
    return (np.trace(precision @ covariance) + gap @ precision @ gap - len(mean) + ratio) / 2


def test_without_attributes_the_prior_is_the_shrunken_mean_and_the_covariance_about_it() -> None:
    vectors, _ = vectors_with_attributes(0)
    n, d, rho = 9, 3, COEFFICIENT_PRECISION
    ones = np.ones((n, 1))
    prior = Prior.start(ones.T @ ones, d, 1.0).learn(Moments.of(vectors, ones))
    mean = vectors.mean.sum(0) / (n + rho)
    deviations = vectors.mean - mean
    covariance = deviations.T @ deviations + gaussian.unpack(vectors.covariance, d).sum(0) + rho * np.outer(mean, mean)
    np.testing.assert_allclose(prior.mean(ones), np.tile(mean, (n, 1)))
    np.testing.assert_allclose(prior.covariance, covariance / n)
    np.testing.assert_allclose(prior.precision @ prior.covariance, np.eye(d), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_is_the_kl_of_vectors_and_of_coefficients_summed_one_by_one(seed: int) -> None:
    vectors, z = vectors_with_attributes(seed)
    d, p, rho = 3, 3, COEFFICIENT_PRECISION
    prior = Prior.start(z.T @ z, d, 0.7).learn(Moments.of(*vectors_with_attributes(seed + 100)))
    # q(B) = MN(E[B], K, S): given B a vector's prior mean is Bᵀz, which spreads by zᵀKz · S about its own mean.
    K, B, S = np.linalg.inv(z.T @ z + rho * np.eye(p)), prior.coefficients, prior.covariance
    covariances = gaussian.unpack(vectors.covariance, d)
    of_vectors = sum(kl(vectors.mean[i], covariances[i], B.T @ z[i], S) + d * z[i] @ K @ z[i] / 2 for i in range(9))
    of_coefficients = kl(B.ravel(), np.kron(K, S), np.zeros(p * d), np.kron(np.eye(p) / rho, S))
    assert prior.divergence(Moments.of(vectors, z)) == pytest.approx(of_vectors + of_coefficients, rel=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_prior_is_nearer_than_the_learnt_one(seed: int) -> None:
    vectors, z = vectors_with_attributes(seed)
    moments = Moments.of(vectors, z)
    learnt = Prior.start(z.T @ z, 3, 1.0).learn(moments)
    best, random = learnt.divergence(moments), np.random.default_rng(seed)
    for size in (1e-3, 1e-2, 0.1):
        step = size * random.normal(size=(3, 3))
        assert replace(learnt, coefficients=learnt.coefficients + step).divergence(moments) > best
        stretch = np.eye(3) + step
        assert replace(learnt, covariance=stretch @ learnt.covariance @ stretch.T).divergence(moments) > best


def test_moments_of_parts_add_to_the_moments_of_the_whole() -> None:
    vectors, z = vectors_with_attributes(1)
    parts = [
        Moments.of(type(vectors)(*(array[part] for array in vectors)), z[part])
        for part in (slice(0, 2), slice(2, 2), slice(2, 9))
    ]
    total, whole = sum(parts, Moments.zero(3, 3)), Moments.of(vectors, z)
    for field in fields(Moments):
        np.testing.assert_allclose(getattr(total, field.name), getattr(whole, field.name), atol=1e-12)


def test_a_vector_without_data_has_the_prior_for_its_posterior() -> None:
    vectors, z = vectors_with_attributes(2)
    prior = Prior.start(z.T @ z, 3, 1.0).learn(Moments.of(vectors, z))
    nothing = prior.posteriors(np.zeros((9, 6)), np.zeros((9, 3)), z, 0.5)
    np.testing.assert_allclose(nothing.mean, prior.mean(z), atol=1e-12)
    np.testing.assert_allclose(gaussian.unpack(nothing.covariance, 3), np.tile(prior.covariance, (9, 1, 1)))


def test_attributes_that_repeat_each_other_change_no_prior_mean_for_the_worse() -> None:
    vectors, z = vectors_with_attributes(3)
    twice = np.column_stack([z, z[:, 1:]])
    prior = Prior.start(twice.T @ twice, 3, 1.0).learn(Moments.of(vectors, twice))
    alone = Prior.start(z.T @ z, 3, 1.0).learn(Moments.of(vectors, z))
    assert np.isfinite(prior.coefficients).all()
    np.testing.assert_allclose(prior.coefficients[1:3], prior.coefficients[3:], atol=1e-12)
    # The pair shares a ridge half as strong: closer to the vectors, never further.
    assert np.sum((vectors.mean - prior.mean(twice)) ** 2) <= np.sum((vectors.mean - alone.mean(z)) ** 2)
