"""Scores of many inputs for one user by matrix-vector products, and the best of all inputs; pure NumPy.

An input is one row [E[φφᵀ] packed | Cov(o, φ) | E[o] | Var[o]], whose first d entries are φ (φ₀ = 1), so that a request
gathers its rows once:

    E[h] = o + w·φ        Var[h] = tr(E[wwᵀ] E[φφᵀ]) − (w·φ)² + Var[o] + 2 w·Cov(o, φ)        (:func:`mtl.working.belief`)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from mtl import gaussian
from mtl.features import Features
from mtl.gaussian import Array
from mtl.losses import Loss

_GROUP = 1024  # inputs of which top-k looks at the largest score first


class Weights(NamedTuple):
    """What is believed of one user's weights, ready to score with."""

    mean: Array  # E[w], (d,)
    second: Array  # E[wwᵀ], packed, entries beside the diagonal doubled (d(d+1)/2,)
    n_events: int


def width(d: int) -> int:
    return gaussian.packed_length(d) + d + 2


def feature_rows(features: Features) -> Array:
    """(n, width) of n inputs."""
    with_offset = features.offset_phi - features.offset[:, None] * features.phi
    return np.column_stack([features.second_moment, with_offset, features.offset, features.offset_variance])


def features_of(rows: Array, d: int) -> Features:
    """The way back from :func:`feature_rows`."""
    length = gaussian.packed_length(d)
    phi, offset = rows[:, :d], rows[:, -2]
    offset_phi = rows[:, length : length + d] + offset[:, None] * phi
    return Features(offset, phi, rows[:, :length], offset_phi, rows[:, -1])


def top_columns(rows: Array, d: int) -> Array:
    """(d, n) float32 of feature rows: o, φ_1 … φ_k, of which top-k takes inner products."""
    columns = np.ascontiguousarray(rows[:, :d].T, np.float32)
    columns[0] = rows[:, -2]
    return columns


def second_moments(mean: Array, covariance: Array) -> Array:
    """E[wwᵀ] as :class:`Weights` has it, of n Gaussians with means (n, d) and packed covariances."""
    return (gaussian.outer(mean) + covariance) * _twice(mean.shape[1])


def covariance_of(user: Weights) -> Array:
    """The packed covariance (d(d+1)/2,)."""
    return user.second / _twice(len(user.mean)) - gaussian.outer(user.mean[None])[0]


def belief(rows: Array, user: Weights) -> tuple[Array, Array]:
    """Mean and variance of h of every row (n, width) for the user, (n,) each."""
    w, second, _ = user
    d, length = len(w), len(second)
    known = rows[:, :d] @ w
    variance = rows[:, :length] @ second
    variance -= known * known
    variance += rows[:, length : length + d] @ (2 * w)
    variance += rows[:, -1]
    known += rows[:, -2]
    return known, np.maximum(variance, 0.0, out=variance)


def score(rows: Array, user: Weights, loss: Loss, noise: float) -> tuple[Array, Array]:
    """Prediction and standard deviation of a label about it, (n,) each, in label units."""
    mean, variance = belief(rows, user)
    return loss.response(mean, variance), loss.deviation(mean, variance, noise)


def linear_scores(columns: Array, user: Weights) -> Array:
    """E[h] of all inputs but for what they have in common, single precision (n,)."""
    w = user.mean.astype(np.float32)
    w[0] = 1.0
    return w @ columns


def largest(scores: Array, k: int) -> np.ndarray:
    """Places of the min(k, n) largest finite entries of (n,), the best first.

    The k best are in the k groups of the largest maxima, and only those are looked through (as :mod:`mtl.recommend`).
    """
    n = len(scores)
    groups = n // _GROUP
    if groups <= 2 * k:
        places = np.arange(n)
    else:
        maxima = scores[: groups * _GROUP].reshape(groups, _GROUP).max(1)
        best = np.argpartition(maxima, -k)[-k:]
        places = (best[:, None] * _GROUP + np.arange(_GROUP)).ravel()
        places = np.concatenate([places, np.arange(groups * _GROUP, n)])
    values = scores[places]
    if k < len(values):
        chosen = np.argpartition(values, -k)[-k:]
        places, values = places[chosen], values[chosen]
    order = np.argsort(-values, kind="stable")
    places = places[order]
    return places[np.isfinite(values[order])]


@cache
def _twice(d: int) -> Array:
    """How often each packed entry is in the whole matrix."""
    rows, columns = gaussian.triangle(d)
    return np.where(rows == columns, 1.0, 2.0)
