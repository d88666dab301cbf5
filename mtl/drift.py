"""How far the stream has moved from what training saw: its inputs, and its users' weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrow import lists, matrix
from mtl.blocks import index_of
from mtl.gaussian import Array
from mtl.model import Model
from mtl.progress import Progress
from mtl.schema import INPUT_ID, MODEL_VERSION
from mtl.sharing import share
from mtl.tables import Tables

_MEAN, _STD = "phi_mean", "phi_std"  # in a version's metrics
_SUMS = "sums"


@dataclass(frozen=True)
class Seen:
    """φ over the events of a training: mean and standard deviation, (d,) each."""

    mean: Array
    std: Array

    @classmethod
    def of_sums(cls, n: float, phi: Array, squares: Array) -> Seen:
        """From the sums of φ and φ², (d,) each, over n events."""
        mean = phi / n
        return cls(mean, np.sqrt(np.maximum(squares / n - mean**2, 0.0)))

    @classmethod
    def of_version(cls, tables: Tables, version: int) -> Seen:
        """As the version's retraining left it with its metrics."""
        row = tables.of_version(schema.MODELS, version).select(schema.METRICS).first()
        metrics = json.loads(row[schema.METRICS])
        return cls(np.array(metrics[_MEAN]), np.array(metrics[_STD]))

    @property
    def metrics(self) -> dict[str, list[float]]:
        return {_MEAN: self.mean.tolist(), _STD: self.std.tolist()}

    def distance(self, progress: Progress) -> float:
        """The largest shift of a basis function's mean, in standard deviations; 0 where there were no events."""
        n = progress.n.sum()
        if not n:
            return 0.0
        moves = self.std > 1e-9  # not the intercept's 1
        shift = np.abs(progress.phi / n - self.mean)[moves] / self.std[moves]
        return float(shift.max(initial=0.0))


def seen_in_training(rows: DataFrame, ids: pa.Array, counts: np.ndarray, d: int) -> Seen:
    """From the features of a new version and the number of events of each input, summed where the features are.

    Args:
        rows: input_id and phi, of a version's rows of the features table.
        ids, counts: inputs and the events of each, (n,).
    """
    shared = share(rows.sparkSession, (ids, counts))

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            known, events = shared.value
            place = index_of(batch.column(INPUT_ID), known)
            n = np.where(place < 0, 0, events[place]).astype(float)
            phi = matrix(batch.column(schema.PHI), d)
            yield pa.record_batch([lists(np.concatenate([[n.sum()], n @ phi, n @ phi**2])[None])], [_SUMS])

    table = rows.select(INPUT_ID, schema.PHI).mapInArrow(partition, f"{_SUMS} array<double>").toArrow()
    n, phi, squares = np.split(matrix(table[_SUMS], 1 + 2 * d).sum(0), [1, 1 + d])
    return Seen.of_sums(n[0], phi, squares)


def weight_distance(tables: Tables, model: Model) -> float | None:
    """Mean over users and weights of (w − m)² / S: at most about 1 as long as users are as the prior says.

    One pass over the version's users; None where none has events.
    """
    variances = np.diag(model.artefact.users.covariance)
    learnt = variances > 0  # others are attributes of the user, and do not move
    scale = F.array(*(F.lit(float(x)) for x in np.divide(1, variances, out=np.zeros_like(variances), where=learnt)))
    squares = F.zip_with(F.zip_with(schema.W, schema.PRIOR_MEAN, lambda w, m: (w - m) ** 2), scale, lambda x, s: x * s)
    distance = F.aggregate(squares, F.lit(0.0), lambda total, x: total + x) / float(learnt.sum())
    users = tables.read(schema.USERS).where((F.col(MODEL_VERSION) == model.version) & (F.col(schema.N_EVENTS) > 0))
    return users.agg(F.mean(distance)).first()[0]
