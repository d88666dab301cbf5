"""Implicit feedback: what was not chosen says something too, if little.

Where events are choices (clicks, plays, purchases, all of label 1), every pair of a user and an input, chosen or not, counts
as one more event of label 0 and a small weight w₀. The sums over all pairs are never made pair by pair (Hu, Koren & Volinsky
2008): all users have the same

    A₀ = w₀ Σ_x E[φφᵀ]      b₀ = −w₀ Σ_x E[oφ]          and all inputs the same     w₀ Σ_u E[w̃w̃ᵀ]

The zero of a pair stays when the pair has events, as in Rendle et al. 2022: what an event adds does not depend on whether it
was the first of its pair, and users' sums stay plain sums over events. In the terms of Hu et al. a pair of weight c has the
confidence w₀ + c and the preference c / (w₀ + c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl import gaussian
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.prior import VectorPrior, Wrapped


@dataclass(frozen=True)
class WithZeros(Wrapped):
    """The users' prior with the zeros of all inputs there were: data that every user has, beside the events of its own.

    Inputs that come after training have no zeros until the next one.
    """

    precision: Array  # A₀, packed (d(d+1)/2,)
    information: Array  # b₀, (d,)

    @classmethod
    def of(cls, prior: VectorPrior, features: Features, weight: float) -> WithZeros:
        """For the features of all inputs and w₀."""
        return cls(prior, weight * features.second_moment.sum(0), -weight * features.offset_phi.sum(0))

    def conditional(self, precision: Array, information: Array, mean: Array, noise: float) -> Posterior:
        return self.prior.conditional(precision + self.precision, information + self.information, mean, noise)

    def conditional_mean(self, precision: Array, information: Array, mean: Array, noise: float) -> Array:
        return self.prior.conditional_mean(precision + self.precision, information + self.information, mean, noise)


def without_zeros(prior: VectorPrior) -> VectorPrior:
    return prior.prior if isinstance(prior, WithZeros) else prior


def zeros_of(users: Posterior) -> Array:
    """Σ_u E[w̃w̃ᵀ] with w̃ = [1, w_u], packed (e(e+1)/2,): what a zero of weight 1 of each of the users says to an input."""
    mean = np.column_stack([np.ones(len(users.mean)), users.mean])
    second = gaussian.pack(mean.T @ mean)
    second[mean.shape[1] :] += users.covariance.sum(0)  # past the first row of the triangle: w̃₀ = 1 is certain
    return second
