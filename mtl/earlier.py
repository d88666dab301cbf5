"""Informative priors: what earlier events said, as Gaussians, for a training on later events alone.

The posteriors of a version's training are the priors of the next one's (Bayesian updating; in this approximation streaming
variational Bayes, Broderick et al. 2013). Less what the learnt priors say, which goes on being learnt, they are *evidence*

    P = V⁻¹ − S⁻¹        h = V⁻¹ m − S⁻¹ (prior mean)

of an input with posterior N(m, V) under a prior of covariance S. Of a user it is A/σ² and b/σ² of the earlier events under
the features that the earlier version had. Where the later features are those, what comes out is what training on all events
would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtl import gaussian
from mtl.gaussian import Array, Posterior

if TYPE_CHECKING:
    from mtl.forms import Given


@dataclass(frozen=True)
class Evidence:
    """hᵀv − ½ vᵀPv of each of n vectors v."""

    precision: Array  # P, packed (n, d(d+1)/2)
    information: Array  # h, (n, d)

    @classmethod
    def none(cls, n: int, d: int) -> Evidence:
        return cls(np.zeros((n, gaussian.packed_length(d))), np.zeros((n, d)))

    @classmethod
    def of(cls, vectors: Posterior, prior_mean: Array, covariance: Array, given: Given) -> Evidence:
        """Of posteriors (n, d) under priors N(prior_mean, covariance), in the entries that are not given.

        Raises:
            numpy.linalg.LinAlgError: a covariance is not positive definite.
        """
        found = cls.none(*vectors.mean.shape)
        learnt = given.part(vectors)
        d, before = learnt.mean.shape[1], np.linalg.inv(covariance[np.ix_(given.learnt, given.learnt)])
        rows, columns = gaussian.triangle(d)
        places = gaussian.place(given.d)[given.learnt[rows], given.learnt[columns]]
        for part in gaussian.parts(len(learnt.mean), d):
            now, _ = gaussian.inverse(learnt.covariance[part], d)
            mean, prior = learnt.mean[part], prior_mean[part][:, given.learnt]
            found.precision[part, places] = now - gaussian.pack(before)
            told = np.einsum("nij,nj->ni", gaussian.unpack(now, d), mean) - prior @ before
            found.information[part.start : part.stop, given.learnt] = told
        return found

    def take(self, which: slice | np.ndarray) -> Evidence:
        return Evidence(self.precision[which], self.information[which])

    def beside(self, precision: Array, information: Array, noise: float) -> tuple[Array, Array]:
        """Sums of later events, packed (n, ·) and (n, d), with this."""
        return precision + noise * self.precision, information + noise * self.information

    def energy(self, vectors: Posterior) -> float:
        """Σ E[½ vᵀPv − hᵀv], the part of the objective (nats)."""
        second = vectors.covariance + gaussian.outer(vectors.mean)
        told = gaussian.inner(self.precision, second, vectors.mean.shape[1]).sum() / 2
        return float(told - np.sum(self.information * vectors.mean))
