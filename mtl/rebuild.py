"""Users' rows computed from nothing: from the events that training and stream have given them, as the tables hold these now."""

from __future__ import annotations

import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import features, schema
from mtl.losses import LOSSES
from mtl.materialize import features_of
from mtl.model import Model
from mtl.replay import in_turns, snapshot
from mtl.schema import EVENT_ID, INPUT_ID, MODEL_VERSION, USER_ID
from mtl.tables import Tables
from mtl.update import QUERY
from mtl.users import TRAINING, TURN, SharedInputs, updated_users


def ledger_of(tables: Tables, model: Model, query: str = QUERY) -> DataFrame:
    """The ledger rows of a version's batches and releases; or of its erasures."""
    rows = tables.read(schema.LEDGER).where(F.col(schema.QUERY) == query)
    return rows.where(F.split(schema.APPLICATION_ID, "-")[1] == f"v{model.version}")


def batches_of(tables: Tables, model: Model) -> DataFrame:
    """The ledger rows of the stream's own batches, without the releases."""
    return ledger_of(tables, model).where(F.col(schema.OFFSETS).isNotNull())


def consumed(tables: Tables, model: Model) -> int | None:
    """The events commit through which training and stream have read; None where the stream is within one."""
    last = batches_of(tables, model).orderBy(F.col(schema.BATCH_ID).desc()).first()
    if last is None:
        return model.events_version
    offset = json.loads(last[schema.OFFSETS])
    return offset["reservoirVersion"] - 1 if offset["index"] < 0 else None


def waiting_of(tables: Tables, model: Model) -> DataFrame:
    """The version's waiting events, released or not."""
    return tables.read(schema.WAITING).where(F.col(MODEL_VERSION) == model.version)


def applied(tables: Tables, model: Model, commit: int) -> DataFrame:
    """Events through a commit that users have in their sums, with their turns where the loss is not squared.

    Raises:
        StateError: the order of turns is no longer known.
    """
    if LOSSES[model.loss].is_quadratic:
        return at_once(tables, model, commit)
    return in_turns(tables, model, ledger_of(tables, model), waiting_of(tables, model), commit)


def at_once(tables: Tables, model: Model, commit: int) -> DataFrame:
    """The events of :func:`applied`, all in one turn: what a refit sees."""
    events, kept = snapshot(tables, commit)
    unreleased = waiting_of(tables, model).where(F.col(schema.RELEASED).isNull()).select(EVENT_ID)
    return kept(events).join(unreleased, EVENT_ID, "left_anti").withColumn(TURN, F.lit(TRAINING))


def rebuilt(tables: Tables, model: Model, events: DataFrame, only: DataFrame | None = None) -> DataFrame:
    """Rows of users (:data:`mtl.users.WRITTEN`) with these events and no others; prior means are those that are stored.

    Args:
        only: user_id of all users that the events are of; None: of any.
    """
    users = tables.read(schema.USERS).where(F.col(MODEL_VERSION) == model.version)
    if only is not None:
        users, events = (rows.join(F.broadcast(only), USER_ID, "left_semi") for rows in (users, events))
    rows = features_of(tables, model).toArrow()
    inputs = SharedInputs(rows[INPUT_ID].combine_chunks(), features.from_rows(rows, model.d))
    described = users.select(USER_ID, schema.PRIOR_MEAN)
    partitions = tables.spark.sparkContext.defaultParallelism
    return updated_users(events, users.limit(0), described, model, inputs, partitions)
