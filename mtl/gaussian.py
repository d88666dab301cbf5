"""Batches of small Gaussians in information form: packing, posteriors, entropy.

A batch of n symmetric d×d matrices is kept *packed*: ``(n, d(d+1)/2)``, the upper triangle row by row. Sums of
outer products are then plain sums of rows, and a sparse matrix of events times the packed rows of the inputs is
the whole of a user's statistics (design, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs

Array = NDArray[np.floating]

# Up to this dimension one sweep vectorized over the batch beats a LAPACK call per matrix.
_SWEEP_LIMIT = 24
# Up to this many matrices a LAPACK call each beats both.
FEW = 8
# From 1.17 on SciPy inverts a batch of triangles, in half the time of NumPy, which takes them for full; before, one a call.
_SCIPY_TAKES_BATCHES = tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 17)
_CACHE_BYTES = 1 << 19  # of matrices that stay in the second-level cache
_NOT_DEFINITE = "a precision matrix is not positive definite"


class Posterior(NamedTuple):
    """n Gaussians N(mean, covariance) of dimension d."""

    mean: Array  # (n, d)
    covariance: Array  # packed (n, d(d+1)/2)
    log_determinant: Array  # (n,) log|covariance|


@cache
def triangle(d: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of each packed entry of a d×d matrix."""
    return np.triu_indices(d)


@cache
def place(d: int) -> NDArray[np.intp]:
    """(d, d): where entry (i, j) of a symmetric matrix is in its packed row."""
    places = np.empty((d, d), np.intp)
    rows, columns = triangle(d)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    return places


def packed_length(d: int) -> int:
    return d * (d + 1) // 2


def pack(matrices: Array) -> Array:
    """(n, d, d) symmetric → packed (n, d(d+1)/2)."""
    rows, columns = triangle(matrices.shape[-1])
    return matrices[..., rows, columns]


def unpack(packed: Array, d: int) -> Array:
    """Packed (n, d(d+1)/2) → (n, d, d)."""
    return packed[..., place(d)]


def outer(vectors: Array) -> Array:
    """v vᵀ of each row: (n, d) → packed (n, d(d+1)/2)."""
    n, d = vectors.shape
    packed = np.empty((n, packed_length(d)), vectors.dtype)
    start = 0
    for i in range(d):  # row i of the triangle; twice as fast as gathering both factors
        np.multiply(vectors[:, i : i + 1], vectors[:, i:], out=packed[:, start : start + d - i])
        start += d - i
    return packed


def block(packed: Array, d: int, keep: NDArray[np.intp]) -> Array:
    """The rows and columns ``keep`` (m,) of each matrix: packed (n, ·) → packed (n, m(m+1)/2)."""
    rows, columns = triangle(len(keep))
    return packed[:, place(d)[keep[rows], keep[columns]]]


def row(packed: Array, d: int, i: int) -> Array:
    """Row i of each matrix: packed (n, ·) → (n, d)."""
    return packed[:, place(d)[i]]


def inner(left: Array, right: Array, d: int) -> Array:
    """tr(L R) of each pair of symmetric matrices, both packed (n, d(d+1)/2): (n,).

    A pair's value is the same to the last bit whatever others are beside it.
    """
    rows, columns = triangle(d)
    return np.einsum("np,np->n", left * np.where(rows == columns, 1.0, 2.0), right)


def posterior(precision: Array, information: Array) -> Posterior:
    """Gaussians from their information form.

    Args:
        precision: packed (n, d(d+1)/2), positive definite.
        information: (n, d), precision times mean.

    Raises:
        numpy.linalg.LinAlgError: a precision is not positive definite.
    """
    n, d = information.shape
    if n <= FEW:
        return _one_by_one(precision, information, d)
    found = Posterior(np.empty((n, d)), np.empty_like(precision), np.empty(n))
    solve = _swept if d <= _SWEEP_LIMIT else _factored
    for part in parts(n, d):
        for values, solved in zip(found, solve(precision[part], information[part], d), strict=True):
            values[part] = solved
    return found


def means(precision: Array, information: Array) -> Array:
    """The means of :func:`posterior` alone, (n, d), in a third of its time where all matrices fit in a cache.

    By elimination, Λ = U D Uᵀ, all matrices at once. A row's mean is the same to the last bit whatever others are beside it.

    Raises:
        numpy.linalg.LinAlgError: a precision is not positive definite.
    """
    d = information.shape[1]
    left, mean = precision.T.copy(), information.T.copy()  # the batch is the fast axis
    diagonal = place(d).diagonal()
    rows = [left[first : first + d - j] for j, first in enumerate(diagonal)]  # of the triangle
    for j, row in enumerate(rows):
        pivot = row[0].copy()
        if not (pivot > 0).all():
            raise np.linalg.LinAlgError(_NOT_DEFINITE)
        scaled = row / pivot
        for i in range(1, d - j):
            rows[j + i] -= row[i:] * scaled[i]
            mean[j + i] -= mean[j] * scaled[i]
        mean[j] /= pivot
        row[:] = scaled
    for j in reversed(range(1, d)):
        mean[:j] -= left[place(d)[:j, j]] * mean[j]  # no sum over an axis, which rounds as the other's length has it
    return mean.T


def inverse(packed: Array, d: int) -> tuple[Array, Array]:
    """Inverses and log-determinants of n positive definite matrices, packed (n, d(d+1)/2).

    Raises:
        numpy.linalg.LinAlgError: a matrix is not positive definite.
    """
    found = posterior(packed, np.zeros((len(packed), d)))
    return found.covariance, -found.log_determinant


def parts(n: int, d: int, at_once: int = _CACHE_BYTES) -> Iterator[slice]:
    """Runs of n d×d matrices that take ``at_once`` bytes at most, or are one."""
    step = max(1, at_once // (8 * d * d))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _one_by_one(precision: Array, information: Array, d: int) -> Posterior:
    """By LAPACK, a call a matrix."""
    rows, columns = triangle(d)
    mean, covariance, log_determinant = np.empty_like(information), np.empty_like(precision), np.empty(len(information))
    for i in range(len(information)):
        factor, failed = dpotrf(precision[i].take(place(d)), overwrite_a=1)
        diagonal = factor.diagonal()
        if failed or not (diagonal > 0).all():  # NaN, which LAPACK may let pass
            raise np.linalg.LinAlgError(_NOT_DEFINITE)
        covariance[i] = dpotri(factor)[0][rows, columns]
        mean[i] = dpotrs(factor, information[i])[0]
        log_determinant[i] = -2 * np.log(diagonal).sum()
    return Posterior(mean, covariance, log_determinant)


def _factored(precision: Array, information: Array, d: int) -> Posterior:
    """By Cholesky: Λ = L Lᵀ, Λ⁻¹ = L⁻ᵀ L⁻¹."""
    factor = np.linalg.cholesky(unpack(precision, d))
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    if not (diagonal > 0).all():  # NaN, which LAPACK lets pass
        raise np.linalg.LinAlgError(_NOT_DEFINITE)
    halves = _inverses_of_triangles(factor)
    covariance = halves.transpose(0, 2, 1) @ halves
    return Posterior(np.einsum("nij,nj->ni", covariance, information), pack(covariance), -2 * np.log(diagonal).sum(1))


def _inverses_of_triangles(lower: Array) -> Array:
    if _SCIPY_TAKES_BATCHES:
        return scipy.linalg.inv(lower, assume_a="lower triangular", check_finite=False)
    return np.linalg.inv(lower)


def _swept(precision: Array, information: Array, d: int) -> Posterior:
    """By a Gauss–Jordan sweep of every pivot, all matrices at once; pivots of a definite matrix are > 0."""
    matrices = np.ascontiguousarray(precision.T)[place(d)]  # (d, d, n): the batch is the fast axis
    log_determinant = np.zeros(len(precision))
    change = np.empty_like(matrices)
    for j in range(d):
        pivot = matrices[j, j].copy()
        if not (pivot > 0).all():
            raise np.linalg.LinAlgError(_NOT_DEFINITE)
        log_determinant -= np.log(pivot)
        column = matrices[:, j].copy()
        scaled = column / pivot
        np.multiply(column[:, None], scaled[None], out=change)
        matrices -= change
        matrices[:, j] = scaled
        matrices[j] = scaled
        matrices[j, j] = -1 / pivot
    covariance = np.negative(matrices, out=matrices)
    mean = np.einsum("ijn,jn->in", covariance, np.ascontiguousarray(information.T))
    return Posterior(mean.T, covariance[triangle(d)].T, log_determinant)
