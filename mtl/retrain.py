"""A retraining from tables to tables: events in, one model version with its features and users out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from tqdm import tqdm

from mtl import alternation, blocks, models, schema
from mtl.arrow import lists
from mtl.basis import InputPrior, OracleBasis
from mtl.config import Settings
from mtl.encode import Activity, Encoder
from mtl.engine import SparkEngine, UserStep
from mtl.errors import StateError
from mtl.features import feature_rows
from mtl.models import Artefact, Model
from mtl.oracle import make_oracle
from mtl.partitions import encode_users, partition_events, user_totals
from mtl.prior import Prior
from mtl.schema import INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.tables import Tables
from mtl.train import START_VARIANCE, Fit, Schedule, alternate

log = logging.getLogger("mtl")

MAX_K = 20
ENCODER_ROWS = 200_000  # rows of an attribute table that the encodings are chosen from


@dataclass(frozen=True)
class Catalogue:
    """Every known input and what its events sum to."""

    ids: pa.Array  # sorted
    counts: np.ndarray  # events of each input
    n_events: int
    mean_label: float  # weighted, like all that follows
    label_variance: float
    squared_labels: float  # Σ c y²
    label_min: float
    label_max: float


def retrain(tables: Tables, settings: Settings, promote: bool = False) -> dict[str, Any]:
    """Train a new model version over all events and write its features, its users and its row in models, in this order.

    The first version goes live; later ones are candidates unless ``promote``.

    Raises:
        StateError: there are no events.
    """
    started = time.monotonic()
    events_version, inputs_version = tables.version(schema.EVENTS), tables.version(schema.INPUTS)
    events = tables.read(schema.EVENTS, events_version)
    attributes = tables.read(schema.INPUTS, inputs_version).toPandas()
    catalogue = read_catalogue(events, attributes[INPUT_ID])
    log.info("retrain: %d events, %d inputs", catalogue.n_events, len(catalogue.ids))

    identity = settings.oracle.kind == "identity"
    input_encoder = Encoder.fit(attributes.drop(columns=INPUT_ID).iloc[:, : 0 if identity else None], settings.encode)
    rows = pd.Series(catalogue.ids.to_pandas(), name=INPUT_ID).to_frame().merge(attributes, "left", INPUT_ID)
    described = input_encoder(rows)
    activity = settings.encode.activity and not identity
    if activity:
        logs = np.log1p(catalogue.counts)
        of_inputs = Activity.fit(logs.sum(), logs @ logs, int(np.sum(catalogue.counts > 0)))
        described = np.column_stack([described, of_inputs(catalogue.counts)])

    user_attributes = tables.read(schema.USER_ATTRIBUTES)
    sample = user_attributes.limit(ENCODER_ROWS).toPandas().drop(columns=USER_ID)
    user_encoder = Encoder.fit(sample, settings.encode)
    partitions = partition_events(
        events,
        encode_users(user_attributes, user_encoder) if user_encoder.width > 1 else None,
        user_encoder.width,
        catalogue.ids,
        settings.train.partitions or tables.spark.sparkContext.defaultParallelism,
    )
    try:
        totals = user_totals(partitions)
        of_users = totals.activity() if activity else None
        k = MAX_K if settings.model.k == "auto" else settings.model.k
        engine = SparkEngine(
            partitions, described, catalogue.mean_label, catalogue.squared_labels, k, settings.train.seed, of_users
        )
        fit = _train(engine, settings, totals.gram_with(of_users), catalogue, k)

        version = models.next_version(tables)
        first = models.versions(tables).where(F.col(schema.STATUS) == schema.LIVE).isEmpty()
        model = Model(
            version,
            schema.LIVE if first else schema.CANDIDATE,
            k,
            catalogue.mean_label,
            fit.noise,
            catalogue.label_min,
            catalogue.label_max,
            events_version,
            inputs_version,
            Artefact(user_encoder, input_encoder, activity, fit.users, fit.inputs),
        )
        features = engine.features
        residual = engine.inputs.mean - fit.inputs.mean(described)
        tables.append(
            schema.FEATURES, tables.spark.createDataFrame(feature_rows(version, catalogue.ids, features, residual))
        )
        n_users = _write_users(tables, partitions, UserStep(features, fit.users, fit.noise, of_users), model)
    finally:
        partitions.unpersist()
    seconds = round(time.monotonic() - started, 3)
    metrics = {"seconds": seconds, "iterations": fit.iterations, "users": n_users, "inputs": len(catalogue.ids)}
    if isinstance(fit.inputs, OracleBasis):
        metrics["refused_oracle_steps"] = fit.inputs.refused
    models.publish(tables, model, fit.objective, catalogue.n_events, metrics, settings.model_dump_json())
    if promote:
        models.promote(tables, version)
    return {
        "model_version": version,
        "status": schema.LIVE if promote else model.status,
        "rows": catalogue.n_events,
        "k": k,
        "noise": fit.noise,
        "objective": list(fit.objective),
        **metrics,
        "seconds": round(time.monotonic() - started, 3),
    }


def read_catalogue(events: DataFrame, known: pd.Series) -> Catalogue:
    """Totals of the events by input, in one pass, and the ids of all inputs: with events, or among ``known``.

    Raises:
        StateError: there are no events, or all labels are equal.
    """
    c, y = F.col(WEIGHT), F.col(LABEL)
    sums = {
        "n": F.count(y),
        "c": F.sum(c),
        "cy": F.sum(c * y),
        "cyy": F.sum(c * y * y),
        "min": F.min(y),
        "max": F.max(y),
    }
    totals = events.groupBy(INPUT_ID).agg(*(value.alias(name) for name, value in sums.items())).toPandas()
    if totals.empty:
        raise StateError("there are no events to train on: run jobs/ingest.py first")
    lowest, highest = float(totals["min"].min()), float(totals["max"].max())
    if lowest == highest:
        raise StateError(f"all {totals['n'].sum()} events have the label {lowest:g}: there is nothing to learn")
    ids = pa.array(sorted({*totals[INPUT_ID], *known}), pa.string())
    counts = np.zeros(len(ids), np.int64)
    counts[blocks.index_of(pa.array(totals[INPUT_ID], pa.string()), ids)] = totals["n"]
    weight, mean, square = (float(totals[name].sum()) for name in ("c", "cy", "cyy"))
    mean /= weight
    return Catalogue(ids, counts, int(counts.sum()), mean, square / weight - mean**2, square, lowest, highest)


def _train(engine: SparkEngine, settings: Settings, user_gram: np.ndarray, catalogue: Catalogue, k: int) -> Fit:
    users = Prior.start(user_gram, k + 1, START_VARIANCE)
    oracle = make_oracle(settings.oracle)
    inputs: InputPrior
    if oracle:
        inputs = OracleBasis.start(oracle, k + 1, START_VARIANCE, settings.oracle.residual)
    else:
        inputs = Prior.start(engine.attributes.T @ engine.attributes, k + 1, START_VARIANCE)
    forced = settings.train.iterations
    schedule = (
        Schedule(settings.train.max_iterations, settings.train.tolerance) if forced == "auto" else Schedule(forced)
    )
    with tqdm(total=schedule.iterations, desc="retrain", unit="pass", disable=None) as bar:

        def report(iteration: int, objective: float) -> None:
            bar.update()
            bar.set_postfix_str(f"objective {objective:.1f}")
            log.info("retrain: iteration %d, objective %.3f", iteration, objective)

        return alternate(engine, users, inputs, catalogue.n_events, catalogue.label_variance, schedule, report)


def _write_users(tables: Tables, partitions: DataFrame, step: UserStep, model: Model) -> int:
    """One last pass: every user's sums and weights under the final features, appended to users; the number of users."""
    write = _users_in_arrow(tables.spark.sparkContext.broadcast(step), model.version)
    kinds = {field.name: field.dataType.simpleString() for field in schema.SCHEMAS[schema.USERS]}
    written = [name for name in kinds if name != schema.REFERENCE_TIME]
    rows = partitions.mapInArrow(write, ", ".join(f"{name} {kinds[name]}" for name in written))
    tables.append(schema.USERS, rows.withColumn(schema.REFERENCE_TIME, F.lit(None).cast("timestamp")))
    return tables.read(schema.USERS).where(F.col(schema.MODEL_VERSION) == model.version).count()


def _users_in_arrow(step: Any, version: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for block in blocks.from_arrow(batches):
            features = step.value.features.take(block.inputs)
            for part, weights, labels in block.parts():
                attributes = block.described(part, step.value.activity)
                a, b = alternation.user_sums(weights, labels, features)
                users = step.value.prior.posteriors(a, b, attributes, step.value.noise)
                columns = {
                    schema.MODEL_VERSION: pa.array(np.full(len(b), version)),
                    schema.USER_ID: block.users[part],
                    schema.A: lists(a),
                    schema.B: lists(b),
                    schema.W: lists(users.mean),
                    schema.PRIOR_MEAN: lists(step.value.prior.mean(attributes)),
                    schema.N_EVENTS: pa.array(block.n_events[part]),
                }
                yield pa.record_batch(list(columns.values()), list(columns))

    return partition
