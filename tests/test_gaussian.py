"""Batches of Gaussians: packing, inverses on both sides of the sweep limit, posteriors against other ways to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from problems import definite
from scipy.stats import multivariate_normal

from mtl import gaussian

finite = st.floats(-1e3, 1e3)
# A batch of square matrices, made symmetric.
symmetric = (
    st.tuples(st.integers(0, 5), st.integers(1, 8))
    .flatmap(lambda shape: arrays.arrays(np.float64, (shape[0], shape[1], shape[1]), elements=finite))
    .map(lambda m: m + m.transpose(0, 2, 1))
)


@given(symmetric)
def test_unpacking_what_was_packed_gives_the_same_matrices(matrices: np.ndarray) -> None:
    d = matrices.shape[1]
    packed = gaussian.pack(matrices)
    assert packed.shape == (len(matrices), gaussian.packed_length(d))
    np.testing.assert_array_equal(gaussian.unpack(packed, d), matrices)


def test_a_packed_matrix_is_its_upper_triangle_row_by_row() -> None:
    matrix = np.array([[[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]])
    np.testing.assert_array_equal(gaussian.pack(matrix), [[1, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(gaussian.row(gaussian.pack(matrix), 3, 1), [[2, 4, 5]])
    np.testing.assert_array_equal(gaussian.block(gaussian.pack(matrix), 3, np.array([0, 2])), [[1, 3, 6]])


@given(symmetric, symmetric)
def test_inner_is_the_trace_of_the_product(left: np.ndarray, right: np.ndarray) -> None:
    n, d = min(len(left), len(right)), min(left.shape[1], right.shape[1])
    left, right = left[:n, :d, :d], right[:n, :d, :d]
    expected = np.trace(left @ right, axis1=1, axis2=2)
    np.testing.assert_allclose(gaussian.inner(gaussian.pack(left), gaussian.pack(right), d), expected, atol=1e-6)


@given(arrays.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=finite))
def test_outer_is_the_product_of_every_pair_of_entries(vectors: np.ndarray) -> None:
    d = vectors.shape[1]
    np.testing.assert_array_equal(
        gaussian.unpack(gaussian.outer(vectors), d), np.einsum("ni,nj->nij", vectors, vectors)
    )


@pytest.mark.parametrize("n", [7, 20])  # few, and many
@pytest.mark.parametrize("d", range(1, 41))
def test_inverses_and_log_determinants_are_those_of_numpy_for_every_dimension(d: int, n: int) -> None:
    matrices = definite(d, n, d) * np.geomspace(1e-4, 1e4, n)[:, None, None]
    inverses, log_determinants = gaussian.inverse(gaussian.pack(matrices), d)
    scale = np.abs(np.linalg.inv(matrices)).max((1, 2))[:, None, None]
    np.testing.assert_allclose(gaussian.unpack(inverses, d) / scale, np.linalg.inv(matrices) / scale, atol=1e-10)
    np.testing.assert_allclose(log_determinants, np.linalg.slogdet(matrices)[1], atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3, 11, 21, 40])
def test_means_alone_solve_the_normal_equations_whoever_is_beside(d: int) -> None:
    matrices, information = definite(d, 20, d), np.random.default_rng(d).normal(size=(20, d))
    found = gaussian.means(gaussian.pack(matrices), information)
    np.testing.assert_allclose(found, np.linalg.solve(matrices, information[..., None])[..., 0], rtol=1e-8)
    alone = [gaussian.means(gaussian.pack(matrices[i : i + 1]), information[i : i + 1])[0] for i in range(20)]
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("n", [0, 1, 20_000])
def test_a_batch_of_any_length_is_inverted_matrix_by_matrix(n: int) -> None:
    matrices = definite(0, n, 2)
    inverses, log_determinants = gaussian.inverse(gaussian.pack(matrices), 2)
    determinant = matrices[:, 0, 0] * matrices[:, 1, 1] - matrices[:, 0, 1] ** 2
    by_hand = np.column_stack([matrices[:, 1, 1], -matrices[:, 0, 1], matrices[:, 0, 0]]) / determinant[:, None]
    np.testing.assert_allclose(inverses, by_hand, rtol=1e-9)
    np.testing.assert_allclose(log_determinants, np.log(determinant), atol=1e-9)


@pytest.mark.parametrize("d", [1, 3, 12, 30, 31, 40])
@pytest.mark.parametrize("n", [5, 20])  # few, and many
@pytest.mark.parametrize("flaw", ["negative", "zero", "not a number"])
def test_one_matrix_that_is_not_definite_is_an_error(d: int, flaw: str, n: int) -> None:
    matrices = definite(1, n, d)
    matrices[3] = {
        "negative": matrices[3] - (np.linalg.eigvalsh(matrices[3])[0] + 0.5) * np.eye(d),
        "zero": np.zeros((d, d)),
        "not a number": np.full((d, d), np.nan),
    }[flaw]
    for solve in (gaussian.posterior, gaussian.means):
        with pytest.raises(np.linalg.LinAlgError):
            solve(gaussian.pack(matrices), np.zeros((n, d)))


def test_the_posterior_of_a_two_by_two_example_worked_by_hand() -> None:
    # Λ = [[2, 1], [1, 2]], η = [3, 3]: Λ⁻¹ = [[2, −1], [−1, 2]] / 3.
    posterior = gaussian.posterior(np.array([[2.0, 1.0, 2.0]]), np.array([[3.0, 3.0]]))
    np.testing.assert_allclose(posterior.mean, [[1, 1]])
    np.testing.assert_allclose(posterior.covariance, [[2 / 3, -1 / 3, 2 / 3]])
    np.testing.assert_allclose(posterior.log_determinant, [-np.log(3)])


@pytest.mark.parametrize("d", [2, 6, 33])
def test_the_information_form_gives_what_conditioning_a_joint_gaussian_gives(d: int) -> None:
    random = np.random.default_rng(d)
    prior, mean = definite(d, 1, d)[0], random.normal(size=d)
    phi, noise = random.normal(size=(5, d)), 0.7
    y = random.normal(size=5)
    # w | y from the joint covariance of (w, y), no precision in sight.
    gain = prior @ phi.T @ np.linalg.inv(phi @ prior @ phi.T + noise * np.eye(5))
    expected, spread = mean + gain @ (y - phi @ mean), prior - gain @ phi @ prior
    precision = np.linalg.inv(prior)
    posterior = gaussian.posterior(
        gaussian.pack(precision + phi.T @ phi / noise)[None], (precision @ mean + phi.T @ y / noise)[None]
    )
    np.testing.assert_allclose(posterior.mean[0], expected, atol=1e-9)
    np.testing.assert_allclose(gaussian.unpack(posterior.covariance, d)[0], spread, atol=1e-9)
    entropy = multivariate_normal(expected, spread).entropy()
    np.testing.assert_allclose((posterior.log_determinant[0] + d * np.log(2 * np.pi * np.e)) / 2, entropy)
