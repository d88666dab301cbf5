"""Penalized generalized linear models of many users at once, each on the events of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from mtl import blocks, gaussian
from mtl.gaussian import Array
from mtl.losses import Loss
from mtl.working import like

_USERS_AT_ONCE = 1024
_STEPS = 30
_HALVINGS = 30
_SETTLED = 1e-10  # of the objective


def fit(
    user: np.ndarray,
    place: np.ndarray,
    label: Array,
    weight: Array,
    z: Array,
    n_users: int,
    strengths: Sequence[float],
    loss: Loss,
    offset: float,
) -> Array:
    """argmin Σ c·loss(offset + w·z, y) + λ|w|²/2 for every user and λ: (strengths, users, p).

    Newton's method with the step halved for whom it does not lower the objective. All losses have their canonical link:
    the gradient by h is c(E[y] − y), the curvature c·Var[y] (McCullagh & Nelder 1989, section 2.5).

    Args:
        user, place: number of the user, and of the input among the rows of z, of each event, (n,).
        label, weight: y and c, (n,).
        z: (inputs, p).
        offset: on the scale of h.
    """
    weights, labels = blocks.csr(user, place, label, weight, n_users, len(z))
    w = np.zeros((len(strengths), n_users, z.shape[1]))
    for first in range(0, n_users, _USERS_AT_ONCE):
        part = slice(first, first + _USERS_AT_ONCE)
        seen = np.unique(weights[part].indices)
        pattern, labelled = weights[part][:, seen], labels[part][:, seen]
        for i, strength in enumerate(strengths):
            w[i, part] = _newton(pattern, labelled.data, z[seen], strength, loss, offset)
    return w


def _newton(c: sp.csr_matrix, cy: Array, z: Array, strength: float, loss: Loss, offset: float) -> Array:
    n, p = c.shape[0], z.shape[1]
    row, products, penalty = np.repeat(np.arange(n), np.diff(c.indptr)), gaussian.outer(z), strength * np.eye(p)
    certain = np.zeros(c.nnz)

    def linear(w: Array) -> Array:
        return offset + np.einsum("np,np->n", w[row], z[c.indices])

    def objective(w: Array, h: Array) -> Array:
        return np.bincount(row, loss.expected(h, certain, c.data, cy), n) + strength / 2 * np.sum(w**2, axis=1)

    w = np.zeros((n, p))
    h = linear(w)
    value = objective(w, h)
    for _ in range(_STEPS):
        curvature = like(c, c.data * loss.deviation(h, certain, 1.0) ** 2)
        gradient = like(c, c.data * loss.response(h, certain) - cy) @ z + strength * w
        step = -gaussian.posterior(curvature @ products + gaussian.pack(penalty), gradient).mean
        for _ in range(_HALVINGS):
            tried = w + step
            h = linear(tried)
            reached = objective(tried, h)
            worse = ~(reached <= value + _SETTLED * np.abs(value))
            if not worse.any():
                break
            step[worse] /= 2
        settled = np.all(value - reached <= _SETTLED * np.abs(value))
        w, value = tried, reached
        if settled:
            break
    return w
