"""Exploration: which input to show, and which model version to ask, with the chance of every choice on record.

A policy gives the distribution that a choice is drawn from, and the chance of what was drawn (its *propensity*) is logged with
it, for without it no later estimate of another policy is right (:mod:`mtl.serving.offpolicy`). It is exact for every policy
here:

- ε-greedy and LinUCB: ε/n for each of the n candidates, and 1 − ε more for the best.
- Thompson: M weight vectors are drawn, each has its best candidate, and the choice is that of one of the M at random. That is a
  draw of Thompson sampling, no more and no less; and given the M draws, the share of them with the same best candidate is its
  exact chance. So the logged number is not an estimate, and an inverse-propensity estimate from it is unbiased but for
  candidates whose share is 0: one that Thompson sampling would choose with chance p has none with chance (1 − p)^M, and
  its part of the estimate is short by that factor. An ε gives every candidate a chance and removes that.

LinUCB without ε chooses one candidate for certain: no other policy can be estimated from its log.

Versions compete for rewards in [0, 1]. What a version policy remembers (:class:`Rewards`) are sums, so that those of several
server processes add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import softmax

from mtl import gaussian
from mtl.errors import InputError
from mtl.features import Features
from mtl.gaussian import Array
from mtl.working import belief

Random = np.random.Generator


class Decision(NamedTuple):
    """What was drawn, and the chance that it had."""

    place: int  # among the candidates, or the versions
    propensity: float


def draw(distribution: Array, random: Random) -> Decision:
    """One place of a distribution (n,)."""
    place = int(np.searchsorted(np.cumsum(distribution), random.random() * distribution.sum(), side="right"))
    place = min(place, int(np.flatnonzero(distribution)[-1]))  # where rounding leaves the sum below the draw
    return Decision(place, float(distribution[place]))


@dataclass(frozen=True)
class Candidates:
    """What is believed of n inputs for one user."""

    w: Array  # E[w], (d,)
    covariance: Array  # of w, (d, d)
    features: Features  # of the n inputs

    def moments(self) -> tuple[Array, Array]:
        """Mean and variance of h, (n,) each: the noise of a label is no part of it."""
        n = len(self.features)
        second = np.tile(gaussian.pack((self.covariance + np.outer(self.w, self.w))[None]), (n, 1))
        return belief(np.tile(self.w, (n, 1)), second, self.features)

    def draws(self, m: int, random: Random) -> Array:
        """h of all candidates under m draws of the user's weights, (m, n).

        Candidates share a draw of w. What is uncertain of an input itself is drawn for each, with the variance that it adds.
        """
        phi = self.features.phi
        mean, variance = self.moments()
        root = np.linalg.cholesky(self.covariance + 1e-12 * np.trace(self.covariance) * np.eye(len(self.w)))
        of_weights = random.normal(size=(m, len(self.w))) @ (phi @ root).T
        own = np.maximum(variance - np.einsum("ni,ij,nj->n", phi, self.covariance, phi), 0.0)
        return mean + of_weights + np.sqrt(own) * random.normal(size=(m, len(phi)))


class Policy(Protocol):
    """Among inputs; h is what is to be large."""

    def distribution(self, candidates: Candidates, random: Random) -> Array:
        """Chances of the n candidates, (n,)."""


@dataclass(frozen=True)
class EpsilonGreedy:
    """The best mean, and a candidate at random with chance ε."""

    epsilon: float

    def distribution(self, candidates: Candidates, random: Random) -> Array:
        return _mostly(int(candidates.moments()[0].argmax()), len(candidates.features), self.epsilon)


@dataclass(frozen=True)
class LinUCB:
    """The best mean + α standard deviations of h, and a candidate at random with chance ε.

    Source: Li, Chu, Langford & Schapire 2010, algorithm 1, with the learnt prior in place of the identity.
    """

    alpha: float
    epsilon: float = 0.0

    def distribution(self, candidates: Candidates, random: Random) -> Array:
        mean, variance = candidates.moments()
        best = int(np.argmax(mean + self.alpha * np.sqrt(variance)))
        return _mostly(best, len(candidates.features), self.epsilon)


@dataclass(frozen=True)
class Thompson:
    """Each candidate with the chance that it is the best, and a candidate at random with chance ε.

    Source: Agrawal & Goyal 2013, with the posterior that is; propensities as in the module's docstring.
    """

    draws: int = 200  # M
    epsilon: float = 0.0

    def distribution(self, candidates: Candidates, random: Random) -> Array:
        shares = _shares(candidates.draws(self.draws, random))
        return (1 - self.epsilon) * shares + self.epsilon / len(shares)


def _mostly(best: int, n: int, epsilon: float) -> Array:
    distribution = np.full(n, epsilon / n)
    distribution[best] += 1 - epsilon
    return distribution


def _shares(values: Array) -> Array:
    """How often each column of (m, n) is the largest of its row, (n,)."""
    return np.bincount(values.argmax(1), minlength=values.shape[1]) / len(values)


@dataclass(frozen=True)
class Rewards:
    """Sums over the decisions whose reward is known, by version."""

    n: Array  # (versions,)
    total: Array  # Σ r
    weighted: Array  # Σ r/p, p the propensity, over decisions that another version might have had: p < 1

    @classmethod
    def none(cls, versions: int) -> Rewards:
        return cls(np.zeros(versions), np.zeros(versions), np.zeros(versions))

    @classmethod
    def one(cls, versions: int, decision: Decision, reward: float) -> Rewards:
        """Of one decision.

        A version that decided alone is not known to be better for it: the weighted sums, which compare versions that might all
        have decided, leave it out. It is a sample of the version's mean reward all the same.

        Raises:
            InputError: the reward is not in [0, 1].
        """
        if not is_reward(reward):
            raise InputError(f"a reward of {reward}: one in [0, 1] is wanted, 1 the best that there is")
        of = np.zeros(versions)
        of[decision.place] = 1.0
        weight = 1 / decision.propensity if decision.propensity < 1 else 0.0
        return cls(of, reward * of, reward * weight * of)

    def __add__(self, other: Rewards) -> Rewards:
        return Rewards(self.n + other.n, self.total + other.total, self.weighted + other.weighted)


def is_reward(value: float) -> bool:
    """Whether versions can be told of it."""
    return 0 <= value <= 1


class VersionPolicy(Protocol):
    def choose(self, rewards: Rewards, random: Random) -> Decision:
        """A version for this request."""


@dataclass(frozen=True)
class Exp3:
    """Holds against rewards that change over time, or against someone who changes them; slower than Thompson's where none does.

    Source: Auer, Cesa-Bianchi, Freund & Schapire 2002, figure 1.
    """

    gamma: float = 0.05  # part of the requests that goes to all versions alike

    def choose(self, rewards: Rewards, random: Random) -> Decision:
        m = len(rewards.n)
        return draw((1 - self.gamma) * softmax(self.gamma * rewards.weighted / m) + self.gamma / m, random)


@dataclass(frozen=True)
class ThompsonVersions:
    """Each version with the chance that its mean reward is the largest, under Beta(1 + Σr, 1 + Σ(1 − r)).

    Exact for rewards 0 and 1, and wider than it need be for those between.
    """

    draws: int = 200

    def choose(self, rewards: Rewards, random: Random) -> Decision:
        shape = self.draws, len(rewards.n)
        return draw(_shares(random.beta(1 + rewards.total, 1 + rewards.n - rewards.total, shape)), random)


@dataclass(frozen=True)
class FixedSplit:
    """A/B: a user has the same version at every request, by a hash of its id; the propensity is the version's share."""

    shares: Sequence[float]
    salt: str = ""  # of the experiment: another one deals the users anew

    def choose(self, user: str) -> Decision:
        digest = hashlib.blake2b(f"{self.salt}\0{user}".encode(), digest_size=8).digest()
        at = int.from_bytes(digest, "big") / 2**64
        shares = np.asarray(self.shares, float) / sum(self.shares)
        place = min(int(np.searchsorted(np.cumsum(shares), at, side="right")), len(shares) - 1)
        return Decision(place, float(shares[place]))
