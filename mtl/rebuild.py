"""Users' rows computed from nothing: from the events that training and stream have given them, as the tables hold these now."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrivals import shared_inputs
from mtl.backlog import unreleased
from mtl.ledger import ledger_of
from mtl.losses import LOSSES
from mtl.model import Model
from mtl.replay import in_turns, snapshot
from mtl.schema import EVENT_ID, USER_ID
from mtl.sharing import cores
from mtl.tables import Tables
from mtl.users import TRAINING, TURN, updated_users


def applied(tables: Tables, model: Model, commit: int) -> DataFrame:
    """Events through a commit that users have in their sums, with their turns where the loss is not squared.

    Raises:
        StateError: the order of turns is no longer known.
    """
    if LOSSES[model.loss].is_quadratic:
        return at_once(tables, model, commit)
    return in_turns(
        tables, model, ledger_of(tables, model.version), tables.of_version(schema.WAITING, model.version), commit
    )


def at_once(tables: Tables, model: Model, commit: int) -> DataFrame:
    """The events of :func:`applied`, all in one turn: what a refit sees."""
    events, kept = snapshot(tables, commit)
    return (
        kept(events)
        .join(unreleased(tables, model.version).select(EVENT_ID), EVENT_ID, "left_anti")
        .withColumn(TURN, F.lit(TRAINING))
    )


def rebuilt(tables: Tables, model: Model, events: DataFrame, only: DataFrame | None = None) -> DataFrame:
    """Rows of users (:data:`mtl.users.WRITTEN`) with these events and no others; prior means are those that are stored.

    Args:
        only: user_id of all users that the events are of; None: of any.
    """
    users = tables.of_version(schema.USERS, model.version)
    if only is not None:
        users, events = (rows.join(F.broadcast(only), USER_ID, "left_semi") for rows in (users, events))
    inputs = shared_inputs(tables.of_version(schema.FEATURES, model.version).toArrow(), model)
    described = users.select(USER_ID, schema.PRIOR_MEAN)
    partitions = cores(tables.spark)
    return updated_users(events, users.limit(0), described, model, inputs, partitions)
