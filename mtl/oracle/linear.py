"""The linear oracle where no residual joins it: weighted ridge regression in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl.gaussian import Array
from mtl.prior import COEFFICIENT_PRECISION


@dataclass(frozen=True)
class Linear:
    """z ↦ z·β."""

    coefficients: Array  # (p,)

    def predict(self, attributes: Array) -> Array:
        return attributes @ self.coefficients


def fit_ridge(attributes: Array, target: Array, weight: Array) -> Linear:
    """β = (ZᵀCZ + ρc̄I)⁻¹ ZᵀCt, with c̄ the mean weight: the ridge counts for ρ average rows."""
    weighted = attributes * weight[:, None]
    gram = attributes.T @ weighted + COEFFICIENT_PRECISION * weight.mean() * np.eye(attributes.shape[1])
    return Linear(np.linalg.solve(gram, weighted.T @ target))
