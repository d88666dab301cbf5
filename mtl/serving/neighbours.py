"""Inputs that users take alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mtl import gaussian
from mtl.gaussian import Array
from mtl.serving import scorer
from mtl.serving.view import View

_SLACK = 32  # neighbours beyond k that are looked at in double precision


@dataclass
class Neighbours:
    """Of the inputs of one view."""

    view: View

    def of_input(self, identity: str, features: Array, k: int) -> list[tuple[str, float]]:
        """The k inputs nearest to one of these features (width,), with their distances.

        The distance is the root of E[(h(x; u) − h(y; u))²] over users of the prior: how differently users take two inputs.
        """
        metric = self._metric
        one = scorer.top_columns(features[None], self.view.d)[:, 0]
        # |x − y|² in the metric, less what is the same for all y.
        squares = self._squares - 2 * ((metric @ one).astype(np.float32) @ self.view.top)
        rows = scorer.largest(-squares, k + _SLACK)
        difference = self.view.rows[rows][:, : self.view.d] - features[: self.view.d]
        difference[:, 0] = self.view.rows[rows][:, -1] - features[-1]
        distance = np.sqrt(np.maximum(np.einsum("nd,de,ne->n", difference, metric, difference), 0.0))
        near = sorted(zip(distance.tolist(), self.view.ids(rows), strict=True))
        return [(other, value) for value, other in near if other != identity][:k]

    @cached_property
    def _metric(self) -> Array:
        """E[w̃w̃ᵀ] of the prior of a user of whom nothing is known, w̃ = [1, w_1 … w_k], (d, d)."""
        mean = self.view.unknown_weights.mean.copy()
        mean[0] = 1.0
        second = gaussian.unpack(self.view.prior_covariance, self.view.d)[0]
        second[0] = second[:, 0] = 0.0
        return second + np.outer(mean, mean)

    @cached_property
    def _squares(self) -> Array:
        return np.einsum("dn,dn->n", self._metric.astype(np.float32) @ self.view.top, self.view.top)
