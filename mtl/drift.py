"""How far the stream has moved from what training saw: its inputs, and its users' weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyspark.sql import functions as F

from mtl import schema
from mtl.blocks import index_of
from mtl.gaussian import Array
from mtl.model import Model
from mtl.progress import Progress
from mtl.schema import INPUT_ID, MODEL_VERSION
from mtl.tables import Tables
from mtl.users import SharedInputs


@dataclass(frozen=True)
class Seen:
    """φ over the events of a training: mean and standard deviation, (d,) each."""

    mean: Array
    std: Array

    @classmethod
    def of(cls, counts: Array, phi: Array) -> Seen:
        """From the number of events of each input, (n,), and its φ, (n, d)."""
        mean = counts @ phi / counts.sum()
        return cls(mean, np.sqrt(np.maximum(counts @ phi**2 / counts.sum() - mean**2, 0.0)))

    def distance(self, progress: Progress) -> float:
        """The largest shift of a basis function's mean, in standard deviations; 0 where there were no events."""
        n = progress.n.sum()
        if not n:
            return 0.0
        moves = self.std > 1e-9  # not the intercept's 1
        shift = np.abs(progress.phi / n - self.mean)[moves] / self.std[moves]
        return float(shift.max(initial=0.0))


def seen_in_training(tables: Tables, model: Model, inputs: SharedInputs) -> Seen:
    """One pass over the ids of the events that the version was trained on."""
    counts = tables.read(schema.EVENTS, model.events_version).groupBy(INPUT_ID).count().toArrow()
    place = index_of(counts[INPUT_ID], inputs.ids)
    known = place >= 0
    return Seen.of(counts["count"].to_numpy()[known].astype(float), inputs.features.phi[place[known]])


def weight_distance(tables: Tables, model: Model) -> float | None:
    """Mean over users and weights of (w − m)² / S: at most about 1 as long as users are as the prior says.

    One pass over the version's users; None where none has events.
    """
    variances = np.diag(model.artefact.users.covariance)
    scale = F.array(*(F.lit(float(1 / variance)) for variance in variances))
    squares = F.zip_with(F.zip_with(schema.W, schema.PRIOR_MEAN, lambda w, m: (w - m) ** 2), scale, lambda x, s: x * s)
    distance = F.aggregate(squares, F.lit(0.0), lambda total, x: total + x) / model.d
    users = tables.read(schema.USERS).where((F.col(MODEL_VERSION) == model.version) & (F.col(schema.N_EVENTS) > 0))
    return users.agg(F.mean(distance)).first()[0]
