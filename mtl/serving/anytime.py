"""An input's features when there is no time to evaluate all of them: the others' conditional mean, and a variance to match.

Evaluating the functions of a new input x in full gives g(x) = (o − μ, f_1 … f_k), and the features are c = g + δ with the
learnt residual δ ~ N(0, S). Before, g is known as one of a population of inputs: jointly Gaussian, together with what
intermediate *stages* of the functions say, such as the first trees of an ensemble. Everything that is evaluated is
conditioned on (Bishop 2006, eq. 2.81 and 2.82), here one value at a time:

    m ← m + C_i (value − m_i)/C_ii        C ← C − C_i C_iᵀ/C_ii

What is left, N(m, C + S), is the belief of c that :class:`mtl.features.Features` and all that scores them want.

**What an evaluation is worth** is the variance of h = b + v·c, v = (1, w_1 … w_k), that it is expected to remove. By the law of
total variance that is the variance of E[h | value], and E[h | value] = E[b] + E[v]·m, for the weights do not depend on x. So
the worth of taking C to C' is

    E[v]ᵀ (C − C') E[v]

in which the covariance of w drops out: what the user's weights are unsure of, no evaluation tells. (It is not lost: the
variance that is reported counts it.) C' does not depend on the values, so the order can be made before any is known. Steps
are taken greedily by worth per cost, a step together with those that it needs. Greedy is not always best: two functions
that say something only together are found late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl import gaussian
from mtl.features import Features
from mtl.gaussian import Array

_ROUNDING = 1e-10  # of a value's first variance: what is left below it is nothing


@dataclass(frozen=True)
class Step:
    """One evaluation: a function, or a stage of one."""

    name: str
    reveals: tuple[int, ...]  # places in the joint of what it returns; none where it only prepares others
    after: tuple[int, ...] = ()  # places among the steps of those that it needs, each before this one


@dataclass(frozen=True)
class Population:
    """The joint belief of the m values of an input before any evaluation; the first d of them are g."""

    mean: Array  # (m,)
    covariance: Array  # C, (m, m)
    residual: Array  # S, (d, d)

    @classmethod
    def fit(cls, values: Array, residual: Array) -> Population:
        """From n inputs evaluated in full.

        Args:
            values: (n, m), g first and then what its stages say.
            residual: S, (d, d), of :attr:`mtl.prior.VectorPrior.covariance`; 0 where functions are certain.
        """
        mean = values.mean(0)
        left = values - mean
        return cls(mean, left.T @ left / max(len(values) - 1, 1), residual)

    @property
    def d(self) -> int:
        return len(self.residual)

    def of(self, n: int) -> Belief:
        """Of n inputs."""
        return Belief(np.tile(self.mean, (n, 1)), self.covariance, self.residual, np.diag(self.covariance))


@dataclass(frozen=True)
class Belief:
    """What is known of n inputs of which the same has been evaluated."""

    mean: Array  # (n, m)
    covariance: Array  # (m, m), the same for all
    residual: Array  # (d, d)
    at_first: Array  # (m,): variances before any evaluation

    def given(self, places: Sequence[int], values: Array) -> Belief:
        """With values (n, len(places)) evaluated."""
        mean, covariance = self.mean.copy(), self.covariance.copy()
        for column, i in enumerate(places):
            spread = covariance[i].copy()
            if spread[i] > _ROUNDING * self.at_first[i]:
                mean += np.outer(values[:, column] - mean[:, i], spread / spread[i])
                covariance -= np.outer(spread, spread / spread[i])
        for column, i in enumerate(places):
            # Known now; and one that others had told already says itself what rounding left of it.
            mean[:, i], covariance[i], covariance[:, i] = values[:, column], 0.0, 0.0
        return replace(self, mean=mean, covariance=covariance)

    def features(self, mu: float) -> Features:
        """Features by what is known, μ the centre of h: complete where all of g was evaluated."""
        d = len(self.residual)
        covariance = gaussian.pack((self.covariance[:d, :d] + self.residual)[None])
        return Features.of(self.mean[:, :d], np.tile(covariance, (len(self.mean), 1)), mu)


def order(steps: Sequence[Step], costs: Sequence[float], belief: Belief, w: Array) -> tuple[list[int], list[float]]:
    """Steps by worth per cost, and the variance of h by what is not evaluated: before the first, and after each of them.

    Args:
        costs: expected seconds of each step.
        w: E[w] of the user, (d,).
    """
    d = len(w)
    v = np.zeros(len(belief.covariance))
    v[:d] = w
    v[0] = 1.0
    covariance = belief.covariance.copy()
    places, left = list[int](), [float(v @ covariance @ v)]
    remaining = list(range(len(steps)))
    while remaining:
        single = _worth_of_each(covariance, belief.at_first, v)
        best, best_rate = [remaining[0]], -1.0
        for candidate in remaining:
            wanted = _with_needed(steps, candidate, remaining)
            revealed = [i for place in wanted for i in steps[place].reveals]
            if len(revealed) == 1:
                worth = single[revealed[0]]
            else:
                worth = float(v @ covariance @ v - v @ _without(covariance, revealed, belief.at_first) @ v)
            rate = worth / max(sum(costs[place] for place in wanted), 1e-9)
            if rate > best_rate:
                best, best_rate = wanted, rate
        for place in best:
            covariance = _without(covariance, steps[place].reveals, belief.at_first)
            places.append(place)
            left.append(max(float(v @ covariance @ v), 0.0))
            remaining.remove(place)
    return places, left


def _worth_of_each(covariance: Array, at_first: Array, v: Array) -> Array:
    """Of every value alone, (m,)."""
    variance = np.diag(covariance)
    told = variance > _ROUNDING * at_first
    return np.divide((covariance @ v) ** 2, variance, out=np.zeros(len(v)), where=told)


def _without(covariance: Array, revealed: Sequence[int], at_first: Array) -> Array:
    """What is left of it once the values ``revealed`` are known."""
    covariance = covariance.copy()
    for i in revealed:
        spread = covariance[i].copy()
        if spread[i] > _ROUNDING * at_first[i]:
            covariance -= np.outer(spread, spread / spread[i])
        covariance[i], covariance[:, i] = 0.0, 0.0
    return covariance


def _with_needed(steps: Sequence[Step], place: int, remaining: Sequence[int]) -> list[int]:
    """A step after those of the remaining ones that it needs."""
    needed = [
        step for before in steps[place].after if before in remaining for step in _with_needed(steps, before, remaining)
    ]
    return [*dict.fromkeys(needed), place]
