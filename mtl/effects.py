"""Random effects of contexts, and what is known of an event's h beside user and input: its *offset*.

    h(x; u) + offset + Σ_c r_c(value)        r_c(v) ~ N(0, τ_c²),   τ_c² learnt

A context is a column of events (an hour, a device, a shop) of which every value v has an effect r_c(v) of its own. To users
and inputs the effects are a known part of h, as the offset is that an event came with. An effect is known as a Gaussian, like
all that is learnt, and given users and inputs its posterior has a closed form in two sums over the events of its value: one
more block of the coordinate descent (several kinds of random effect at once, as GLMix has them: Zhang et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mtl.gaussian import Array

_START = 0.1  # τ² before anything is learnt, in squared units of h


class Offsets(NamedTuple):
    """What is known of h of n events beside user and input."""

    mean: Array  # (n,)
    variance: Array


def part_of(offsets: Offsets | None, which: slice | np.ndarray) -> Offsets | None:
    """Those of some of the events."""
    return None if offsets is None else Offsets(offsets.mean[which], offsets.variance[which])


@dataclass(frozen=True)
class Effect:
    """The effects of one column's values; the last entry of each array is that of any other value, or none."""

    name: str
    values: pa.Array  # (n,), sorted
    mean: Array  # (n + 1,)
    variance: Array  # (n + 1,)
    prior: float  # τ², squared units of h

    @classmethod
    def start(cls, name: str, values: pa.Array, spread: float = 1.0) -> Effect:
        """Before anything is learnt, of an h of this variance. While training lasts an event without a value has the effect 0."""
        variance = np.append(np.full(len(values), _START * spread), 0.0)
        return cls(name, values, np.zeros(len(values) + 1), variance, _START * spread)

    def learn(self, precision: Array, information: Array, noise: float) -> Effect:
        """The posteriors given Σ c and Σ c (z − rest of h) of every value, (n,) each; then τ² of highest evidence."""
        variance = 1 / (precision / noise + 1 / self.prior)
        mean = variance * information / noise
        return replace(
            self,
            mean=np.append(mean, 0.0),
            variance=np.append(variance, 0.0),
            prior=float(np.mean(mean**2 + variance)),
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {value: i for i, value in enumerate(self.values.to_pylist())}

    def place(self, value: str | None) -> int:
        """Where a value is, −1 where it is not."""
        return -1 if value is None else self._places.get(value, -1)

    def learnt(self) -> Effect:
        """For predictions: any other value is a draw from the prior."""
        return replace(self, variance=np.append(self.variance[:-1], self.prior))

    @property
    def divergence(self) -> float:
        """KL of the posteriors from the prior (nats)."""
        mean, ratio = self.mean[:-1], self.variance[:-1] / self.prior
        return float(np.sum(ratio - np.log(ratio) - 1 + mean**2 / self.prior)) / 2


Effects = tuple[Effect, ...]


def names_of(effects: Effects) -> list[str]:
    return [effect.name for effect in effects]


def together(given: Array | None, codes: np.ndarray | None, effects: Effects) -> Offsets | None:
    """Offsets that events came with and their effects, by the codes (n, contexts) of their values."""
    if not effects:
        return None if given is None else Offsets(given, np.zeros(len(given)))
    assert codes is not None
    if not len(codes):
        return Offsets(np.empty(0), np.empty(0))
    mean, variance = np.zeros(len(codes)), np.zeros(len(codes))
    for code, effect in zip(codes.T, effects, strict=True):
        mean += effect.mean[code]
        variance += effect.variance[code]
    return Offsets(mean if given is None else mean + given, variance)


def of_one(offset: float | None, context: Mapping[str, str], effects: Effects) -> tuple[float, float]:
    """Mean and variance of the offset of one event."""
    mean, variance = offset or 0.0, 0.0
    for effect in effects:
        place = effect.place(context.get(effect.name))
        mean += float(effect.mean[place])
        variance += float(effect.variance[place])
    return mean, variance
