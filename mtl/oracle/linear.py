"""The linear oracle: weighted ridge regression in closed form, from rows or from sums that add across partitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl.basis import check_told, line_search
from mtl.gaussian import Array
from mtl.prior import COEFFICIENT_PRECISION
from mtl.regressors import Linear


def fit_ridge(attributes: Array, target: Array, weight: Array) -> Linear:
    """β = (ZᵀCZ + ρc̄I)⁻¹ ZᵀCt, with c̄ the mean weight: the ridge counts for ρ average rows."""
    weighted = attributes * weight[:, None]
    gram = attributes.T @ weighted + COEFFICIENT_PRECISION * weight.mean() * np.eye(attributes.shape[1])
    return Linear(np.linalg.solve(gram, weighted.T @ target))


@dataclass(frozen=True)
class NormalEquations:
    """Sums over inputs from which all d basis functions are fitted in turn; see :class:`mtl.basis.OracleBasis` for W, v."""

    second: Array  # Σ W[i,j] z zᵀ, (d, d, p, p)
    first: Array  # Σ v[i] z, (d, p)
    weight: Array  # Σ W[i,i], (d,)
    told: Array  # inputs with W[i,i] > 0, (d,)

    @classmethod
    def of(cls, W: Array, v: Array, attributes: Array) -> NormalEquations:
        second = np.einsum("nij,np,nq->ijpq", W, attributes, attributes, optimize=True)
        weight = np.einsum("nii->ni", W)
        return cls(second, v.T @ attributes, weight.sum(0), (weight > 0).sum(0).astype(float))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.second + other.second, self.first + other.first, self.weight + other.weight, self.told + other.told
        )

    def solve(self, functions: Sequence[Linear]) -> tuple[Linear, ...]:
        """Each function that is told of once, given the others: what a cycle of :func:`fit_ridge` over the rows gives.

        Raises:
            OracleError: none is.
        """
        check_told(self.told)
        d, p = self.first.shape
        coefficients = np.array([f.coefficients for f in functions]) if functions else np.zeros((d, p))
        for i in np.flatnonzero(self.told).tolist():
            others = np.einsum("jpq,jq->p", self.second[i], coefficients) - self.second[i, i] @ coefficients[i]
            wanted = self.first[i] - others
            ridge = COEFFICIENT_PRECISION * self.weight[i] / self.told[i] * np.eye(p)
            direction = np.linalg.solve(self.second[i, i] + ridge, wanted) - coefficients[i]
            slope = float((wanted - self.second[i, i] @ coefficients[i]) @ direction)
            step = line_search(slope, float(direction @ self.second[i, i] @ direction))
            coefficients[i] += step * direction
        return tuple(map(Linear, coefficients))
