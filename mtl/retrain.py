"""A retraining from tables to tables: events in, one model version with its features and users out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from tqdm import tqdm

from mtl import alternation, gaussian, models, schema
from mtl.arrow import lists
from mtl.basis import InputPrior, OracleBasis
from mtl.blocks import EventBlock
from mtl.catalogue import Catalogue, describe_inputs, read_catalogue
from mtl.config import Settings, TrainSettings
from mtl.distributed import DistributedEngine
from mtl.encode import Activity, Encoder
from mtl.engine import SparkEngine
from mtl.features import Features, feature_rows
from mtl.gaussian import Posterior
from mtl.models import Artefact, Model
from mtl.oracle import make_oracle
from mtl.oracle.imports import load_object
from mtl.partitions import encode_users, partition_events, user_totals
from mtl.pipeline import PipelineEncoder
from mtl.prior import Prior
from mtl.schema import INPUT_ID, USER_ID
from mtl.tables import Tables
from mtl.train import START_VARIANCE, Fit, Schedule, alternate

log = logging.getLogger("mtl")

MAX_K = 20
ENCODER_ROWS = 200_000  # rows of an attribute table that the encodings are chosen from


@dataclass(frozen=True)
class Trained:
    """A fitted model with all that its rows are written from; ``partitions`` stay persisted until unpersisted."""

    partitions: DataFrame
    engine: SparkEngine | DistributedEngine
    fit: Fit
    catalogue: Catalogue
    user_encoder: Encoder
    input_encoder: Encoder | PipelineEncoder
    input_activity: Activity | None
    user_activity: Activity | None
    k: int
    events_version: int
    inputs_version: int


def retrain(tables: Tables, settings: Settings, promote: bool = False) -> dict[str, Any]:
    """Train a new model version over all events and write its features, its users and its row in models, in this order.

    The first version goes live; later ones are candidates unless ``promote``.

    Raises:
        StateError: there are no events.
    """
    started = time.monotonic()
    trained = train(tables, settings)
    try:
        version = models.next_version(tables)
        model = _model(trained, version, schema.CANDIDATE if models.has_live(tables) else schema.LIVE)
        n_users = _write(tables, trained, model)
    finally:
        trained.partitions.unpersist()
    fit, catalogue = trained.fit, trained.catalogue
    result = {
        "rows": catalogue.n_events,
        "users": n_users,
        "inputs": len(catalogue.ids),
        "k": trained.k,
        "noise": fit.noise,
        "iterations": fit.iterations,
        "refused_oracle_steps": getattr(fit.inputs, "refused", 0),
        "seconds": round(time.monotonic() - started, 3),
    }
    models.publish(tables, model, fit.objective, catalogue.n_events, result, settings.model_dump_json())
    if promote:
        models.promote(tables, version)
    status = schema.LIVE if promote else model.status
    return {"model_version": version, "status": status, **result, "objective": list(fit.objective)}


def train(tables: Tables, settings: Settings) -> Trained:
    """Fit users, inputs and priors over all events; nothing is written.

    Raises:
        StateError: there are no events, or all labels are equal.
    """
    events_version, inputs_version = tables.version(schema.EVENTS), tables.version(schema.INPUTS)
    events = tables.read(schema.EVENTS, events_version)
    input_rows = tables.read(schema.INPUTS, inputs_version)
    attributes = input_rows.toPandas()
    catalogue = read_catalogue(events, attributes[INPUT_ID])
    log.info("retrain: %d events, %d inputs", catalogue.n_events, len(catalogue.ids))

    identity = settings.oracle.kind == "identity"
    input_encoder = _input_encoder(settings, attributes.drop(columns=INPUT_ID), input_rows.drop(INPUT_ID).schema)
    input_activity = catalogue.activity() if settings.encode.activity and not identity else None
    described = describe_inputs(catalogue, attributes, input_encoder, input_activity)

    user_attributes = tables.read(schema.USER_ATTRIBUTES)
    sample = user_attributes.limit(ENCODER_ROWS).toPandas().drop(columns=USER_ID)
    user_encoder = Encoder.fit(sample, settings.encode)
    encoded = encode_users(user_attributes, user_encoder) if user_encoder.width > 1 else None
    n_partitions = settings.train.partitions or tables.spark.sparkContext.defaultParallelism
    partitions = partition_events(events, encoded, user_encoder.width, catalogue.ids, n_partitions)

    totals = user_totals(partitions)
    user_activity = totals.activity() if input_activity else None
    k = _dimensions(settings, totals.n_users, len(catalogue.ids))
    mean, squares, seed = catalogue.mean_label, catalogue.squared_labels, settings.train.seed
    make = DistributedEngine if _distributes(settings.train, len(catalogue.ids), k) else SparkEngine
    engine = make(partitions, described, mean, squares, k, seed, user_activity)
    fit = _fit(engine, settings, totals.gram_with(user_activity), catalogue, k)
    return Trained(
        partitions,
        engine,
        fit,
        catalogue,
        user_encoder,
        input_encoder,
        input_activity,
        user_activity,
        k,
        events_version,
        inputs_version,
    )


def _input_encoder(settings: Settings, attributes: pd.DataFrame, kinds: T.StructType) -> Encoder | PipelineEncoder:
    if settings.oracle.pipeline:
        make = load_object("oracle.pipeline", settings.oracle.pipeline)
        return PipelineEncoder.fit(attributes, kinds, make())
    used = attributes.iloc[:, :0] if settings.oracle.kind == "identity" else attributes
    return Encoder.fit(used, settings.encode)


def _dimensions(settings: Settings, n_users: int, n_inputs: int) -> int:
    """k as forced, or as many as the data can tell apart up to a maximum; what is too many the priors shrink."""
    if settings.model.k != "auto":
        return settings.model.k
    return max(1, min(MAX_K, n_users - 1, n_inputs - 1))


def _model(trained: Trained, version: int, status: str) -> Model:
    catalogue, fit = trained.catalogue, trained.fit
    artefact = Artefact(trained.user_encoder, trained.input_encoder, trained.input_activity, fit.users, fit.inputs)
    return Model(
        version=version,
        status=status,
        k=trained.k,
        mean_label=catalogue.mean_label,
        noise=fit.noise,
        label_min=catalogue.label_min,
        label_max=catalogue.label_max,
        events_version=trained.events_version,
        inputs_version=trained.inputs_version,
        artefact=artefact,
    )


def _write(tables: Tables, trained: Trained, model: Model) -> int:
    """Append the version's features and, in one last pass over the events, its users; the number of users."""
    ids, fit = tables.spark.sparkContext.broadcast(trained.catalogue.ids), trained.fit

    def of_inputs(first: int, inputs: Posterior, attributes: np.ndarray) -> pa.Table:
        features = Features.of(inputs.mean, inputs.covariance, model.mean_label)
        residual = inputs.mean - fit.inputs.mean(attributes)
        return feature_rows(model.version, ids.value.slice(first, len(attributes)), features, residual)

    tables.append(schema.FEATURES, trained.engine.feature_rows(of_inputs, _ddl(schema.FEATURES)))
    arguments = (fit.users, fit.noise, trained.user_activity, model.version)
    users = trained.engine.user_rows(_users_of_block, arguments, _ddl(schema.USERS, without=schema.REFERENCE_TIME))
    tables.append(schema.USERS, users.withColumn(schema.REFERENCE_TIME, F.lit(None).cast("timestamp")))
    return tables.read(schema.USERS).where(F.col(schema.MODEL_VERSION) == model.version).count()


def _users_of_block(block: EventBlock, features: Features, arguments: Any) -> Iterator[pa.Table]:
    """Sums and weights of the block's users under the final features."""
    prior, noise, activity, version = arguments
    assert block.users is not None
    for part, weights, labels in block.parts():
        attributes = block.described(part, activity)
        a, b = alternation.user_sums(weights, labels, features)
        columns = {
            schema.MODEL_VERSION: pa.array(np.full(len(b), version)),
            schema.USER_ID: block.users[part],
            schema.A: lists(a),
            schema.B: lists(b),
            schema.W: lists(prior.posteriors(a, b, attributes, noise).mean),
            schema.PRIOR_MEAN: lists(prior.mean(attributes)),
            schema.N_EVENTS: pa.array(block.n_events[part]),
        }
        yield pa.table(columns)


def _ddl(table: str, without: str = "") -> str:
    return ", ".join(f"{c.name} {c.dataType.simpleString()}" for c in schema.SCHEMAS[table] if c.name != without)


def _distributes(settings: TrainSettings, n_inputs: int, k: int) -> bool:
    """Whether the inputs' sums stay in Spark: as forced, or when they would pass the driver's limit."""
    megabytes = n_inputs * gaussian.packed_length(k + 2) * 8 / 1e6
    if settings.reduction == "auto":
        return megabytes > settings.driver_limit_mb
    return settings.reduction == "distributed"


def _fit(
    engine: SparkEngine | DistributedEngine, settings: Settings, user_gram: np.ndarray, catalogue: Catalogue, k: int
) -> Fit:
    users = Prior.start(user_gram, k + 1, START_VARIANCE)
    oracle = make_oracle(settings.oracle)
    inputs: InputPrior
    if oracle:
        inputs = OracleBasis.start(oracle, k + 1, START_VARIANCE, settings.oracle.residual)
    else:
        inputs = Prior.start(engine.gram(), k + 1, START_VARIANCE)
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
