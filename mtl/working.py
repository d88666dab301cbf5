"""Beliefs about h of every event, and from them the working sums of users under any loss (:mod:`mtl.losses`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from mtl import alternation, gaussian
from mtl.effects import Offsets
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.losses import Loss

_ENTRIES_AT_ONCE = 16_384  # whose packed moments are gathered at once

# Passes of `settle`: a loss that is a bound converges at a rate of the information it leaves out, about ½ for h = 2.
SETTLING_PASSES = 30
ADDING_PASSES = 3  # for the events of one micro-batch

# Newton's working values hold near the belief they are about, which moves no further than this in one pass (nats).
_NEWTON_STEP = (-2.0, 1.0)


def beliefs(pattern: sp.csr_matrix, users: Posterior, features: Features) -> tuple[Array, Array]:
    """Mean and variance of h = o + w_u·φ(x) for every stored entry of ``pattern``, (entries,) each.

    Args:
        pattern: (users, inputs); only its structure is used.
        users: of the n rows, d-dimensional.
        features: of the inputs.
    """
    second = users.covariance + gaussian.outer(users.mean)
    row = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    mean, variance = np.empty(pattern.nnz), np.empty(pattern.nnz)
    for first in range(0, pattern.nnz, _ENTRIES_AT_ONCE):
        part = slice(first, first + _ENTRIES_AT_ONCE)
        user, shared = row[part], features.take(pattern.indices[part])
        mean[part], variance[part] = belief(users.mean[user], second[user], shared)
    return mean, variance


def means(pattern: sp.csr_matrix, users: Posterior, features: Features) -> Array:
    """The means of :func:`beliefs` alone, (entries,)."""
    row = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    mean = np.empty(pattern.nnz)
    for first in range(0, pattern.nnz, _ENTRIES_AT_ONCE):
        part = slice(first, first + _ENTRIES_AT_ONCE)
        of = pattern.indices[part]
        mean[part] = features.offset[of] + np.einsum("nd,nd->n", users.mean[row[part]], features.phi[of])
    return mean


def added(believed: tuple[Array, Array], offsets: Offsets | None) -> tuple[Array, Array]:
    """Means and variances of h of entries with their offsets."""
    return believed if offsets is None else (believed[0] + offsets.mean, believed[1] + offsets.variance)


def belief(w: Array, second: Array, features: Features) -> tuple[Array, Array]:
    """Mean and variance of h = o + w·φ for n pairs, (n,) each.

        E[h] = E[o] + E[w]·E[φ]        Var[h] = tr(E[wwᵀ] E[φφᵀ]) − (E[w]·E[φ])² + Var[o] + 2 E[w]·Cov(o, φ)

    Args:
        w: E[w] of each pair's user, (n, d).
        second: E[wwᵀ], packed (n, d(d+1)/2).
        features: of each pair's input.
    """
    known = np.einsum("nd,nd->n", w, features.phi)
    with_offset = features.offset_phi - features.offset[:, None] * features.phi
    variance = gaussian.inner(second, features.second_moment, w.shape[1]) - known**2
    variance += features.offset_variance + 2 * np.einsum("nd,nd->n", w, with_offset)
    return features.offset + known, np.maximum(variance, 0.0)


def settle(
    weights: sp.csr_matrix,
    labels: sp.csr_matrix,
    features: Features,
    posteriors: Callable[[Array, Array], Posterior],
    loss: Loss,
    before: tuple[Array, Array] | None = None,
    offsets: Offsets | None = None,
) -> tuple[Array, Array]:
    """Users' working sums A, packed (users, d(d+1)/2), and b, (users, d), given the features: the same for the same events.

    Under another loss than the squared one, working values and posteriors are computed in turn: from nothing until they
    have settled, or, with sums ``before``, a few times about what those users were known to be. What an event adds then
    depends a little on when it came: sums of events in another order differ, by what an audit measures.

    Newton's steps under wide priors may circle, from too large a rate to too small a variance and back. After the first few
    each pass therefore takes the mean of its working values and those before: steps of one half in the posteriors' natural
    parameters, which circle nowhere that was tried (prior variances of h up to 75).

    Args:
        weights, labels: c and c·y, (users, inputs), of one pattern.
        posteriors: (A, b) → the users' posteriors under their prior.
        before: A and b of earlier events.
        offsets: a known part of h of every entry; None where it is 0.
    """
    n, d = weights.shape[0], features.phi.shape[1]
    start = before or (np.zeros((n, gaussian.packed_length(d))), np.zeros((n, d)))
    if loss.is_quadratic:
        a, b = alternation.user_sums(weights, left(weights, labels, offsets), features)
        a += start[0]
        b += start[1]
        return a, b
    mean, variance = added(beliefs(weights, posteriors(*start), features), offsets)
    if not loss.is_bounded:
        mean, variance = loss.start(weights.data, labels.data, loss.response(mean, np.zeros_like(mean)))
    passes = ADDING_PASSES if before else SETTLING_PASSES
    precision = information = np.zeros(weights.nnz)
    for number in range(passes):
        fresh = loss.working(mean, variance, weights.data, labels.data)
        if number >= ADDING_PASSES and not loss.is_bounded:
            fresh = (precision + fresh[0]) / 2, (information + fresh[1]) / 2
        precision, information = fresh
        precise, informed = like(weights, precision), like(weights, information)
        a, b = alternation.user_sums(precise, left(precise, informed, offsets), features)
        a += start[0]
        b += start[1]
        if number + 1 < passes:
            reached, spread = added(beliefs(weights, posteriors(a, b), features), offsets)
            if not loss.is_bounded:
                reached, spread = mean + np.clip(reached - mean, *_NEWTON_STEP), (variance + spread) / 2
            mean, variance = reached, spread
    return a, b


def left(weights: sp.csr_matrix, labels: sp.csr_matrix, offsets: Offsets | None) -> sp.csr_matrix:
    """Weighted labels of what is left of h without the offsets of the entries."""
    return labels if offsets is None else like(labels, labels.data - weights.data * offsets.mean)


def like(pattern: sp.csr_matrix, values: Array) -> sp.csr_matrix:
    """A matrix of the structure of ``pattern`` with other values."""
    return sp.csr_matrix((values, pattern.indices, pattern.indptr), shape=pattern.shape)
