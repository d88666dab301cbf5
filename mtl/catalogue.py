"""Every known input: its place, its encoded attributes, and what its events sum to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import blocks
from mtl.decay import COUNTED
from mtl.errors import StateError
from mtl.gaussian import Array
from mtl.losses import Loss
from mtl.sampling import ROLE
from mtl.schema import INPUT_ID, LABEL, OFFSET, WEIGHT


@dataclass(frozen=True)
class Totals:
    """Over some events."""

    n: float  # what they count together: less than their number where old ones are forgotten
    squared_labels: float  # Σ c y²


@dataclass(frozen=True)
class Catalogue:
    """Every known input and what its events sum to."""

    ids: pa.Array  # sorted
    counts: np.ndarray  # events of each input
    n_events: int
    rows_trained: int  # events that θ is trained on, those held out for a time among them
    total_weight: float  # Σ c
    mean_label: float  # weighted, like all that follows
    mean_offset: float
    has_offsets: bool
    label_variance: float  # Σ c (y − μ)² / n of what events and zeros count
    counted: float  # what the events count
    trained: Totals  # of the events that θ is trained on
    kept: Totals  # of these and the events held out
    label_min: float
    label_max: float

    @property
    def spread(self) -> float:
        """Variance of the labels, whatever their weights add up to."""
        return self.label_variance * self.counted / self.total_weight

    def with_zeros(self, n_users: int, weight: float) -> Catalogue:
        """With an event of label 0 and this weight for each pair of a user and an input (:mod:`mtl.zeros`)."""
        n = n_users * len(self.ids)
        total = self.total_weight + weight * n
        mean = self.mean_label * self.total_weight / total
        squares = self.label_variance * self.counted + self.mean_label**2 * self.total_weight
        return replace(
            self,
            total_weight=total,
            mean_label=mean,
            label_variance=(squares - mean**2 * total) / (self.counted + n),
            counted=self.counted + n,
            trained=replace(self.trained, n=self.trained.n + n),
            kept=replace(self.kept, n=self.kept.n + n),
            label_min=min(0.0, self.label_min),
            label_max=max(0.0, self.label_max),
        )


def read_catalogue(events: DataFrame, known: pd.Series, loss: Loss) -> Catalogue:
    """Totals of the events by input, in one pass, and the ids of all inputs: with events, or among ``known``.

    Raises:
        StateError: there are no events, or the loss cannot have their labels.
    """
    c, y = F.col(WEIGHT), F.col(LABEL)
    role = F.col(ROLE) if ROLE in events.columns else F.lit(blocks.TRAINED)
    counted = F.col(COUNTED) if COUNTED in events.columns else F.lit(1.0)
    parts = {"trained": role == blocks.TRAINED, "kept": role < blocks.CAPPED}
    sums = {
        "n": F.count(y),
        "counted": F.sum(counted),
        "c": F.sum(c),
        "cy": F.sum(c * y),
        "cyy": F.sum(c * y * y),
        "offsets": F.count(OFFSET) if OFFSET in events.columns else F.lit(0),
        "co": F.sum(c * F.coalesce(F.col(OFFSET), F.lit(0.0))) if OFFSET in events.columns else F.lit(0.0),
        **{f"n_{part}": F.sum(F.when(inside, counted).otherwise(0.0)) for part, inside in parts.items()},
        **{f"cyy_{part}": F.sum(F.when(inside, c * y * y).otherwise(0.0)) for part, inside in parts.items()},
        "rows_trained": F.count_if(parts["kept"]),
        "broken": F.count_if(y != F.floor(y)),
        "min": F.min(y),
        "max": F.max(y),
    }
    totals = events.groupBy(INPUT_ID).agg(*(value.alias(name) for name, value in sums.items())).toPandas()
    if totals.empty:
        raise StateError("there are no events to train on: run jobs/ingest.py first")
    lowest, highest = float(totals["min"].min()), float(totals["max"].max())
    if refusal := loss.refusal(lowest, highest, whole=not totals["broken"].any()):
        raise StateError(
            f"model.loss = {loss.name} cannot be trained on {refusal}: there are {lowest:g} to {highest:g}"
        )
    ids = pa.array(sorted({*totals[INPUT_ID], *known}), pa.string())
    counts = np.zeros(len(ids), np.int64)
    counts[blocks.index_of(pa.array(totals[INPUT_ID], pa.string()), ids)] = totals["n"]
    counted, weight, mean, square = (float(totals[name].sum()) for name in ("counted", "c", "cy", "cyy"))
    mean /= weight
    of = {part: Totals(float(totals[f"n_{part}"].sum()), float(totals[f"cyy_{part}"].sum())) for part in parts}
    return Catalogue(
        ids,
        counts,
        n_events=int(counts.sum()),
        rows_trained=int(totals["rows_trained"].sum()),
        total_weight=weight,
        mean_label=mean,
        mean_offset=float(totals["co"].sum()) / weight,
        has_offsets=bool(totals["offsets"].any()),
        label_variance=square / counted - mean * mean * weight / counted,
        counted=counted,
        **of,
        label_min=lowest,
        label_max=highest,
    )


def describe_inputs(ids: pa.Array, attributes: pd.DataFrame, encoder: Callable[[pd.DataFrame], Array]) -> Array:
    """Encoded attributes of the inputs ``ids``, (n, p); an input without an attribute row is the average one."""
    return encoder(pd.Series(ids.to_pandas(), name=INPUT_ID).to_frame().merge(attributes, "left", INPUT_ID))
