"""How the update job is doing: figures of every version, of ingest and of the tables, from the tables alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import schema
from mtl.backlog import delays, lag, unreleased
from mtl.batches import ingested
from mtl.checkpoint import end_of
from mtl.drift import Seen, weight_distance
from mtl.layout import SCHEMAS
from mtl.ledger import last_batch
from mtl.model import Model
from mtl.models import load_model
from mtl.progress import MEASURED, SEEN, Progress
from mtl.schema import MODEL_VERSION
from mtl.tables import Tables

_BATCHES = 10_000  # in the plots, the newest
DELAY = "delay"


def status(tables: Tables) -> dict[str, Any]:
    """Figures by version, of ingest, and of the tables' sizes; reads tables that other jobs may be writing, makes none."""
    there = [table for table in SCHEMAS if tables.exists(table)]
    told: dict[str, Any] = {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": []}
    if schema.MODELS in there:
        models = tables.read(schema.MODELS).where(F.col(schema.STATUS) != schema.REQUESTED)
        told["versions"] = [_of_version(tables, row) for row in models.orderBy(MODEL_VERSION).collect()]
    told["offered"], told["quarantined"] = ingested(tables) if schema.LEDGER in there else (0, 0)
    reasons = _rows(tables, schema.QUARANTINE).groupBy(schema.REASON).count().orderBy(F.col("count").desc()).limit(10)
    return told | {
        "reasons": {row[schema.REASON]: row["count"] for row in reasons.collect()},
        "cold_start": _cold_start_of_live(tables, told["versions"]),
        "tables": {table: _size(tables, table) for table in there},
    }


def batches(tables: Tables) -> pd.DataFrame:
    """The newest rows of the progress table in the order of time, with how late each batch was (``delay``, seconds)."""
    newest = _rows(tables, schema.PROGRESS).orderBy(F.col(schema.CREATED_AT).desc()).limit(_BATCHES)
    rows = newest.toPandas().iloc[::-1].reset_index(drop=True)
    rows[DELAY] = np.nan
    if rows.empty:
        return rows
    history = tables.delta(schema.EVENTS).history().select("version", "timestamp").toPandas()
    committed = dict(zip(history["version"], history["timestamp"], strict=True))
    for _, batch in rows[rows[schema.OFFSETS].notna()].groupby(schema.APPLICATION_ID):
        ends = [end_of(offsets) for offsets in batch[schema.OFFSETS]]
        late = delays(-1, ends, list(batch[schema.CREATED_AT]), committed)  # where the first one began is not told here
        rows.loc[batch.index, DELAY] = late
    return rows


def cold_start(progress: pd.DataFrame) -> pd.DataFrame:
    """Mean loss by the number of events that a user had, from rows of the progress table.

    Returns:
        By bin: ``seen``, its lower edge, ``n`` events and their mean ``loss``, also as the ``average`` user and as a
        ``ridge`` about zero would have had them predicted; bins without events are left out.
    """
    names = {"loss": schema.SEEN_LOSS, "average": schema.SEEN_AVERAGE, "ridge": schema.SEEN_RIDGE}
    if progress.empty:
        return pd.DataFrame({name: [] for name in ("seen", "n", *names)})
    n, *losses = (np.sum(np.stack(progress[name]), axis=0) for name in (schema.SEEN_N, *names.values()))
    some = n > 0
    means = {name: loss[some] / n[some] for name, loss in zip(names, losses, strict=True)}
    return pd.DataFrame({"seen": np.array(SEEN)[some], "n": n[some].astype(int), **means})


def _rows(tables: Tables, table: str) -> DataFrame:
    return tables.read(table) if tables.exists(table) else tables.spark.createDataFrame([], SCHEMAS[table])


def _of_version(tables: Tables, row: Row) -> dict[str, Any]:
    version = row[MODEL_VERSION]
    rows = _rows(tables, schema.PROGRESS).where(F.col(MODEL_VERSION) == version)
    is_measured = F.col(schema.VALIDATED) > 0
    scale = F.when(is_measured, F.col(schema.N_EVENTS) / F.col(schema.VALIDATED))  # a batch counts by all its events
    sums = rows.agg(
        F.count(F.lit(1)).alias("batches"),
        F.sum(schema.N_EVENTS).alias("events"),
        F.sum(F.when(is_measured, F.col(schema.N_EVENTS))).alias("n"),
        *(F.sum(F.col(name) * scale).alias(name) for name in MEASURED),
        F.max(schema.CREATED_AT).alias("last"),
    ).first()
    told = {
        "version": version,
        "status": row[schema.STATUS],
        "created": row[schema.CREATED_AT].isoformat(timespec="seconds"),
        "loss": row[schema.LOSS],
        "batches": sums["batches"],
        "events_applied": sums["events"] or 0,
        "waiting": unreleased(tables, version).count() if tables.exists(schema.WAITING) else 0,
        "last_batch": sums["last"].isoformat(timespec="seconds") if sums["last"] else None,
    }
    if row[schema.STATUS] in (schema.LIVE, schema.CANDIDATE):
        told |= lag(tables, _consumed(tables, version, row[schema.EVENTS_VERSION]))
    n = sums["n"] or 0
    if n:
        model = load_model(tables, version)
        told |= {
            "mean_loss": sums[schema.LOSS] / n,
            "mae": sums[schema.ABSOLUTE] / n,
            "standardized_error": sums[schema.STANDARDIZED] / n,
            "coverage90": sums[schema.COVERED] / n,
            "bias": (sums[schema.PREDICTION_SUM] - sums[schema.LABEL_SUM]) / n,
            "input_drift": _input_drift(tables, model),
            "weight_distance": weight_distance(tables, model),
        }
    return told


def _consumed(tables: Tables, version: int, trained: int) -> int:
    """The last commit of events of which every file has been applied."""
    last = last_batch(tables, version) if tables.exists(schema.LEDGER) else None
    return end_of(last[schema.OFFSETS])[0] - 1 if last else trained


def _input_drift(tables: Tables, model: Model) -> float:
    """Of the last batch that had events to predict."""
    rows = tables.read(schema.PROGRESS).where((F.col(MODEL_VERSION) == model.version) & (F.col(schema.VALIDATED) > 0))
    row = rows.orderBy(F.col(schema.CREATED_AT).desc()).first()
    recent = Progress.nothing(model.d)
    recent.n[0] = row[schema.VALIDATED]
    recent.phi[:] = row[schema.PHI_SUM]
    return Seen.of_version(tables, model.version).distance(recent)


def _cold_start_of_live(tables: Tables, versions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over all batches of the live version."""
    live = [told["version"] for told in versions if told["status"] == schema.LIVE]
    vectors = (schema.SEEN_N, schema.SEEN_LOSS, schema.SEEN_AVERAGE, schema.SEEN_RIDGE)
    rows = _rows(tables, schema.PROGRESS).where(F.col(MODEL_VERSION).isin(live))
    sums = [F.sum(F.col(name)[i]) for name in vectors for i in range(len(SEEN))]
    found = rows.agg(*sums).first() if live else [None]
    if found[0] is None:
        return []
    totals = np.array(found).reshape(len(vectors), -1)
    return cold_start(pd.DataFrame([dict(zip(vectors, totals, strict=True))])).to_dict("records")


def _size(tables: Tables, table: str) -> dict[str, int]:
    row = tables.delta(table).detail().select("numFiles", "sizeInBytes").first()
    return {"files": row["numFiles"], "bytes": row["sizeInBytes"], "commit": tables.version(table)}
