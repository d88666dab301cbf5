"""Who acted on what, as attributes of users and inputs: the leading singular vectors of the events' pattern.

M (users, inputs) is 1 where the training events hold the pair, d_u and d_x are its row and column sums, and

    N = D_u^{-1/2} M D_x^{-1/2} = Σ_j σ_j u_j v_jᵀ,      1 = σ_0 ≥ σ_1 ≥ …

The first pair is √d_u, √d_x up to scale: it says only who is active and is taken out beforehand. The entries of the others
grow with the square root of an input's events, so that one seen rarely stays near 0, the average; labels are not looked at.
As attributes they have standard deviations in proportion to σ_j, so that a prior shrinks what is nearly noise more: on
MovieLens-100K (mean of u2…u5, a ridge worth 60 rows, a noise for each user) RMSE is 0.8726 so, and 0.8764 with all of
variance 1.

Users stay where they are: an iteration sends V (inputs, b) to the partitions and sums their N_bᵀN_bV (:class:`Step`), and
u_j = N v_j / σ_j is computed where a user's events are (:meth:`Spectral.of_users`). The subspace is found by Chebyshev
filtering (Zhou, Saad, Tiago and Chelikowsky 2006): each filter is a polynomial in NᵀN that grows fastest above the smallest
Ritz value at hand. A pass costs 2b multiplications an event, whatever k is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from mtl.blocks import EventBlock
from mtl.gaussian import Array

MAX_DIMENSIONS = 40
LARGEST_DEVIATION = 0.2  # of the first column: with a prior on coefficients worth 5 rows, small is shrunk more

_SPARE = 12  # columns beside the wanted ones: they set how far apart the two ends of the filter are
_CYCLES = 2
_DEGREE = 3  # passes of a cycle
_SETTLED = 1e-4  # largest change of a singular value, relative, in the last cycle
_SMALLEST = 1e-6  # σ below which a vector is rounding
_NARROWEST = 1e-3  # least upper end of what a filter damps, of σ_1²: it also bounds what it amplifies


@dataclass(frozen=True)
class Sums:
    """What a block of users adds to: rows ``seen`` of a product, and totals over its users."""

    seen: np.ndarray  # catalogue indices
    product: Array  # (seen, b)
    total: Array  # Σ over users of their rows of N V, (b,)
    n_users: int  # with events


Work = Callable[[EventBlock], Sums]
Pass = Callable[[Work], Iterable[Sums]]
"""Does the work on every block, wherever it is."""


@dataclass(frozen=True)
class Degrees:
    """Column sums d_x of the pattern, as a product of one column."""

    def __call__(self, block: EventBlock) -> Sums:
        pattern = block.pattern
        counts = np.bincount(pattern.indices, minlength=len(block.inputs)).astype(float)
        return Sums(block.inputs, counts[:, None], np.zeros(1), int(np.sum(np.diff(pattern.indptr) > 0)))


@dataclass(frozen=True)
class Step:
    """NᵀN V from the users of one block."""

    scaled: Array  # D_x^{-1/2} V, (inputs, b)

    def __call__(self, block: EventBlock) -> Sums:
        scaled = self.scaled[block.inputs]
        product, total, n_users = np.zeros_like(scaled), np.zeros(scaled.shape[1]), 0
        for users in block.parts():
            pattern = normalized(block, users)
            rows = pattern @ scaled
            product += pattern.T @ rows  # D_x^{-1/2} on the left is the driver's
            total += rows.sum(0)
            n_users += int(np.sum(np.diff(pattern.indptr) > 0))
        return Sums(block.inputs, product, total, n_users)


@dataclass(frozen=True)
class Spectral:
    """The embedding of both sides, with mean 0 over those with events and deviations in proportion to σ; 0 for those without."""

    values: Array  # σ, descending, (m,)
    inputs: Array  # (inputs, m)
    projection: Array  # D_x^{-1/2} V Σ⁻¹ in the users' scale, (inputs, m)
    user_centre: Array  # (m,)

    @property
    def dimensions(self) -> int:
        return len(self.values)

    def of_inputs(self) -> Array:
        return self.inputs

    def of_users(self, block: EventBlock, users: slice) -> Array:
        """Rows of the block's users, (users, m)."""
        pattern = normalized(block, users)
        active = np.diff(pattern.indptr) > 0
        return np.where(active[:, None], pattern @ self.projection[block.inputs] - self.user_centre, 0.0)


def fit(each_block: Pass, n_inputs: int, dimensions: int | None = None, cycles: int = _CYCLES) -> Spectral:
    """The embedding of the events that θ is trained on.

    Args:
        each_block: does a work on every block of users.
        n_inputs: in the catalogue.
        dimensions: m; None for as many as stand out of noise (:func:`noise_edge`), at most MAX_DIMENSIONS. There are never
            more than the pattern has, and with none the embedding is (n, 0).
        cycles: of ``_DEGREE`` passes at most, after the first pass.
    """
    degrees, _, n_users = _sum(each_block, Degrees(), n_inputs, 1)
    degrees = degrees[:, 0]
    active = degrees > 0
    wanted = min(MAX_DIMENSIONS if dimensions is None else dimensions, n_users - 1, int(active.sum()) - 1)
    edge = noise_edge(n_users, int(active.sum()), degrees.sum()) if dimensions is None else _SMALLEST
    if wanted < 1 or edge >= 1:
        return Spectral(np.empty(0), np.empty((n_inputs, 0)), np.empty((n_inputs, 0)), np.empty(0))
    inverse_root = np.where(active, 1 / np.sqrt(np.maximum(degrees, 1)), 0.0)[:, None]
    trivial = np.sqrt(degrees / degrees.sum())[:, None]

    def apply(V: Array) -> tuple[Array, Array]:
        """NᵀN V without the trivial pair, and the users' totals of N V; V is orthogonal to that pair."""
        product, total, _ = _sum(each_block, Step(inverse_root * V), n_inputs, V.shape[1])
        product *= inverse_root
        return product - trivial @ (trivial.T @ product), total

    def ritz(V: Array) -> tuple[Array, Array, Array, Array]:
        """V rotated to Ritz vectors in an orthonormal basis of its span, with NᵀN V, the values σ² and the totals."""
        V = np.linalg.qr(V - trivial @ (trivial.T @ V))[0]
        product, total = apply(V)
        squares, rotation = np.linalg.eigh(V.T @ product)
        rotation = rotation[:, ::-1]
        return V @ rotation, product @ rotation, np.maximum(squares[::-1], 0.0), total @ rotation

    width = min(wanted + _SPARE, n_users - 1, int(active.sum()) - 1)
    start = np.random.default_rng(0).normal(size=(n_inputs, width)) * active[:, None]
    V, product, squares, total = ritz(start)
    for _ in range(cycles):
        if squares[0] <= _SMALLEST**2:
            break  # everyone with events acted on everything
        before, cut = squares, max(float(squares[-1]), _NARROWEST * float(squares[0]))
        # T_j of 2G/cut − I: at most 1 on [0, cut], and growing as fast as a polynomial can above it.
        older, V = V, 2 / cut * product - V
        for _ in range(_DEGREE - 1):
            older, V = V, 2 * (2 / cut * apply(V)[0] - V) - older
        V, product, squares, total = ritz(V)
        if np.all(np.abs(squares[:wanted] - before[:wanted]) <= 2 * _SETTLED * squares[:wanted]):
            break
    kept = np.sqrt(squares[:wanted])
    kept = kept[kept > max(edge, _SMALLEST)]
    m = len(kept)
    V, mean = V[:, :m] * _signs(V[:, :m]), total[:m] * _signs(V[:, :m]) / kept / n_users
    deviation = np.sqrt(np.maximum(1 - n_users * mean**2, _SMALLEST) / n_users)  # Σ u² = 1
    wanted_deviation = LARGEST_DEVIATION * kept / kept[:1]
    inputs = np.zeros((n_inputs, m))
    inputs[active] = (V[active] - V[active].mean(0)) / V[active].std(0) * wanted_deviation
    scale = wanted_deviation / deviation
    return Spectral(kept, inputs, inverse_root * V / kept * scale, mean * scale)


def noise_edge(n_users: int, n_inputs: int, n_events: float) -> float:
    """The largest σ to expect of events that pair users and inputs by their degrees alone.

    The entries of N − √d_u√d_xᵀ/n have variance about 1/n, so that it is (√users + √inputs)/√n (Bai and Yin 1988).
    """
    return float((np.sqrt(n_users) + np.sqrt(n_inputs)) / np.sqrt(n_events))


def normalized(block: EventBlock, users: slice) -> sp.csr_matrix:
    """D_u^{-1/2} M of some users of a block, (users, inputs seen)."""
    pattern = block.pattern[users]
    counts = np.diff(pattern.indptr)
    pattern.data = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts)
    return pattern


def _sum(each_block: Pass, work: Work, n_inputs: int, width: int) -> tuple[Array, Array, int]:
    product, total, n_users = np.zeros((n_inputs, width)), np.zeros(width), 0
    for said in each_block(work):
        product[said.seen] += said.product
        total += said.total
        n_users += said.n_users
    return product, total, n_users


def _signs(vectors: Array) -> Array:
    """±1 for each column, so that its largest entry is positive: a rotation must not depend on LAPACK."""
    return np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])])
