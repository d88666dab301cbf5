"""A retraining from tables to tables: events in, one model version with its features and users out."""

from __future__ import annotations

import time
from typing import Any

from pyspark.sql import DataFrame

from mtl import models, schema, tracking
from mtl.config import Settings, TrainSettings
from mtl.drift import seen_in_training
from mtl.fitting import train
from mtl.model import Model, model_row
from mtl.resume import Checkpoint
from mtl.start import Live
from mtl.tables import Tables, as_long_as_kept


def retrain(tables: Tables, settings: Settings, promote: bool = False) -> dict[str, Any]:
    """Train a new model version over all events and write its features, its users and its row in models, in this order.

    The first version goes live; later ones are candidates unless ``promote``.

    Raises:
        StateError: there are no events, or another retraining is running.
        ConfigError: MLflow is wanted and not installed.
    """
    with models.one_retraining(tables):
        return _retrain(tables, settings, promote)


def _retrain(tables: Tables, settings: Settings, promote: bool) -> dict[str, Any]:
    started, tracked = time.monotonic(), tracking.is_tracked(settings)
    events_version, inputs_version = tables.version(schema.EVENTS), tables.version(schema.INPUTS)
    users_version, live = tables.version(schema.USER_ATTRIBUTES), _live(tables, settings.train)
    versions = events_version, inputs_version, users_version, live.model.version if live else None
    trained = train(
        tables.read(schema.EVENTS, events_version),
        tables.read(schema.INPUTS, inputs_version),
        tables.read(schema.USER_ATTRIBUTES, users_version),
        settings,
        live,
        _checkpoint(settings, str(tables.root), *versions),
    )
    try:
        version = models.next_version(tables)
        status = schema.CANDIDATE if models.has_live(tables) else schema.LIVE
        model = trained.model(version, status, events_version, inputs_version)
        tables.append(schema.FEATURES, trained.feature_rows(version))
        tables.append(schema.USERS, trained.user_rows(version))
    finally:
        trained.engine.close()
    features = tables.of_version(schema.FEATURES, version)
    seen = seen_in_training(features, trained.catalogue.ids, trained.catalogue.counts, model.d)
    n_users = tables.of_version(schema.USERS, version).count()
    result = {**trained.report, "users": n_users, **seen.metrics, "seconds": round(time.monotonic() - started, 3)}
    objective = trained.fit.objective
    row = model_row(model, settings.model.form, objective, trained.catalogue.n_events, result, settings)
    models.publish(tables, row)
    if promote:
        models.promote(tables, version)
    status = schema.LIVE if promote else status
    report = {"model_version": version, "status": status, **result, "objective": list(objective)}
    return {**report, "mlflow_run": tracking.record(tables, settings, model, report)} if tracked else report


def _live(tables: Tables, settings: TrainSettings) -> Live | None:
    begins = (settings.warm_start or settings.incremental) and models.has_live(tables)
    if not settings.lock and not begins:
        return None
    model = models.load_model(tables)
    features = tables.of_version(schema.FEATURES, model.version)
    return Live(model, features, _batches(tables, model) if settings.incremental else None)


def _batches(tables: Tables, model: Model) -> DataFrame:
    """Of the events that a version was trained on, read at once."""
    gone = f"train.incremental: the events that version {model.version} was trained on have been vacuumed: train on all"
    with as_long_as_kept(gone):
        batches = tables.read(schema.EVENTS, model.events_version).select(schema.BATCH).distinct()
        return tables.spark.createDataFrame(batches.toArrow())


def _checkpoint(settings: Settings, *data: object) -> Checkpoint | None:
    return Checkpoint.of(settings.train.checkpoint, settings, *data) if settings.train.checkpoint else None
