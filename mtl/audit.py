"""The invariants of the tables, each checked against an answer of its own (design, section 5)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from mtl import features, schema
from mtl.arrivals import shared_inputs
from mtl.arrow import matrix
from mtl.blocks import index_of
from mtl.catalogue import describe_inputs, read_catalogue
from mtl.checkpoint import end_of
from mtl.config import Settings
from mtl.errors import StateError
from mtl.ingest import INGEST
from mtl.losses import LOSSES
from mtl.materialize import features_of
from mtl.model import Model
from mtl.models import load_model, versions
from mtl.recover import batches_of, last_batch, ledger_of
from mtl.replay import in_turns
from mtl.schema import BATCH, INPUT_ID, MODEL_VERSION, USER_ID
from mtl.sharing import cores
from mtl.tables import Tables
from mtl.users import TRAINING, TURN, updated_users

log = logging.getLogger("mtl")

Check = dict[str, Any]


def audit(tables: Tables, settings: Settings) -> dict[str, Any]:
    """Check every invariant; ``failed`` is whether one does not hold, and each check has its own ``holds`` and figures.

    Raises:
        StateError: there is no live model version.
    """
    model = load_model(tables)
    tables.create(schema.WAITING, schema.LEDGER)
    checks = {
        "one_live_version": _one_live(tables),
        "ingest_adds_up": _ingest_adds_up(tables),
        "update_adds_up": _update_adds_up(tables, model),
        "users_equal_scratch": _users_equal_scratch(tables, model, settings.audit.tolerance),
        "features_equal_oracle": _features_equal_oracle(tables, model, settings.audit.tolerance),
    }
    for name, check in checks.items():
        log.info("audit: %s %s", name, check)
    failed = [name for name, check in checks.items() if not check["holds"]]
    return {"model_version": model.version, "failed": bool(failed), "broken": failed, "checks": checks}


def _one_live(tables: Tables) -> Check:
    live = versions(tables).where(F.col(schema.STATUS) == schema.LIVE).count()
    return {"holds": live == 1, "live": live}


def _ingest_adds_up(tables: Tables) -> Check:
    """offered = accepted + duplicates + quarantined of every batch, and events and quarantine hold that many."""
    ledger = tables.read(schema.LEDGER).where((F.col(schema.QUERY) == INGEST) & (F.col(schema.STATE) == schema.DONE))
    batch = F.regexp_replace(schema.APPLICATION_ID, f"^{INGEST}-", "").alias(BATCH)
    counts = (schema.OFFERED, schema.ACCEPTED, schema.DUPLICATES, schema.QUARANTINED)
    written = {
        name: tables.read(table).groupBy(BATCH).agg(F.count(F.lit(1)).alias(name))
        for name, table in (("in_events", schema.EVENTS), ("in_quarantine", schema.QUARANTINE))
    }
    rows = ledger.select(batch, *counts)
    # A batch of attributes has quarantine rows but no ledger row, hence left for quarantine and full for events.
    rows = rows.join(written["in_events"], BATCH, "full").join(written["in_quarantine"], BATCH, "left").fillna(0)
    zero = F.lit(0)
    adds_up = F.col(schema.OFFERED) == sum((F.col(name) for name in counts[1:]), zero)
    stored = (F.col(schema.ACCEPTED) == F.col("in_events")) & (F.col(schema.QUARANTINED) == F.col("in_quarantine"))
    totals = rows.agg(
        F.count(F.lit(1)).alias("batches"),
        *(F.sum(name).alias(name) for name in counts),
        F.count_if(~(adds_up & stored)).alias("wrong"),
        F.first(F.when(~(adds_up & stored), F.col(BATCH)), ignorenulls=True).alias("first_wrong"),
    ).first()
    result = totals.asDict()
    ids = tables.read(schema.EVENTS).agg(F.count(F.lit(1)), F.count_distinct(schema.EVENT_ID)).first()
    return {"holds": result["wrong"] == 0 and ids[0] == ids[1], **result, "repeated_event_ids": ids[0] - ids[1]}


def _update_adds_up(tables: Tables, model: Model) -> Check:
    """Batches are numbered without a gap, and what they and training applied is what the users have."""
    rows = (
        batches_of(tables, model.version)
        .groupBy(schema.APPLICATION_ID)
        .agg(F.count(F.lit(1)).alias("batches"), F.max(schema.BATCH_ID).alias("last"))
    )
    gaps = sum(row["batches"] != row["last"] + 1 for row in rows.collect())
    applied = ledger_of(tables, model.version).agg(F.sum(schema.ACCEPTED)).first()[0] or 0
    trained = tables.read(schema.MODELS).where(F.col(MODEL_VERSION) == model.version).first()[schema.N_EVENTS]
    users = tables.read(schema.USERS).where(F.col(MODEL_VERSION) == model.version)
    total, n, distinct = users.agg(F.sum(schema.N_EVENTS), F.count(F.lit(1)), F.count_distinct(USER_ID)).first()
    check = {
        "holds": not gaps and total == trained + applied and n == distinct,
        "gaps": gaps,
        "trained": trained,
        "streamed": applied,
        "in_users": total,
        "waiting": _waiting(tables, model).count(),
        "repeated_users": n - distinct,
    }
    if not check["holds"]:
        check["advice"] = (
            "a batch that was interrupted ends with jobs/update.py --available-now: run it and audit again"
        )
    return check


def _users_equal_scratch(tables: Tables, model: Model, tolerance: float) -> Check:
    """Every user's row equals one pass over the events that the stream has consumed, from nothing.

    Where the loss is not squared: a replay of training, batches and releases in the ledger's order.
    """
    consumed = _consumed_version(tables, model)
    if consumed is None:
        return {
            "holds": False,
            "reason": "the update stream stopped within a commit: run jobs/update.py --available-now",
        }
    waiting = tables.read(schema.WAITING).where(F.col(MODEL_VERSION) == model.version)
    if LOSSES[model.loss].is_quadratic:
        unreleased = waiting.where(F.col(schema.RELEASED).isNull()).select(schema.EVENT_ID)
        whole = events = tables.read(schema.EVENTS, consumed).join(unreleased, schema.EVENT_ID, "left_anti")
    else:
        try:
            events = in_turns(tables, model, ledger_of(tables, model.version), waiting, consumed)
        except StateError as error:
            return {"holds": False, "reason": str(error)}
        whole = events.withColumn(TURN, F.lit(TRAINING))
    users = tables.read(schema.USERS).where(F.col(MODEL_VERSION) == model.version)
    inputs = shared_inputs(features_of(tables, model).toArrow(), model)
    partitions = cores(tables.spark)

    def from_nothing(events: DataFrame) -> DataFrame:
        described = users.select(USER_ID, schema.PRIOR_MEAN)
        return updated_users(events, users.limit(0), described, model, inputs, partitions)

    scratch = from_nothing(events)
    both = users.where(F.col(schema.N_EVENTS) > 0).alias("stored").join(scratch.alias("scratch"), USER_ID, "full")
    differences = {
        name: _relative(F.col(f"stored.{name}"), F.col(f"scratch.{name}")) for name in (schema.A, schema.B, schema.W)
    }
    counts_differ = ~F.col(f"stored.{schema.N_EVENTS}").eqNullSafe(F.col(f"scratch.{schema.N_EVENTS}"))
    result = both.agg(
        F.count(F.lit(1)).alias("users"),
        F.count_if(counts_differ).alias("counts_differ"),
        *(F.max(difference).alias(f"{name}_difference") for name, difference in differences.items()),
    ).first()
    figures = {name: value or 0 for name, value in result.asDict().items()}
    largest = max(figures[f"{name}_difference"] for name in differences)
    return {
        "holds": not figures["counts_differ"] and largest <= tolerance,
        **figures,
        "tolerance": tolerance,
        "events_version": consumed,
        **({} if whole is events else _refit_gap(users, from_nothing(whole))),
    }


def _refit_gap(users: DataFrame, refitted: DataFrame) -> dict[str, float]:
    """How far weights that learnt in turns are from those that all events at once give; no failure, a measure."""
    both = users.alias("stored").join(refitted.alias("refitted"), USER_ID)
    gap = _relative(F.col(f"stored.{schema.W}"), F.col(f"refitted.{schema.W}"))
    largest, mean = both.agg(F.max(gap), F.mean(gap)).first()
    return {"refit_gap": largest or 0.0, "mean_refit_gap": mean or 0.0}


def _features_equal_oracle(tables: Tables, model: Model, tolerance: float) -> Check:
    """Every features row equals μ + g_0 + δ_0 and [1, g_i + δ_i] with g evaluated afresh."""
    stored = features_of(tables, model).toArrow()
    ids = stored[INPUT_ID].combine_chunks()
    at_training = tables.read(schema.INPUTS, model.inputs_version).toPandas()
    catalogue = read_catalogue(
        tables.read(schema.EVENTS, model.events_version), at_training[INPUT_ID], LOSSES[model.loss]
    )
    artefact = model.artefact
    implicit = matrix(stored[schema.IMPLICIT], artefact.input_implicit)[index_of(catalogue.ids, ids)]
    described = describe_inputs(catalogue.ids, at_training, artefact.input_encoder)
    trained = artefact.inputs.mean(np.column_stack([described, implicit]))
    later = pd.DataFrame({INPUT_ID: ids.filter(pa.array(index_of(ids, catalogue.ids) < 0)).to_pandas()})
    later = later.merge(tables.read(schema.INPUTS).toPandas(), "left", INPUT_ID)
    fresh = np.concatenate([trained, model.input_basis(later.drop(columns=INPUT_ID))])
    order = index_of(ids, pa.concat_arrays([catalogue.ids, pa.array(later[INPUT_ID], pa.string())]))
    expected = fresh[order] + features.residuals(stored, model.d)
    found = features.from_rows(stored, model.d)
    actual = np.column_stack([found.offset - model.mean_label, found.phi[:, 1:]])
    difference = float(np.max(np.abs(actual - expected) / np.maximum(1.0, np.abs(expected)), initial=0.0))
    missing = len(catalogue.ids) - int(np.sum(index_of(catalogue.ids, ids) >= 0))
    repeated = len(ids) - len(ids.unique())
    return {
        "holds": difference <= tolerance and not missing and not repeated,
        "inputs": len(ids),
        "materialized_since": len(later),
        "difference": difference,
        "missing": missing,
        "repeated": repeated,
    }


def _waiting(tables: Tables, model: Model) -> DataFrame:
    rows = tables.read(schema.WAITING).where(F.col(MODEL_VERSION) == model.version)
    return rows.where(F.col(schema.RELEASED).isNull())


def _consumed_version(tables: Tables, model: Model) -> int | None:
    """The events commit through which training and stream have read; None where the stream is within one."""
    last = last_batch(tables, model.version)
    if last is None:
        return model.events_version
    commit, file = end_of(last[schema.OFFSETS])
    return commit - 1 if file < 0 else None


def _relative(stored: Column, scratch: Column) -> Column:
    """Largest absolute difference of two arrays, relative to the largest entry of the second (at least 1)."""
    difference = F.array_max(F.zip_with(stored, scratch, lambda x, y: F.abs(x - y)))
    return difference / F.greatest(F.array_max(F.transform(scratch, F.abs)), F.lit(1.0))
