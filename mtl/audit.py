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
from mtl.arrow import matrix
from mtl.backlog import unreleased
from mtl.batches import INGEST, batch_name
from mtl.blocks import index_of
from mtl.catalogue import describe_inputs
from mtl.config import Settings
from mtl.errors import StateError
from mtl.ledger import ERASE, added, batches_of, consumed
from mtl.losses import LOSSES
from mtl.model import Model
from mtl.models import load_model, versions
from mtl.rebuild import applied, at_once, rebuilt
from mtl.schema import BATCH, INPUT_ID, USER_ID
from mtl.tables import Tables, as_long_as_kept

log = logging.getLogger("mtl")

Check = dict[str, Any]


def audit(tables: Tables, settings: Settings) -> dict[str, Any]:
    """Check every invariant; ``failed`` is whether one does not hold, and each check has its own ``holds`` and figures.

    Raises:
        StateError: there is no live model version.
    """
    model = load_model(tables)
    tables.create(schema.WAITING, schema.LEDGER, schema.ERASURES)
    checks = {
        "one_live_version": _one_live(tables),
        "ingest_adds_up": _ingest_adds_up(tables),
        "erasures_done": _erasures_done(tables),
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


def _erasures_done(tables: Tables) -> Check:
    pending = tables.read(schema.ERASURES).where(F.col(schema.STATE) == schema.PLANNED).count()
    advice = {"advice": "an erasure that was interrupted ends with jobs/erase.py"} if pending else {}
    return {"holds": not pending, "pending": pending, **advice}


def _ingest_adds_up(tables: Tables) -> Check:
    """offered = accepted + duplicates + quarantined of every batch; events and quarantine hold that many less the erased."""
    ledger = tables.read(schema.LEDGER).where((F.col(schema.QUERY) == INGEST) & (F.col(schema.STATE) == schema.DONE))
    batch = batch_name().alias(BATCH)
    counts = (schema.OFFERED, schema.ACCEPTED, schema.DUPLICATES, schema.QUARANTINED)
    erased = tables.read(schema.LEDGER).where(F.col(schema.QUERY) == ERASE)
    of = F.regexp_extract(schema.APPLICATION_ID, f"^{ERASE}-(.+)-", 1).alias(BATCH)  # names of batches may have a -
    erased = erased.where(~of.rlike("^v[0-9]+$")).select(of, schema.ACCEPTED, schema.QUARANTINED)
    written = {
        name: tables.read(table)
        .select(BATCH, F.lit(1).alias(name))
        .unionAll(erased.where(F.col(count).isNotNull()).select(BATCH, -F.col(count)))
        .groupBy(BATCH)
        .agg(F.sum(name).alias(name))
        for name, table, count in (
            ("in_events", schema.EVENTS, schema.ACCEPTED),
            ("in_quarantine", schema.QUARANTINE, schema.QUARANTINED),
        )
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
    """Batches are numbered without a gap, and what they and training applied, less what was erased, is what the users have."""
    rows = (
        batches_of(tables, model.version)
        .groupBy(schema.APPLICATION_ID)
        .agg(F.count(F.lit(1)).alias("batches"), F.max(schema.BATCH_ID).alias("last"))
    )
    gaps = sum(row["batches"] != row["last"] + 1 for row in rows.collect())
    streamed, erased = added(tables, model.version), added(tables, model.version, ERASE)
    trained = tables.of_version(schema.MODELS, model.version).first()[schema.N_EVENTS]
    users = tables.of_version(schema.USERS, model.version)
    total, n, distinct = users.agg(F.sum(schema.N_EVENTS), F.count(F.lit(1)), F.count_distinct(USER_ID)).first()
    check = {
        "holds": not gaps and total == trained + streamed + erased and n == distinct,
        "gaps": gaps,
        "trained": trained,
        "streamed": streamed,
        "erased": -erased,
        "in_users": total,
        "waiting": unreleased(tables, model.version).count(),
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
    commit = consumed(tables, model)
    if commit is None:
        return {
            "holds": False,
            "reason": "the update stream stopped within a commit: run jobs/update.py --available-now",
        }
    try:
        events = applied(tables, model, commit)
    except StateError as error:
        return {"holds": False, "reason": str(error)}
    users = tables.of_version(schema.USERS, model.version)
    scratch = rebuilt(tables, model, events)
    both = users.where(F.col(schema.N_EVENTS) > 0).alias("stored").join(scratch.alias("scratch"), USER_ID, "full")
    differences = {
        name: _relative(F.col(f"stored.{name}"), F.col(f"scratch.{name}")) for name in (schema.A, schema.B, schema.W)
    }
    counts_differ, times_differ = (
        ~F.col(f"stored.{name}").eqNullSafe(F.col(f"scratch.{name}"))
        for name in (schema.N_EVENTS, schema.REFERENCE_TIME)
    )
    result = both.agg(
        F.count(F.lit(1)).alias("users"),
        F.count_if(counts_differ).alias("counts_differ"),
        F.count_if(times_differ).alias("reference_times_differ"),
        *(F.max(difference).alias(f"{name}_difference") for name, difference in differences.items()),
    ).first()
    figures = {name: value or 0 for name, value in result.asDict().items()}
    largest = max(figures[f"{name}_difference"] for name in differences)
    return {
        "holds": not (figures["counts_differ"] or figures["reference_times_differ"]) and largest <= tolerance,
        **figures,
        "tolerance": tolerance,
        "events_version": commit,
        **(
            {}
            if LOSSES[model.loss].is_quadratic
            else _refit_gap(users, rebuilt(tables, model, at_once(tables, model, commit)))
        ),
    }


def _refit_gap(users: DataFrame, refitted: DataFrame) -> dict[str, float]:
    """How far weights that learnt in turns are from those that all events at once give; no failure, a measure."""
    both = users.alias("stored").join(refitted.alias("refitted"), USER_ID)
    gap = _relative(F.col(f"stored.{schema.W}"), F.col(f"refitted.{schema.W}"))
    largest, mean = both.agg(F.max(gap), F.mean(gap)).first()
    return {"refit_gap": largest or 0.0, "mean_refit_gap": mean or 0.0}


def _features_equal_oracle(tables: Tables, model: Model, tolerance: float) -> Check:
    """Every features row equals μ + g_0 + δ_0 and [1, g_i + δ_i] with g evaluated afresh.

    Training had the attributes of its time; an input that came after it has those of some time since.
    """
    stored, artefact = tables.of_version(schema.FEATURES, model.version).toArrow(), model.artefact
    ids = stored[INPUT_ID].combine_chunks()
    with as_long_as_kept(f"the inputs that version {model.version} was trained on have been vacuumed: retrain"):
        at_training = tables.read(schema.INPUTS, model.inputs_version).toPandas()
    described = describe_inputs(ids, at_training, artefact.input_encoder)
    expected = artefact.inputs.mean(
        np.column_stack([described, matrix(stored[schema.IMPLICIT], artefact.input_implicit)])
    )
    found, residual = features.from_rows(stored, model.d), features.residuals(stored, model.d)
    actual = np.column_stack([found.offset - model.mu, found.phi[:, 1:]])
    differences = _largest(actual - residual, expected)
    known = pa.array(at_training[INPUT_ID], pa.string())
    later = stored[schema.N_EVENTS].is_valid().to_numpy() & (index_of(ids, known) < 0)
    if later.any():
        attributes = _attributes_since(tables, model, ids.filter(pa.array(later)))
        place = index_of(pa.array(attributes[INPUT_ID], pa.string()), ids)
        of_each = _largest((actual - residual)[place], model.input_basis(attributes.drop(columns=INPUT_ID)))
        differences[later] = np.inf
        np.minimum.at(differences, place, of_each)
    missing, repeated = int(np.sum(index_of(known, ids) < 0)), len(ids) - len(ids.unique())
    difference = float(np.max(differences, initial=0.0))
    return {
        "holds": difference <= tolerance and not missing and not repeated,
        "inputs": len(ids),
        "materialized_since": int(later.sum()),
        "difference": difference,
        "missing": missing,
        "repeated": repeated,
    }


def _largest(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row the largest difference relative to what is expected (at least 1), (n,)."""
    return np.max(np.abs(actual - expected) / np.maximum(1.0, np.abs(expected)), axis=1)


def _attributes_since(tables: Tables, model: Model, ids: pa.Array) -> pd.DataFrame:
    """All attribute rows that these inputs have had since training, the present ones among them."""
    wanted = F.broadcast(tables.spark.createDataFrame(pa.table({INPUT_ID: ids})))
    now = tables.read(schema.INPUTS)
    rows = [now.join(wanted, INPUT_ID, "left_semi").toPandas()]
    try:
        with as_long_as_kept(""):
            written = tables.changes(schema.INPUTS, model.inputs_version + 1)
            written = written.where(F.col("_change_type").isin("insert", "update_postimage"))
            rows.append(written.join(wanted, INPUT_ID, "left_semi").select(now.columns).toPandas())
    except StateError:
        log.info("audit: what inputs were since training is no longer kept: their present attributes are all there is")
    return pd.concat(rows, ignore_index=True)


def _relative(stored: Column, scratch: Column) -> Column:
    """Largest absolute difference of two arrays, relative to the largest entry of the second (at least 1)."""
    difference = F.array_max(F.zip_with(stored, scratch, lambda x, y: F.abs(x - y)))
    return difference / F.greatest(F.array_max(F.transform(scratch, F.abs)), F.lit(1.0))
