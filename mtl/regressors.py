"""Fitted functions: what an oracle returns, and sums of what several fits returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtl.gaussian import Array


class Regressor(Protocol):
    def predict(self, attributes: Array) -> Array:
        """(n, p) → (n,)."""


Oracle = Callable[[Array, Array, Array], Regressor]
"""fit(attributes (n, p), target (n,), weight (n,)) → Regressor: all that an oracle ever is given."""


@dataclass(frozen=True)
class Linear:
    """z ↦ z·β + β₀."""

    coefficients: Array  # β, (p,)
    intercept: float = 0.0  # β₀

    def predict(self, attributes: Array) -> Array:
        return attributes @ self.coefficients + self.intercept


@dataclass(frozen=True)
class Stages:
    """z ↦ Σ_t s_t f_t(z). A prediction costs as much as all of its stages' do."""

    stages: tuple[tuple[float, Regressor], ...]  # (s_t, f_t)

    def predict(self, attributes: Array) -> Array:
        total = np.zeros(len(attributes))
        for scale, stage in self.stages:
            total += scale * np.asarray(stage.predict(attributes), float)
        return total


def combine(terms: Iterable[tuple[float, Regressor]]) -> Regressor:
    """Σ s_t f_t as flat as it gets: sums of sums are sums, linear stages are one, and what counts 0 is left out."""
    flat: list[tuple[float, Regressor]] = []
    for scale, function in terms:
        inner = function.stages if isinstance(function, Stages) else ((1.0, function),)
        flat += [(scale * s, f) for s, f in inner]
    linear = [(s, f) for s, f in flat if isinstance(f, Linear)]
    stages = [(s, f) for s, f in flat if s and not isinstance(f, Linear)]
    if linear:
        line = Linear(
            np.sum([s * f.coefficients for s, f in linear], axis=0), float(sum(s * f.intercept for s, f in linear))
        )
        if not stages:
            return line
        if line.intercept or line.coefficients.any():
            stages.append((1.0, line))
    if len(stages) == 1 and stages[0][0] == 1.0:
        return stages[0][1]
    return Stages(tuple(stages))
