"""What all users share of an input: o(x), φ(x) and their second moments, one row an input.

With h(x; u) = o(x) + w_u·φ(x) and an input known as a Gaussian over (o, f_1…f_k), a user's data enter only through
E[o], E[φ], E[φφᵀ] and E[oφ] (design, section 2): the *features* of the input, computed once and added per event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mtl import gaussian, schema
from mtl.arrow import lists, matrix
from mtl.gaussian import Array, Posterior


@dataclass(frozen=True)
class Features:
    """Features of n inputs, with φ of length d (:mod:`mtl.forms`) and first entry 1."""

    offset: Array  # E[o], (n,), the mean label included
    phi: Array  # E[φ], (n, d)
    second_moment: Array  # E[φφᵀ], packed (n, d(d+1)/2)
    offset_phi: Array  # E[oφ], (n, d)
    offset_variance: Array  # Var[o], (n,)

    @classmethod
    def of(cls, mean: Array, covariance: Array, mu: float) -> Features:
        """From the posteriors of (o − μ, f_1…f_k): mean (n, d) and packed covariance (n, d(d+1)/2)."""
        d = mean.shape[1]
        phi = mean.copy()
        phi[:, 0] = 1.0
        # The packed covariance with the offset's row and column cleared is that of φ, whose first entry is certain.
        rows, _ = gaussian.triangle(d)
        second_moment = gaussian.outer(phi) + np.where(rows == 0, 0.0, covariance)
        offset = mu + mean[:, 0]
        offset_phi = offset[:, None] * phi
        offset_phi[:, 1:] += gaussian.row(covariance, d, 0)[:, 1:]
        return cls(offset, phi, second_moment, offset_phi, covariance[:, 0].copy())

    def vectors(self, mu: float) -> Posterior:
        """The posteriors that :meth:`of` was given, their determinants left open."""
        n, d = self.phi.shape
        mean = self.phi.copy()
        mean[:, 0] = self.offset - mu
        covariance = self.second_moment - gaussian.outer(self.phi)
        covariance[:, :d] = self.offset_phi - self.offset[:, None] * self.phi
        covariance[:, 0] = self.offset_variance
        return Posterior(mean, covariance, np.full(n, np.nan))

    def __len__(self) -> int:
        return len(self.offset)

    def astype(self, dtype: Any) -> Features:
        return Features(*(values.astype(dtype) for values in vars(self).values()))

    def replaced(self, rows: np.ndarray, others: Features) -> Features:
        """With other features at these places."""
        columns = []
        for values, new in zip(vars(self).values(), vars(others).values(), strict=True):
            columns.append(values.copy())
            columns[-1][rows] = new
        return Features(*columns)

    def take(self, rows: np.ndarray) -> Features:
        return Features(*(values[rows] for values in vars(self).values()))


def feature_rows(
    version: int,
    ids: pa.Array,
    features: Features,
    residual: Array,
    implicit: Array,
    arrived: np.ndarray | None = None,
) -> pa.Table:
    """Rows of the features table for n inputs.

    Args:
        residual: what training added to the oracle's prediction, (n, d).
        implicit: the attributes that training events are, (n, q).
        arrived: which are to be learnt online, and nothing has been learnt of yet (:mod:`mtl.arrivals`), (n,); None: none.
    """
    n, d = features.phi.shape
    arrived = np.zeros(n, bool) if arrived is None else arrived
    of_arrived = pa.array(np.cumsum(arrived) - 1, mask=~arrived)
    nothing = {
        name: lists(np.zeros((int(arrived.sum()), width))).take(of_arrived)
        for name, width in ((schema.A, gaussian.packed_length(d)), (schema.B, d))
    }
    return pa.table(
        {
            schema.MODEL_VERSION: pa.array(np.full(n, version)),
            schema.INPUT_ID: ids,
            **columns_of(features),
            schema.IMPLICIT: lists(implicit),
            schema.RESIDUAL: lists(residual),
            schema.INPUT_CLASS: ids,
            **nothing,
            schema.N_EVENTS: pa.array(np.zeros(n, np.int64), mask=~arrived),
        }
    )


def columns_of(features: Features) -> dict[str, pa.Array]:
    """The columns of the features table that hold them."""
    return {
        schema.OFFSET: pa.array(features.offset),
        schema.PHI: lists(features.phi),
        schema.SECOND_MOMENT: lists(features.second_moment),
        schema.OFFSET_PHI: lists(features.offset_phi),
        schema.OFFSET_VARIANCE: pa.array(features.offset_variance),
    }


def from_rows(rows: pa.Table, d: int) -> Features:
    """Features of rows of the features table, φ of length d."""
    return Features(
        rows[schema.OFFSET].to_numpy(),
        matrix(rows[schema.PHI], d),
        matrix(rows[schema.SECOND_MOMENT], gaussian.packed_length(d)),
        matrix(rows[schema.OFFSET_PHI], d),
        rows[schema.OFFSET_VARIANCE].to_numpy(),
    )


def residuals(rows: pa.Table, d: int) -> Array:
    """δ of rows of the features table, (n, d)."""
    return matrix(rows[schema.RESIDUAL], d)
