"""What the model is measured against: means, regressions of single users and of all, Spark's own matrix factorization.

Each learns from training events and adds a column of predictions, mean labels, to rows of user_id, input_id and others.
Events count with their weights, except in ALS, which knows none. Regressions are of the model's loss; ALS has squared loss
whatever the labels are.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.ml.feature import StringIndexer, StringIndexerModel
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from tqdm import tqdm

from mtl import blocks, gaussian, glm, schema
from mtl.arrow import lists
from mtl.config import EvaluateSettings
from mtl.errors import StateError
from mtl.gaussian import Array
from mtl.losses import LOSSES, Loss
from mtl.metrics import clipped, cost
from mtl.model import Model
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.sharing import cores, share
from mtl.tables import Tables

log = logging.getLogger("mtl")

GLOBAL_MEAN = "global_mean"
INPUT_MEAN = "input_mean"
INDEPENDENT = "independent"
ALS_BEST = "als"
POOLED = "pooled"
NAMES = (GLOBAL_MEAN, INPUT_MEAN, INDEPENDENT, ALS_BEST)  # and, where the loss is not squared, POOLED

RIDGE_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Events at the global mean that an input has beside its own, where a mean of 0 could cost without end.
_MEAN_EVENTS = 5.0
_POOLED_STRENGTH = 1.0
_ALS_MARGIN = 0.01  # an ALS score keeps this far from 0 and 1,
_ALS_LEAST = 0.05  # or above so many mean rates: least squares knows of neither
_USERS_AT_ONCE = 1024  # fewer than in training: attributes are more than basis functions
_ROWS_AT_ONCE = 65_536
_SPLIT = 1_000_000  # how finely the validation fraction is told

# Columns of our own among the rows' own, whatever those are called.
_LABEL, _WEIGHT, _USER, _INPUT, _FACTORS = (f"_mtl_{name}" for name in ("label", "weight", "user", "input", "factors"))


@dataclass(frozen=True)
class DescribedInputs:
    """Encoded attributes of the known inputs and, in one more row, of an input of which nothing is known."""

    ids: pa.Array
    z: Array  # (inputs + 1, p), first column 1

    @classmethod
    def of(cls, tables: Tables, model: Model) -> DescribedInputs:
        """All rows of inputs in the model's own encoding."""
        attributes = tables.read(schema.INPUTS).toArrow().to_pandas()
        frames = ([attributes.drop(columns=INPUT_ID)] if len(attributes) else []) + [pd.DataFrame(index=[0])]
        z = np.concatenate([model.artefact.input_encoder(frame) for frame in frames])
        return cls(pa.array(attributes[INPUT_ID], pa.string()), z)

    def place(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        place = blocks.index_of(ids, self.ids)
        place[place < 0] = len(self.ids)
        return place


def names(loss: Loss) -> tuple[str, ...]:
    return NAMES if loss.is_quadratic else (*NAMES, POOLED)


def with_baselines(
    tables: Tables, model: Model, settings: EvaluateSettings, train: DataFrame, rows: DataFrame
) -> tuple[DataFrame, dict[str, dict[str, Any]]]:
    """``rows`` with one column of predictions a baseline, named as in :func:`names`.

    What a baseline leaves to choose is chosen on a part of ``train``, split off by a hash of event_id; it then learns
    from all of it.

    Args:
        model: its encoding of input attributes is the independent users' too.
        train: event_id, user_id, input_id, label, weight; persisted by the caller until the rows have been used.

    Returns:
        The rows, and the settings that were chosen, by baseline.

    Raises:
        StateError: there are no events.
    """
    mean = train.agg(F.sum(F.col(WEIGHT) * F.col(LABEL)) / F.sum(WEIGHT)).collect()[0][0]
    if mean is None:
        raise StateError("there are no events to train the baselines on: run jobs/ingest.py first")
    context = tables.spark.sparkContext
    if context.getCheckpointDir() is None and (context.master or "").startswith("local"):
        scratch = tempfile.mkdtemp(prefix="oracle-mtl-als-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        context.setCheckpointDir(scratch)
    validating = held_out(settings.validation_fraction)
    part, validation = train.where(~validating), train.where(validating)
    inputs = DescribedInputs.of(tables, model)
    strength = choose_strength(part, validation, inputs, mean, model)
    log.info("evaluate: independent ridge, strength %g", strength)
    als = choose_als(part, validation, mean, settings, model)
    log.info("evaluate: ALS, rank %d, regularization %g", als.getRank(), als.getRegParam())

    loss = LOSSES[model.loss]
    rows = with_input_mean(train, rows.withColumn(GLOBAL_MEAN, F.lit(mean)), mean, loss)
    rows = with_independent(train, rows, inputs, mean, (strength,), loss).withColumn(INDEPENDENT, F.col(INDEPENDENT)[0])
    rows = with_als(als, train, rows).withColumn(ALS_BEST, mean_label(F.col(ALS_BEST), mean, loss))
    if POOLED in names(loss):
        rows = with_pooled(train, rows, inputs, mean, loss)
    chosen = {
        INDEPENDENT: {"strength": strength},
        ALS_BEST: {"rank": als.getRank(), "regularization": als.getRegParam()},
    }
    return rows, chosen


def held_out(fraction: float) -> Column:
    """Whether an event is for validation: the same events each time, about ``fraction`` of all."""
    return F.pmod(F.xxhash64(EVENT_ID), F.lit(_SPLIT)) < int(fraction * _SPLIT)


# --- Means ------------------------------------------------------------------------------------------------------------


def with_input_mean(train: DataFrame, rows: DataFrame, mean: float, loss: Loss = LOSSES["squared"]) -> DataFrame:
    """``rows`` with the weighted mean label of their input, ``mean`` where it has no training event.

    Where the loss is not squared, it is drawn to ``mean`` by as much as a few events.
    """
    drawn = 0.0 if loss.is_quadratic else _MEAN_EVENTS
    sums = F.sum(F.col(WEIGHT) * F.col(LABEL)) + drawn * mean
    means = train.groupBy(INPUT_ID).agg((sums / (F.sum(WEIGHT) + drawn)).alias(INPUT_MEAN))
    return rows.join(means, INPUT_ID, "left").withColumn(INPUT_MEAN, F.coalesce(INPUT_MEAN, F.lit(mean)))


# --- One regression of all users --------------------------------------------------------------------------------------


def with_pooled(train: DataFrame, rows: DataFrame, inputs: DescribedInputs, mean: float, loss: Loss) -> DataFrame:
    """``rows`` with the predictions of one regression on input attributes, the same for every user."""
    sums = train.groupBy(INPUT_ID).agg(F.sum(WEIGHT).alias(_WEIGHT), F.sum(F.col(WEIGHT) * F.col(LABEL)).alias(_LABEL))
    events = sums.toArrow()  # a row an input
    weight, offset, everyone = events[_WEIGHT].to_numpy(), loss.link(mean), np.zeros(len(events), np.int64)
    label, place = events[_LABEL].to_numpy() / weight, inputs.place(events[INPUT_ID])
    w = glm.fit(everyone, place, label, weight, inputs.z, 1, (_POOLED_STRENGTH,), loss, offset)[0, 0]
    predictions = loss.response(offset + inputs.z @ w, np.zeros(len(inputs.z)))
    known = pa.table({INPUT_ID: inputs.ids, POOLED: pa.array(predictions[:-1])})
    rows = rows.join(rows.sparkSession.createDataFrame(known), INPUT_ID, "left")
    return rows.withColumn(POOLED, F.coalesce(POOLED, F.lit(float(predictions[-1]))))


# --- Independent users ------------------------------------------------------------------------------------------------


def choose_strength(
    part: DataFrame, validation: DataFrame, inputs: DescribedInputs, mean: float, model: Model
) -> float:
    """The one of :data:`RIDGE_STRENGTHS` of the least cost on ``validation``."""
    predicted = with_independent(part, validation, inputs, mean, RIDGE_STRENGTHS, LOSSES[model.loss])
    costs = [
        F.sum(cost(model.loss, clipped(F.col(INDEPENDENT)[i], model), F.col(LABEL)))
        for i in range(len(RIDGE_STRENGTHS))
    ]
    sums = predicted.agg(*(of.alias(f"cost{i}") for i, of in enumerate(costs))).collect()[0]
    # Too few events to have a validation part: shrink as if each attribute had been seen ten times.
    return RIDGE_STRENGTHS[int(np.argmin(sums))] if sums[0] is not None else 10.0


def with_independent(
    train: DataFrame,
    rows: DataFrame,
    inputs: DescribedInputs,
    mean: float,
    strengths: Sequence[float],
    loss: Loss = LOSSES["squared"],
) -> DataFrame:
    """``rows`` with the predictions, an array over ``strengths``, of one penalized regression a user on input attributes.

    A user without training events has weights 0: the global mean.
    """
    events = train.select(USER_ID, INPUT_ID, F.col(LABEL).alias(_LABEL), F.col(WEIGHT).alias(_WEIGHT))
    together = rows.unionByName(events, allowMissingColumns=True)
    predicted = T.StructType([*rows.schema.fields, T.StructField(INDEPENDENT, T.ArrayType(T.DoubleType()))])
    shared = share(rows.sparkSession, (inputs, mean, tuple(strengths), loss))
    return together.repartition(USER_ID).mapInArrow(_independent_in_arrow(shared), predicted)


def ridge(
    user: np.ndarray, place: np.ndarray, label: Array, weight: Array, z: Array, n_users: int, strengths: Sequence[float]
) -> Array:
    """(Σ c zzᵀ + λI)⁻¹ Σ c z y for every user and λ: (strengths, users, p).

    Args:
        user, place: number of the user, and of the input among the rows of z, of each event, (n,).
        label, weight: y and c, (n,).
        z: (inputs, p).
    """
    weights, labels = blocks.csr(user, place, label, weight, n_users, len(z))
    w = np.empty((len(strengths), n_users, z.shape[1]))
    for first in range(0, n_users, _USERS_AT_ONCE):
        part = slice(first, first + _USERS_AT_ONCE)
        seen = np.unique(weights[part].indices)
        gram = weights[part][:, seen] @ gaussian.outer(z[seen])
        information = labels[part][:, seen] @ z[seen]
        for i, strength in enumerate(strengths):
            w[i, part] = gaussian.posterior(gram + gaussian.pack(strength * np.eye(z.shape[1])), information).mean
    return w


def _independent_in_arrow(shared: Any) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        filled = [batch for batch in batches if batch.num_rows]
        if not filled:
            return
        inputs, mean, strengths, loss = shared.value
        table = pa.Table.from_batches(filled)
        codes = table[USER_ID].combine_chunks().dictionary_encode()
        user = codes.indices.to_numpy()
        is_event = table[_LABEL].is_valid().to_numpy()
        events, rows = table.filter(pa.array(is_event)), table.filter(pa.array(~is_event))
        label, weight = events[_LABEL].to_numpy(), events[_WEIGHT].to_numpy()
        of_events, n_users = inputs.place(events[INPUT_ID]), len(codes.dictionary)
        if loss.is_quadratic:
            w = ridge(user[is_event], of_events, label - mean, weight, inputs.z, n_users, strengths)
        else:
            w = glm.fit(user[is_event], of_events, label, weight, inputs.z, n_users, strengths, loss, loss.link(mean))
        place, predictions = inputs.place(rows[INPUT_ID]), np.empty((len(rows), len(strengths)))
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            of_rows = w[:, user[~is_event][part]]
            h = loss.link(mean) + np.einsum("snp,np->ns", of_rows, inputs.z[place[part]])
            predictions[part] = loss.response(h, np.zeros_like(h))
        rows = rows.drop_columns([_LABEL, _WEIGHT]).append_column(INDEPENDENT, lists(predictions))
        yield from rows.combine_chunks().to_batches()

    return partition


# --- Matrix factorization ---------------------------------------------------------------------------------------------


def choose_als(part: DataFrame, validation: DataFrame, mean: float, settings: EvaluateSettings, model: Model) -> ALS:
    """The one of the grid of ranks and regularization of the least cost on ``validation``."""
    grid = list(itertools.product(settings.als_ranks, settings.als_regularization))
    ids = _number_ids(part)
    train = ids.transform(part).persist()
    rows = with_input_mean(part, ids.transform(validation), mean, LOSSES[model.loss]).persist()
    try:
        blocks = cores(part.sparkSession)
        best, least = _als(*grid[0], blocks, settings), np.inf
        for rank, regularization in tqdm(grid, "ALS grid", unit="setting", disable=None):
            als = _als(rank, regularization, blocks, settings)
            predicted = _with_factors(als.fit(train), rows)
            prediction = mean_label(F.col(ALS_BEST), mean, LOSSES[model.loss])
            of_rows = cost(model.loss, clipped(prediction, model), F.col(LABEL))
            error = predicted.agg(F.sum(of_rows)).collect()[0][0]
            log.info("evaluate: ALS, rank %d, regularization %g: cost %s", rank, regularization, error)
            if error is not None and error < least:
                best, least = als, error
        return best
    finally:
        train.unpersist()
        rows.unpersist()


def with_als(als: ALS, train: DataFrame, rows: DataFrame) -> DataFrame:
    """``rows``, which have their input mean, with predictions of ``als`` trained on ``train``.

    Where ALS knows the user or the input not, the prediction is the input mean.
    """
    ids = _number_ids(train)
    return _with_factors(als.fit(ids.transform(train)), ids.transform(rows)).drop(_USER, _INPUT)


def mean_label(score: Column, mean: float, loss: Loss) -> Column:
    """Scores of least squares as mean labels that another loss can measure."""
    if loss.name == "logistic":
        return F.greatest(F.least(score, F.lit(1 - _ALS_MARGIN)), F.lit(_ALS_MARGIN))
    return score if loss.is_quadratic else F.greatest(score, F.lit(_ALS_LEAST * mean))


def _als(rank: int, regularization: float, blocks: int, settings: EvaluateSettings) -> ALS:
    als = ALS(
        rank=rank,
        regParam=regularization,
        maxIter=settings.als_iterations,
        userCol=_USER,
        itemCol=_INPUT,
        ratingCol=LABEL,
        coldStartStrategy="nan",
        checkpointInterval=5,  # a longer lineage overflows the stack of whoever reads the factors
        seed=0,
    )
    # MLlib's ten blocks a side make a hundred small tasks a half-step: five times slower on two cores.
    return als.setPredictionCol(_FACTORS).setNumBlocks(blocks)


def _number_ids(train: DataFrame) -> StringIndexerModel:
    """MLlib wants whole numbers; an id that is not in ``train`` gets one that no factor has."""
    indexer = StringIndexer(inputCols=[USER_ID, INPUT_ID], outputCols=[_USER, _INPUT], handleInvalid="keep")
    return indexer.fit(train)


def _with_factors(model: ALSModel, rows: DataFrame) -> DataFrame:
    factors = F.col(_FACTORS).cast("double")
    predicted = model.transform(rows)
    prediction = F.when(~F.isnan(factors), factors).otherwise(F.col(INPUT_MEAN))
    return predicted.withColumn(ALS_BEST, prediction).drop(_FACTORS)
