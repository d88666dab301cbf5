"""The two half-steps of oracle-mtl, on arrays (design, sections 2 and 3).

The model is y = μ + o_x + b_u + p_u·q_x + noise on labels, or on working ones (:mod:`mtl.losses`); the users' vectors
w_u = [b_u, p_u] and the inputs' vectors c_x = [o_x, q_x] are both of length d and Gaussian given the other side; known
attributes may stand in for entries of either (:mod:`mtl.forms`). A half-step gives one side's exact posteriors;
between the sides travel only sums: a user's (A, b), an input's (A_x, b_x) over the extended user vector [1, b_u, p_u].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from mtl import gaussian
from mtl.features import Features
from mtl.gaussian import Array, Posterior

_CACHE_BYTES = 6 << 20
_FEWEST_COLUMNS = 48  # reading the events' pattern again costs about as much as this many columns


@dataclass(frozen=True)
class InputSums:
    """Sums over the events of each of n inputs; they add."""

    second: Array  # A_x = Σ c E[w̃w̃ᵀ], packed (n, e(e+1)/2), w̃ = [1, w_u], e = k+2
    first: Array  # b_x = Σ c y E[w̃], (n, e)

    @classmethod
    def zeros(cls, n: int, d: int, dtype: Any = np.float64) -> InputSums:
        return cls(np.zeros((n, gaussian.packed_length(d + 1)), dtype), np.zeros((n, d + 1), dtype))


def user_sums(weights: sp.csr_matrix, labels: sp.csr_matrix, features: Features) -> tuple[Array, Array]:
    """A = Σ c E[φφᵀ], packed (users, d(d+1)/2), and b = Σ c (yφ − E[oφ]), (users, d).

    Args:
        weights, labels: c and c·y of the users' events, (users, inputs); the sums are of their precision.
    """
    return _by_columns(
        weights, features.second_moment, len(features)
    ), labels @ features.phi - weights @ features.offset_phi


def posteriors(
    precision: Array, information: Array, prior_mean: Array, prior_precision: Array, noise: float
) -> Posterior:
    """Λ = S⁻¹ + A/σ², η = S⁻¹m + b/σ² (design, section 2): the posteriors of n vectors of either side.

    Args:
        precision, information: A and b, packed (n, d(d+1)/2) and (n, d), as sums of data without the noise.
        prior_mean: m, (n, d).
        prior_precision: S⁻¹, (d, d).
        noise: σ², squared label units.
    """
    return gaussian.posterior(*_canonical(precision, information, prior_mean, prior_precision, noise))


def means(precision: Array, information: Array, prior_mean: Array, prior_precision: Array, noise: float) -> Array:
    """The means of :func:`posteriors` alone, (n, d)."""
    found = np.empty_like(prior_mean)
    for part in gaussian.parts(len(found), found.shape[1], _CACHE_BYTES):
        of = precision[part], information[part], prior_mean[part]
        found[part] = gaussian.means(*_canonical(*of, prior_precision, noise))
    return found


def _canonical(
    precision: Array, information: Array, prior_mean: Array, prior_precision: Array, noise: float
) -> tuple[Array, Array]:
    """Λ, packed (n, d(d+1)/2), and η, (n, d)."""
    # Not by BLAS, whose rounding of a row depends on how many others there are: a prediction can be rebuilt to the last bit.
    towards = np.einsum("nd,de->ne", prior_mean, prior_precision)
    return precision / noise + gaussian.pack(prior_precision), information / noise + towards


class Extended(NamedTuple):
    """Moments of n users' extended vectors w̃ = [1, w_u], e = d+1 = k+2."""

    second: Array  # E[w̃w̃ᵀ], packed (n, e(e+1)/2)
    mean: Array  # E[w̃], (n, e)

    @classmethod
    def empty(cls, n: int, d: int, dtype: Any) -> Extended:
        return cls(np.empty((n, gaussian.packed_length(d + 1)), dtype), np.empty((n, d + 1), dtype))

    @classmethod
    def of(cls, users: Posterior, dtype: Any = np.float64) -> Extended:
        """In another precision, if it is the sums' of :func:`input_sums`."""
        mean = np.column_stack([np.ones(len(users.mean)), users.mean]).astype(dtype)
        second = gaussian.outer(mean)
        # Past the first row of the triangle: w̃₀ = 1 is certain.
        second[:, mean.shape[1] :] += users.covariance.astype(dtype)
        return cls(second, mean)


def input_sums(weights: sp.csr_matrix, labels: sp.csr_matrix, users: Extended) -> InputSums:
    """(A_x, b_x) of every input, over the events of these users."""
    return InputSums(_by_columns(weights.T, users.second, weights.shape[1]), labels.T @ users.mean)


def input_evidence(sums: InputSums, mu: float) -> tuple[Array, Array]:
    """What the events say of c_x = [o, q]: precision·σ², packed (n, d(d+1)/2), and information·σ², (n, d).

    The user's intercept multiplies nothing of the input: its column moves to the label's side, and so does μ.
    """
    e = sums.first.shape[1]
    known = gaussian.row(sums.second, e, 1) + mu * gaussian.row(sums.second, e, 0)
    return gaussian.block(sums.second, e, _of_input(e)), (sums.first - known)[:, _of_input(e)]


def squared_error(sums: InputSums, inputs: Posterior, mu: float) -> float:
    """Σ c E[(y − h)²] − Σ c y² over the events behind ``sums``, from the sums alone."""
    e = sums.first.shape[1]
    rows, columns = gaussian.triangle(e)
    of_input = np.flatnonzero((rows != 1) & (columns != 1))
    total = 0.0
    for part in gaussian.parts(len(inputs.mean), e):
        mean = np.insert(inputs.mean[part], 1, 1.0, axis=1)
        mean[:, 0] += mu
        second = gaussian.outer(mean)
        second[:, of_input] += inputs.covariance[part]
        total += np.sum(gaussian.inner(sums.second[part], second, e)) - 2 * np.sum(sums.first[part] * mean)
    return float(total)


def _by_columns(events: sp.spmatrix, moments: Array, n_inputs: int) -> Array:
    """``events @ moments``, of as many columns at once as the cache holds for all inputs, for these are met in no order."""
    columns = moments.shape[1]
    width = max(_FEWEST_COLUMNS, _CACHE_BYTES // (moments.itemsize * max(n_inputs, 1)))
    if width >= columns:
        return events @ moments
    product = np.empty((events.shape[0], columns), moments.dtype)
    for first in range(0, columns, width):
        part = slice(first, first + width)
        product[:, part] = events @ np.ascontiguousarray(moments[:, part])
    return product


def _of_input(e: int) -> np.ndarray:
    """Where c_x stands in the extended vector: all but the user's intercept."""
    return np.delete(np.arange(e), 1)
