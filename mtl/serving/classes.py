"""Equivalence classes of inputs: one evaluation of the features serves a whole class, with a bound on what that costs.

A class function maps the encoded attributes of an input to the key of its class. The coarser it is, the more inputs share
a key, the more requests the feature cache answers, and the further the features of the input that happened to be evaluated
(the class's representative r) are from those of the input that was asked for.

**The bound.** With c(x) = (o(x), f_1(x) … f_k(x)) and v = (1, w_1 … w_k), h(x; u) = b + v·c(x). For the members of a class that
were evaluated once (:class:`Extents`), the box of their coordinates, low ≤ c ≤ high, and the ball that holds them,
‖s∘(c − m)‖ ≤ R about their mean m with s a scale per coordinate, give by hand and by Cauchy–Schwarz

    Σ min(v_i low_i, v_i high_i) ≤ v·c(x) ≤ Σ max(v_i low_i, v_i high_i)        |v·(c(x) − m)| ≤ ‖v/s‖ R

Both hold, so h(x) lies in the intersection [h₋, h₊], and |h(x) − h(r)| ≤ max(h₊ − h(r), h(r) − h₋), whichever r is. The bound
is on h at the user's mean weights. Predictions that are no more than h depend on its variance too, which among inputs evaluated
in full differs by φᵀΣφ alone, Σ the covariance of w; ‖Σ^½φ‖ is that of m within √(Σ_i≥1 Σ_ii/s_i²)·R. A response σ that is
monotone in either has its extremes in the corners of the two intervals.

**An input that was not measured** has no such certainty, for its features are what nobody evaluated. If it is exchangeable with
the n measured members, h(x) is beyond all of theirs, and so possibly outside [h₋, h₊], with a chance of at most 2/(n+1) for any
user whose weights do not depend on them (of n+1 exchangeable numbers, each is the largest, or the smallest, with equal
chance). :meth:`Extents.chance` is that number: 1 for a class that was never measured, whose bound is infinite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import msgspec
import numpy as np

from mtl.features import Features
from mtl.gaussian import Array

_DIGEST = 16  # bytes: two of 10¹² inputs meet with a chance of 10⁻¹⁵


class ClassFunction(Protocol):
    def __call__(self, attributes: Array) -> list[bytes]:
        """Keys of the classes of encoded attributes (n, p), of 16 bytes each."""


def of_attributes(attributes: Mapping[str, Any]) -> bytes:
    """The key of the exact class by attributes as they came: nothing need be encoded to find what is cached."""
    return hashlib.blake2b(msgspec.msgpack.encode(attributes, order="sorted"), digest_size=_DIGEST).digest()


@dataclass(frozen=True)
class Exact:
    """A class per distinct row of attributes."""

    def __call__(self, attributes: Array) -> list[bytes]:
        return _keys(_digest("exact"), np.asarray(attributes, float) + 0.0)  # −0 is 0


@dataclass(frozen=True)
class Rounded:
    """A class per cell of a grid: every attribute to the nearest multiple of a step."""

    step: float  # units of the encoded attributes: standard deviations, for numbers

    def __call__(self, attributes: Array) -> list[bytes]:
        return _keys(_digest("rounded", self.step), _whole(attributes / self.step + 0.5))


@dataclass(frozen=True)
class Hashed:
    """A class per cell of random projections: inputs that are near share one with a chance that falls with their distance.

    Source: Datar, Immorlica, Indyk & Mirrokni 2004, the 2-stable scheme: ⌊(a·z + b)/r⌋ for each of m Gaussian a.
    """

    width: float  # r, in units of distance between encoded attributes
    projections: Array  # (p, m)
    shifts: Array  # (m,), of [0, 1)

    @classmethod
    def draw(cls, p: int, width: float, m: int = 8, seed: int = 0) -> Hashed:
        random = np.random.default_rng(seed)
        return cls(width, random.normal(size=(p, m)), random.uniform(size=m))

    def __call__(self, attributes: Array) -> list[bytes]:
        cells = _whole(attributes @ self.projections / self.width + self.shifts)
        return _keys(self._name, cells)

    @cached_property
    def _name(self) -> bytes:
        return _digest("hashed", self.width, self.projections, self.shifts)


@dataclass(frozen=True)
class Clustered:
    """A class per centre of k-means: the nearest one's."""

    centres: Array  # (m, p)

    @classmethod
    def fit(cls, attributes: Array, m: int, seed: int = 0) -> Clustered:
        """k-means++ and Lloyd's iterations over attributes (n, p); at most n centres."""
        # scikit-learn takes a second to import, and no request needs it.
        from sklearn.cluster import KMeans

        distinct = len(np.unique(attributes, axis=0))
        return cls(KMeans(min(m, distinct), n_init=1, random_state=seed).fit(attributes).cluster_centers_)

    def __call__(self, attributes: Array) -> list[bytes]:
        # ‖z − c‖² without ‖z‖², which is the same for all c.
        distance = np.sum(self.centres**2, 1) - 2 * attributes @ self.centres.T
        return _keys(self._name, distance.argmin(1)[:, None].astype(np.int64))

    @cached_property
    def _name(self) -> bytes:
        return _digest("clustered", self.centres)


@dataclass(frozen=True)
class Extents:
    """Where the measured members of each class are in feature space; immutable, so that threads may share it."""

    place: dict[bytes, int]  # of a class among the rows below
    members: np.ndarray  # (classes,)
    low: Array  # (classes, d), of c = (o, f_1 … f_k)
    high: Array
    centre: Array
    radius: Array  # (classes,), in units of scale∘c
    scale: Array  # s, (d,)

    @classmethod
    def measure(cls, keys: Sequence[bytes], features: Features, scale: Array | None = None) -> Extents:
        """Of classes by their members.

        Args:
            keys: the class of each of n inputs.
            features: of the same inputs, evaluated.
            scale: s, (d,), the size of the weights on c; the bound is tightest where it is that of a user's. 1 by default.
        """
        c = vectors(features)
        scale = np.ones(c.shape[1]) if scale is None else np.asarray(scale, float)
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        row = np.fromiter((place[key] for key in keys), np.intp, len(keys))
        order = np.argsort(row, kind="stable")
        members = np.bincount(row, minlength=len(place))
        starts = np.concatenate([[0], np.cumsum(members)[:-1]]).astype(np.intp)
        low, high, total = (ufunc.reduceat(c[order], starts) for ufunc in (np.minimum, np.maximum, np.add))
        centre = total / members[:, None]
        distance = np.linalg.norm((c - centre[row]) * scale, axis=1)
        return cls(place, members, low, high, centre, np.maximum.reduceat(distance[order], starts), scale)

    def range(self, keys: Sequence[bytes], w: Array) -> tuple[Array, Array]:
        """The least and the most that h of a measured member of each class can be, (n,) both; infinite where none is.

        Args:
            w: the user's mean weights (b, w_1 … w_k), (d,).
        """
        row, known = self._rows(keys)
        v = w.copy()
        v[0] = 1.0
        to_low, to_high = v * self.low[row], v * self.high[row]
        middle, reach = self.centre[row] @ v, float(np.linalg.norm(v / self.scale)) * self.radius[row]
        low = np.maximum(np.minimum(to_low, to_high).sum(1), middle - reach)
        high = np.minimum(np.maximum(to_low, to_high).sum(1), middle + reach)
        return np.where(known, low + w[0], -np.inf), np.where(known, high + w[0], np.inf)

    def bound(self, keys: Sequence[bytes], w: Array, h: Array) -> Array:
        """The most by which h of a measured member can differ from that of the representative, h (n,): (n,)."""
        low, high = self.range(keys, w)
        return np.maximum(high - h, h - low)

    def spread(self, keys: Sequence[bytes], covariance: Array) -> tuple[Array, Array]:
        """The least and the most that φᵀΣφ of a measured member of each class can be, (n,) both; 0 and infinite where none is.

        Args:
            covariance: Σ of the user's weights, (d, d).
        """
        row, known = self._rows(keys)
        centre = self.centre[row]
        centre[:, 0] = 1.0
        middle = np.sqrt(np.einsum("ni,ij,nj->n", centre, covariance, centre))
        reach = np.sqrt(np.sum(np.diag(covariance)[1:] / self.scale[1:] ** 2)) * self.radius[row]
        low, high = np.maximum(middle - reach, 0.0) ** 2, (middle + reach) ** 2
        return np.where(known, low, 0.0), np.where(known, high, np.inf)

    def chance(self, keys: Sequence[bytes]) -> Array:
        """The most that the chance can be of the bound failing for an input that was not measured, (n,)."""
        row, known = self._rows(keys)
        return np.where(known, np.minimum(2 / (self.members[row] + 1), 1.0), 1.0)

    def _rows(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        row = np.fromiter((self.place.get(key, -1) for key in keys), np.intp, len(keys))
        return row, row >= 0


def vectors(features: Features) -> Array:
    """c = (o, f_1 … f_k) of inputs, (n, d), by their means."""
    return np.column_stack([features.offset, features.phi[:, 1:]])


def _whole(values: Array) -> np.ndarray:
    return np.floor(values).astype(np.int64)


def _digest(kind: str, *of: float | Array) -> bytes:
    """What tells a class function from all others, so that classes of several share one cache."""
    return hashlib.blake2b(kind.encode() + b"".join(np.asarray(part, float).tobytes() for part in of)).digest()


def _keys(name: bytes, rows: np.ndarray) -> list[bytes]:
    own = hashlib.blake2b(name, digest_size=_DIGEST)
    keys = []
    for row in np.ascontiguousarray(rows):
        of = own.copy()
        of.update(row)
        keys.append(of.digest())
    return keys
