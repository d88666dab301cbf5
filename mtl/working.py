"""Beliefs about h of every event, and from them the working sums of users under any loss (:mod:`mtl.losses`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from mtl import alternation, gaussian
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.losses import Loss

_ENTRIES_AT_ONCE = 16_384  # whose packed moments are gathered at once

# Passes of `settle`: a loss that is a bound converges at a rate of the information it leaves out, about ½ for h = 2.
SETTLING_PASSES = 30


def beliefs(pattern: sp.csr_matrix, users: Posterior, features: Features) -> tuple[Array, Array]:
    """Mean and variance of h = o + w_u·φ(x) for every stored entry of ``pattern``, (entries,) each.

    Args:
        pattern: (users, inputs); only its structure is used.
        users: of the n rows, d-dimensional.
        features: of the inputs.
    """
    d = users.mean.shape[1]
    second = users.covariance + gaussian.outer(users.mean)
    row = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    mean, variance = np.empty(pattern.nnz), np.empty(pattern.nnz)
    for first in range(0, pattern.nnz, _ENTRIES_AT_ONCE):
        part = slice(first, first + _ENTRIES_AT_ONCE)
        user, place = row[part], pattern.indices[part]
        known = np.einsum("nd,nd->n", users.mean[user], features.phi[place])
        mean[part] = features.offset[place] + known
        variance[part] = gaussian.inner(second[user], features.second_moment[place], d) - known**2
        cross = features.offset_phi[place] - features.offset[place, None] * features.phi[place]
        variance[part] += features.offset_variance[place] + 2 * np.einsum("nd,nd->n", users.mean[user], cross)
    return mean, np.maximum(variance, 0.0)


def settle(
    weights: sp.csr_matrix,
    labels: sp.csr_matrix,
    features: Features,
    posteriors: Callable[[Array, Array], Posterior],
    loss: Loss,
    passes: int = SETTLING_PASSES,
) -> tuple[Array, Array, Posterior]:
    """Users' working sums A and b and their posteriors, given the features, from nothing: the same for the same events.

    Args:
        weights, labels: c and c·y, (users, inputs), of one pattern.
        posteriors: (A, b) → the users' posteriors under their prior.
        passes: of working sums and posteriors in turn; squared loss takes one.
    """
    if loss.is_quadratic:
        a, b = alternation.user_sums(weights, labels, features)
        return a, b, posteriors(a, b)
    d = features.phi.shape[1]
    n = weights.shape[0]
    users = posteriors(np.zeros((n, gaussian.packed_length(d))), np.zeros((n, d)))
    for _ in range(passes):
        precision, information = loss.working(*beliefs(weights, users, features), weights.data, labels.data)
        a, b = alternation.user_sums(like(weights, precision), like(weights, information), features)
        users = posteriors(a, b)
    return a, b, users


def like(pattern: sp.csr_matrix, values: Array) -> sp.csr_matrix:
    """A matrix of the structure of ``pattern`` with other values."""
    return sp.csr_matrix((values, pattern.indices, pattern.indptr), shape=pattern.shape)
