"""Scores of many inputs for one user by matrix-vector products, and the best of all inputs; pure NumPy.

An input is one row [E[φφᵀ] packed | Cov(o, φ) | Var[o] | E[o]], whose first d entries are φ (φ₀ = 1), and a user is w with one
vector against all of the row but its end, so that a request gathers its rows once and multiplies twice:

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


class Weights(NamedTuple):
    """What is believed of one user's weights, ready to score with."""

    mean: Array  # E[w], (d,)
    quadratic: Array  # E[wwᵀ] packed with entries beside the diagonal doubled, 2 E[w], 1: (width − 1,)
    n_events: int
    offset: float = 0.0  # a known part of every h, which a large one would leave nothing of in E[wwᵀ]


class Several(NamedTuple):
    """The same of m users."""

    mean: Array  # (m, d)
    quadratic: Array  # (m, width − 1)
    offset: Array | None  # (m, 1); None: of none of them


def width(d: int) -> int:
    return gaussian.packed_length(d) + d + 2


def feature_rows(features: Features) -> Array:
    """(n, width) of n inputs."""
    with_offset = features.offset_phi - features.offset[:, None] * features.phi
    return np.column_stack([features.second_moment, with_offset, features.offset_variance, features.offset])


def features_of(rows: Array, d: int) -> Features:
    """The way back from :func:`feature_rows`."""
    length = gaussian.packed_length(d)
    phi, offset = rows[:, :d], rows[:, -1]
    offset_phi = rows[:, length : length + d] + offset[:, None] * phi
    return Features(offset, phi, rows[:, :length], offset_phi, rows[:, -2])


def top_columns(rows: Array, d: int) -> Array:
    """(d, n) float32 of feature rows: o, φ_1 … φ_k, of which top-k takes inner products."""
    columns = np.ascontiguousarray(rows[:, :d].T, np.float32)
    columns[0] = rows[:, -1]
    return columns


def quadratics(mean: Array, covariance: Array) -> Array:
    """``quadratic`` of :class:`Weights`, of n Gaussians with means (n, d) and packed covariances: (n, width − 1)."""
    second = (gaussian.outer(mean) + covariance) * _twice(mean.shape[1])
    return np.concatenate([second, 2 * mean, np.ones((len(mean), 1))], axis=1)


def moved(user: Weights, mean: float, variance: float) -> Weights:
    """The user's weights with something more in every h, of this mean and variance; the variance is in the intercept's."""
    quadratic = user.quadratic.copy()
    quadratic[0] += variance
    return user._replace(quadratic=quadratic, offset=user.offset + mean)


def covariance_of(user: Weights) -> Array:
    """The packed covariance (d(d+1)/2,): definite also where a large mean leaves only rounding of the difference."""
    d = len(user.mean)
    covariance = user.quadratic[: gaussian.packed_length(d)] / _twice(d) - gaussian.outer(user.mean[None])[0]
    covariance[_twice(d) == 1.0] += 4 * d * np.finfo(float).eps * user.mean**2  # more than an entry is off by, d times
    return covariance


def belief(rows: Array, user: Weights | Several) -> tuple[Array, Array]:
    """Mean and variance of h of every row (n, width) for the user, (n,) each; of m users with n rows each, (m, n)."""
    known = np.matvec(rows[..., : user.mean.shape[-1]], user.mean)
    variance = np.matvec(rows[..., :-1], user.quadratic)
    variance -= known * known
    known += rows[..., -1]
    if user.offset is not None:
        known += user.offset
    return known, np.maximum(variance, 0.0, out=variance)


def score(rows: Array, user: Weights | Several, loss: Loss, noise: float) -> tuple[Array, Array]:
    """Prediction and standard deviation of a label about it, in label units, shaped as by :func:`belief`."""
    mean, variance = belief(rows, user)
    return loss.response(mean, variance), loss.deviation(mean, variance, noise)


def linear_scores(columns: Array, user: Weights) -> Array:
    """E[h] of all inputs but for what they have in common, single precision (n,)."""
    w = user.mean.astype(np.float32)
    w[0] = 1.0
    return w @ columns


def largest(scores: Array, k: int) -> np.ndarray:
    """Places of the min(k, n) largest finite entries of (n,), the best first.

    The k best are in the k groups of the largest maxima, and only those are looked through; with groups of √(n/k) both
    searches are small beside the scores themselves (as :mod:`mtl.recommend` has it for many users at once).
    """
    n = len(scores)
    size = int((n / k) ** 0.5)
    if size < 2:
        places = np.arange(n)
    else:
        # Group j is j, j + m, j + 2m, …: its maximum is one of elementwise maxima, the cheapest reduction there is.
        m = n // size
        maxima = scores[: m * size].reshape(size, m).max(0)
        best = np.argpartition(maxima, -k)[-k:]
        places = np.concatenate([(best + m * np.arange(size)[:, None]).ravel(), np.arange(m * size, n)])
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
