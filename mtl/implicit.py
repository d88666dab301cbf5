"""Attributes that the training events are by being there: how many, and who acted on what. The last of both sides'.

For users and inputs that had no training event, or came later, they are 0, the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtl import spectral
from mtl.blocks import EventBlock
from mtl.config import EncodeSettings
from mtl.encode import Activity
from mtl.gaussian import Array
from mtl.spectral import Spectral

Pass = Callable[[Callable[[EventBlock], Any]], Iterable[Any]]
"""Does a work on every block of users, wherever it is."""


@dataclass(frozen=True)
class Implicit:
    """q columns of both sides: the standardized log-count of events, and an embedding of their pattern."""

    of_users: Activity | None
    of_inputs: Activity | None
    embedding: Spectral | None

    @classmethod
    def fit(cls, each_block: Pass, counts: np.ndarray, settings: EncodeSettings, nothing: bool = False) -> Implicit:
        """The columns that the settings ask for, or ``nothing``.

        Args:
            counts: events of each input of the catalogue, (inputs,).
        """
        of_users = of_inputs = embedding = None
        if settings.activity and not nothing:
            logs = np.log1p(counts)
            of_inputs = Activity.fit(logs.sum(), logs @ logs, int(np.sum(counts > 0)))
            total, squares, n = np.sum(list(each_block(_log_counts)), axis=0)
            of_users = Activity.fit(total, squares, int(n))
        if settings.spectral != 0 and not nothing:
            dimensions = None if settings.spectral == "auto" else settings.spectral
            embedding = spectral.fit(each_block, len(counts), dimensions)
        return cls(of_users, of_inputs, embedding)

    @property
    def width(self) -> int:
        return (self.of_users is not None) + (self.embedding.dimensions if self.embedding else 0)

    def inputs(self, counts: np.ndarray) -> Array:
        """Of all inputs of the catalogue, by their numbers of events: (inputs, q)."""
        parts = [self.of_inputs(counts)[:, None]] if self.of_inputs else []
        parts += [self.embedding.of_inputs()] if self.embedding else []
        return np.concatenate([np.empty((len(counts), 0)), *parts], axis=1)

    def described(self, block: EventBlock) -> EventBlock:
        """The block with these columns after its users' attributes."""
        parts = [block.attributes]
        parts += [self.of_users(block.n_events)[:, None]] if self.of_users else []
        if self.embedding:
            of_parts = [self.embedding.of_users(block, users) for users in block.parts()]
            parts.append(np.concatenate(of_parts))
        return replace(block, attributes=np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class Unknown:
    """As many columns of nothing, for users whose prior is kept from a version that had others."""

    width: int

    def described(self, block: EventBlock) -> EventBlock:
        return replace(block, attributes=np.column_stack([block.attributes, np.zeros((len(block), self.width))]))


def _log_counts(block: EventBlock) -> tuple[Any, ...]:
    logs = np.log1p(block.n_events)
    return logs.sum(), logs @ logs, int(np.sum(block.n_events > 0))
