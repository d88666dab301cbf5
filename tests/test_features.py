"""What all users share of an input: the moments of φ and o, by hand and by sampling."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from problems import certain, gaussians

from mtl import gaussian, schema
from mtl.features import Features, feature_rows, from_rows
from mtl.layout import SCHEMAS


def test_the_moments_of_one_basis_function_worked_by_hand() -> None:
    # (o − μ, f) has mean (2, 3), variances ½ and 1, covariance ¼; μ = 10.
    features = Features.of(np.array([[2.0, 3.0]]), np.array([[0.5, 0.25, 1.0]]), 10.0)
    np.testing.assert_array_equal(features.offset, [12])
    np.testing.assert_array_equal(features.phi, [[1, 3]])
    np.testing.assert_array_equal(features.second_moment, [[1, 3, 9 + 1]])
    np.testing.assert_array_equal(features.offset_phi, [[12, 12 * 3 + 0.25]])


def test_features_known_exactly_have_the_moments_of_numbers() -> None:
    mean = np.random.default_rng(0).normal(size=(4, 3))
    features = Features.of(*certain(mean)[:2], 1.5)
    phi = np.column_stack([np.ones(4), mean[:, 1:]])
    np.testing.assert_array_equal(gaussian.unpack(features.second_moment, 3), phi[:, :, None] * phi[:, None, :])
    np.testing.assert_array_equal(features.offset_phi, phi * (1.5 + mean[:, :1]))


def test_the_moments_are_those_of_samples() -> None:
    inputs = gaussians(3, 2, 4)
    features = Features.of(inputs.mean, inputs.covariance, -1.0)
    random, n = np.random.default_rng(0), 400_000
    for i in range(2):
        c = random.multivariate_normal(inputs.mean[i], gaussian.unpack(inputs.covariance, 4)[i], n)
        o, phi = c[:, 0] - 1.0, np.column_stack([np.ones(n), c[:, 1:]])
        np.testing.assert_allclose(features.phi[i], phi.mean(0), atol=0.01)
        np.testing.assert_allclose(features.offset[i], o.mean(), atol=0.01)
        np.testing.assert_allclose(features.offset_phi[i], o @ phi / n, atol=0.03)
        np.testing.assert_allclose(gaussian.unpack(features.second_moment, 4)[i], phi.T @ phi / n, atol=0.03)


def test_making_features_leaves_the_inputs_posteriors_alone() -> None:
    inputs = gaussians(5, 3, 3)
    before = [array.copy() for array in inputs]
    Features.of(inputs.mean, inputs.covariance, 2.0)
    for array, copy in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_features_come_back_from_their_rows_as_they_were() -> None:
    inputs = gaussians(4, 5, 3)
    features = Features.of(inputs.mean, inputs.covariance, 0.5)
    ids = pa.array(list("abcde"))
    rows = feature_rows(7, ids, features, inputs.mean, np.ones((len(ids), 2)))
    assert set(rows.column_names) == set(SCHEMAS[schema.FEATURES].names)
    assert rows[schema.MODEL_VERSION].to_pylist() == [7] * 5
    assert rows[schema.INPUT_ID].to_pylist() == list("abcde")
    # As Spark hands them back: in several chunks.
    back = from_rows(pa.concat_tables([rows.slice(0, 2), rows.slice(2)]), 3)
    for name in ("offset", "phi", "second_moment", "offset_phi"):
        np.testing.assert_array_equal(getattr(back, name), getattr(features, name))
    assert len(back) == 5
    np.testing.assert_array_equal(back.take(np.array([4, 0])).phi, features.phi[[4, 0]])
