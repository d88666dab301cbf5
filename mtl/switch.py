"""Which version should be live: what progressive validation says of a candidate and of the live version.

Both predict the same fresh events before they learn from them, so their losses over the same stretch of the events table
may be compared. A stretch begins and ends where both queries ended a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mtl.checkpoint import Place
from mtl.config import SwitchSettings


class Validated(NamedTuple):
    """A batch of a version's query: where it ends, and what its events cost before they were applied."""

    end: Place
    n: int
    loss: float  # the sum


@dataclass(frozen=True)
class Comparison:
    """Mean losses of a candidate and of the live version over the same stretch of events."""

    n: int
    candidate: float
    live: float

    def verdict(self, settings: SwitchSettings) -> Literal["wait", "promote", "refuse"]:
        """Whether the candidate may go live: it must not be worse by more than the tolerance."""
        if self.n < settings.min_events:
            return "wait"
        return "promote" if self.candidate <= self.live * (1 + settings.tolerance) else "refuse"


def compare(
    candidate: Sequence[Validated], candidate_start: Place, live: Sequence[Validated], live_start: Place
) -> Comparison:
    """The comparison over the longest stretch that both have read whole.

    Args:
        candidate, live: batches in their order.
        candidate_start, live_start: where each query began to read.
    """
    common = {candidate_start, *(batch.end for batch in candidate)} & {live_start, *(batch.end for batch in live)}
    if len(common) < 2:
        return Comparison(0, float("nan"), float("nan"))
    first, last = min(common), max(common)
    n, loss = _total(candidate, first, last)
    n_live, loss_live = _total(live, first, last)
    return Comparison(min(n, n_live), loss / max(n, 1), loss_live / max(n_live, 1))


def has_drifted(surprise: float, n: int, settings: SwitchSettings) -> bool:
    """Whether labels are further from their predictions than the model's own uncertainty allows.

    Args:
        surprise: mean of ((label − prediction) / std)² over the last n events; 1 where the model is right.
    """
    return n >= settings.min_events and surprise > settings.surprise_limit


def _total(batches: Sequence[Validated], first: Place, last: Place) -> tuple[int, float]:
    within = [batch for batch in batches if first < batch.end <= last]
    return sum(batch.n for batch in within), sum(batch.loss for batch in within)
