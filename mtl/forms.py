"""Model forms as (o, φ): which entries of the inputs' and the users' vectors are learnt, and which are attributes.

    h(x; u) = o(x) + b_u + Σ_j w_uj f_j(x)

| entry j | f_j(x) | w_uj | what it is |
|---|---|---|---|
| k of them | learnt | learnt | Shared Basis; with the identity oracle, matrix factorization |
| one an attribute of inputs | that attribute | learnt | Multilevel Regression: per-user effects |
| one a label of inputs | P(label given x) | learnt | supervised features (:mod:`mtl.supervised`) |
| one an attribute of users | learnt | that attribute | per-input effects (GLMix); the oracle's part of f_j crosses both (LASER) |

Nothing else knows of forms: each side's prior is wrapped so that given entries are certain (:class:`PartlyGiven`), and the
half-steps, the sums and the tables are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mtl import gaussian
from mtl.gaussian import Array, Posterior
from mtl.prior import Moments, VectorPrior


@dataclass(frozen=True)
class Given:
    """Entries ``places`` of a d-vector that are the attributes ``columns``."""

    d: int
    places: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @cached_property
    def learnt(self) -> np.ndarray:
        """The other entries."""
        return np.delete(np.arange(self.d), self.places)

    def of(self, attributes: Array) -> Array:
        """(n, p) → the given entries, (n, g)."""
        return attributes[:, list(self.columns)]

    def whole(self, learnt: Posterior, values: Array) -> Posterior:
        """Posteriors of the learnt entries, with the given ones (n, g) put in, certain."""
        n = len(values)
        mean = np.empty((n, self.d))
        mean[:, self.learnt], mean[:, list(self.places)] = learnt.mean, values
        covariance = np.zeros((n, gaussian.packed_length(self.d)))
        rows, columns = gaussian.triangle(len(self.learnt))
        covariance[:, gaussian.place(self.d)[self.learnt[rows], self.learnt[columns]]] = learnt.covariance
        return Posterior(mean, covariance, learnt.log_determinant)

    def part(self, whole: Posterior) -> Posterior:
        """The learnt entries of :meth:`whole`."""
        covariance = gaussian.block(whole.covariance, self.d, self.learnt)
        return Posterior(whole.mean[:, self.learnt], covariance, whole.log_determinant)

    def evidence(self, precision: Array, information: Array, values: Array) -> tuple[Array, Array]:
        """What the data say of the learnt entries, the given ones (n, g) known: packed (n, ·) and (n, d − g)."""
        full = gaussian.unpack(precision, self.d)[:, self.learnt][:, :, list(self.places)]
        known = np.einsum("nij,nj->ni", full, values)
        return gaussian.block(precision, self.d, self.learnt), information[:, self.learnt] - known


@dataclass(frozen=True)
class Form:
    """k learnt basis functions, then the inputs' attributes, then the users' attributes that are entries of φ and w."""

    k: int
    input_columns: tuple[int, ...] = ()  # of the encoded attributes of inputs: each user has a weight on them
    user_columns: tuple[int, ...] = ()  # of the encoded attributes of users: each input has a coefficient on them

    @property
    def d(self) -> int:
        """Length of w = [b, …] and of c = [o, …]."""
        return 1 + self.k + len(self.input_columns) + len(self.user_columns)

    @property
    def inputs(self) -> Given:
        first = 1 + self.k
        return Given(self.d, tuple(range(first, first + len(self.input_columns))), self.input_columns)

    @property
    def users(self) -> Given:
        return Given(self.d, tuple(range(self.d - len(self.user_columns), self.d)), self.user_columns)


def partly_given(learnt: VectorPrior, given: Given) -> VectorPrior:
    """The prior of one side: ``learnt``, of the entries that are not given."""
    return PartlyGiven(learnt, given) if given.places else learnt


@dataclass(frozen=True)
class PartlyGiven:
    """Vectors of which some entries are attributes, and the others have a prior of their own."""

    learnt: VectorPrior
    given: Given

    @property
    def covariance(self) -> Array:
        whole = np.zeros((self.given.d, self.given.d))
        whole[np.ix_(self.given.learnt, self.given.learnt)] = self.learnt.covariance
        return whole

    @property
    def counts(self) -> dict[str, int]:
        return self.learnt.counts

    def mean(self, attributes: Array) -> Array:
        mean = np.empty((len(attributes), self.given.d))
        mean[:, self.given.learnt] = self.learnt.mean(attributes)
        mean[:, list(self.given.places)] = self.given.of(attributes)
        return mean

    def conditional(self, precision: Array, information: Array, mean: Array, noise: float) -> Posterior:
        values = mean[:, list(self.given.places)]
        evidence = self.given.evidence(precision, information, values)
        return self.given.whole(self.learnt.conditional(*evidence, mean[:, self.given.learnt], noise), values)

    def conditional_mean(self, precision: Array, information: Array, mean: Array, noise: float) -> Array:
        evidence = self.given.evidence(precision, information, mean[:, list(self.given.places)])
        whole = mean.copy()
        whole[:, self.given.learnt] = self.learnt.conditional_mean(*evidence, mean[:, self.given.learnt], noise)
        return whole

    def posteriors(self, precision: Array, information: Array, attributes: Array, noise: float) -> Posterior:
        return self.conditional(precision, information, self.mean(attributes), noise)

    def moments(self, vectors: Posterior, attributes: Array) -> Moments:
        return self.learnt.moments(self.given.part(vectors), attributes)

    def learn(self, moments: Moments) -> PartlyGiven:
        return replace(self, learnt=self.learnt.learn(moments))

    def divergence(self, moments: Moments) -> float:
        return self.learnt.divergence(moments)

    def refit(self, precision: Array, information: Array, attributes: Array, noise: float) -> PartlyGiven:
        evidence = self.given.evidence(precision, information, self.given.of(attributes))
        return replace(self, learnt=self.learnt.refit(*evidence, attributes, noise))
