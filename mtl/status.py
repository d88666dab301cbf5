"""How the update job is doing: figures of every version from the tables, and a page that shows them."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrivals import shared_inputs
from mtl.drift import seen_in_training, weight_distance
from mtl.figures import Curve, plot_curves
from mtl.materialize import features_of
from mtl.model import Model
from mtl.models import load_model
from mtl.progress import SEEN, Progress
from mtl.schema import MODEL_VERSION
from mtl.tables import Tables

_SHOWN = 4  # versions in a plot, the newest
_SUMS = (schema.LOSS, schema.ABSOLUTE, schema.STANDARDIZED, schema.COVERED)
_STATE_TABLES = (
    schema.EVENTS,
    schema.QUARANTINE,
    schema.MODELS,
    schema.FEATURES,
    schema.USERS,
    schema.WAITING,
    schema.LEDGER,
    schema.PROGRESS,
)


def status(tables: Tables) -> dict[str, Any]:
    """Figures by version, of ingest, and of the tables' sizes; from tables that other jobs may be writing."""
    tables.create(*_STATE_TABLES)
    rows = tables.read(schema.MODELS).where(F.col(schema.STATUS) != schema.REQUESTED).orderBy(MODEL_VERSION).collect()
    versions = [_of_version(tables, row[MODEL_VERSION], row[schema.STATUS], row[schema.CREATED_AT]) for row in rows]
    reasons = tables.read(schema.QUARANTINE).groupBy(schema.REASON).count().orderBy(F.col("count").desc()).limit(10)
    ingested = tables.read(schema.LEDGER).where(F.col(schema.STATE) == schema.DONE)
    offered, quarantined = ingested.agg(F.sum(schema.OFFERED), F.sum(schema.QUARANTINED)).first()
    return {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "offered": offered or 0,
        "quarantined": quarantined or 0,
        "reasons": {row[schema.REASON]: row["count"] for row in reasons.collect()},
        "tables": {table: _size(tables, table) for table in _STATE_TABLES},
    }


def batches(tables: Tables) -> pd.DataFrame:
    """The progress table as a frame in the order of time."""
    return tables.read(schema.PROGRESS).orderBy(schema.CREATED_AT).toPandas()


def cold_start(progress: pd.DataFrame) -> pd.DataFrame:
    """Mean loss by the number of events that a user had, from rows of the progress table.

    Returns:
        By bin: ``seen``, its lower edge, ``n`` events and their mean ``loss``; bins without events are left out.
    """
    if progress.empty:
        return pd.DataFrame({"seen": [], "n": [], "loss": []})
    n, loss = (np.sum(np.stack(progress[name]), axis=0) for name in (schema.SEEN_N, schema.SEEN_LOSS))
    some = n > 0
    return pd.DataFrame({"seen": np.array(SEEN)[some], "n": n[some], "loss": loss[some] / n[some]})


def page(told: Mapping[str, Any], progress: pd.DataFrame) -> str:
    """One HTML page that needs nothing else: tables, and plots of the newest versions."""
    parts = [f"<h1>oracle-mtl</h1><p>As of {told['at']}.</p>", "<h2>Versions</h2>", _table(_flat(told["versions"]))]
    if progress.empty:
        parts.append("<p>The update job has not applied an event yet: there is nothing to draw.</p>")
    else:
        shown = sorted(progress[MODEL_VERSION].unique())[-_SHOWN:]
        of = {f"version {version}": progress[progress[MODEL_VERSION] == version] for version in shown}
        parts.append("<h2>Progressive validation</h2><p>Every event is predicted before it is learnt from.</p>")
        parts += [_image(*plot) for plot in _plots(of)]
    parts += ["<h2>Refused rows</h2>", _refused(told)]
    parts += ["<h2>Tables</h2>", _table([{"table": name, **size} for name, size in told["tables"].items()])]
    return _PAGE.format("\n".join(parts))


def _of_version(tables: Tables, version: int, state: str, created: datetime) -> dict[str, Any]:
    rows = tables.read(schema.PROGRESS).where(F.col(MODEL_VERSION) == version)
    sums = rows.agg(
        F.count(F.lit(1)).alias("batches"),
        F.sum(schema.N_EVENTS).alias("events"),
        F.sum(schema.VALIDATED).alias("n"),
        *(F.sum(name).alias(name) for name in _SUMS),
        F.sum(schema.PREDICTION_SUM).alias(schema.PREDICTION_SUM),
        F.sum(schema.LABEL_SUM).alias(schema.LABEL_SUM),
        F.max(schema.CREATED_AT).alias("last"),
    ).first()
    waiting = tables.read(schema.WAITING).where((F.col(MODEL_VERSION) == version) & F.col(schema.RELEASED).isNull())
    told = {
        "version": version,
        "status": state,
        "created": created.isoformat(timespec="seconds"),
        "batches": sums["batches"],
        "events_applied": sums["events"] or 0,
        "waiting": waiting.count(),
        "last_batch": sums["last"].isoformat(timespec="seconds") if sums["last"] else None,
    }
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


def _input_drift(tables: Tables, model: Model) -> float:
    """Of the last batch."""
    last = tables.read(schema.PROGRESS).where(F.col(MODEL_VERSION) == model.version)
    row = last.orderBy(F.col(schema.CREATED_AT).desc()).first()
    recent = Progress.nothing(model.d)
    recent.n[0] = row[schema.VALIDATED]
    recent.phi[:] = row[schema.PHI_SUM]
    inputs = shared_inputs(features_of(tables, model).toArrow(), model)
    return seen_in_training(tables, model, inputs).distance(recent)


def _size(tables: Tables, table: str) -> dict[str, int]:
    row = tables.delta(table).detail().select("numFiles", "sizeInBytes").first()
    return {"files": row["numFiles"], "bytes": row["sizeInBytes"], "commit": tables.version(table)}


def _plots(of: Mapping[str, pd.DataFrame]) -> list[tuple[dict[str, Curve], str, str, str]]:
    def by_batch(numerator: str) -> dict[str, Curve]:
        curves = {}
        for name, rows in of.items():
            rows = rows[rows[schema.VALIDATED] > 0]
            events = rows[schema.N_EVENTS].cumsum().tolist()
            curves[name] = Curve(events, (rows[numerator] / rows[schema.VALIDATED]).tolist())
        return curves

    cold = {name: cold_start(rows) for name, rows in of.items()}
    return [
        (by_batch(schema.LOSS), "Loss by batch", "events applied", "mean loss"),
        (by_batch(schema.STANDARDIZED), "Calibration: 1 is right", "events applied", "mean of (error / std)²"),
        (by_batch(schema.COVERED), "Labels in the stated 90% interval", "events applied", "share of labels"),
        (
            {name: Curve((rows["seen"] + 1).tolist(), rows["loss"].tolist()) for name, rows in cold.items()},
            "Cold start: loss by what the user had been seen to do",
            "1 + events of the user before (lower edge of the bin, logarithmic)",
            "mean loss",
        ),
    ]


def _image(curves: Mapping[str, Curve], title: str, x: str, y: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        plot_curves(path, curves, title, x, y, x_log="logarithmic" in x)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _refused(told: Mapping[str, Any]) -> str:
    if not told["quarantined"]:
        return f"<p>None of {told['offered']:,} rows offered.</p>"
    share = told["quarantined"] / told["offered"]
    reasons = [{"reason": reason, "rows": n} for reason, n in told["reasons"].items()]
    return f"<p>{told['quarantined']:,} of {told['offered']:,} rows offered ({share:.2%}).</p>" + _table(reasons)


def _flat(versions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(name for row in versions for name in row))
    return [{name.replace("_", " "): row.get(name) for name in columns} for row in versions]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_told(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _told(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>oracle-mtl: status</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: 13px; }} th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; }}
th {{ text-align: left; }} td {{ text-align: right; }} td:first-child {{ text-align: left; }}
img {{ width: 48%; margin: .5rem .5% 0 0; }}
</style></head><body>
{}
</body></html>
"""
