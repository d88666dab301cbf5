"""How well the live model version predicts events that it has not seen, beside the baselines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import baselines, schema
from mtl.config import Settings
from mtl.errors import InputError
from mtl.losses import LOSSES
from mtl.metrics import measures, ranking, sums
from mtl.model import Model
from mtl.models import load_model
from mtl.parse import match_events, typed_events
from mtl.read import SourceFile, open_file, readable
from mtl.schema import CONTEXT, INPUT_ID, LABEL, N_EVENTS, OFFSET, REASON, USER_ID
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables

# Users are grouped by their number of events: from one edge to below the next.
EDGES = (0, 1, 5, 10, 20, 50, 100, 200, 500)
_WITHIN = NormalDist().inv_cdf(0.95)  # standard deviations either side that hold 90%

_FROM = "from"


def evaluate(
    tables: Tables,
    settings: Settings,
    events: str,
    columns: Mapping[str, str] | None = None,
    with_baselines: bool = False,
) -> dict[str, Any]:
    """Errors of the live version on a file of events, read as ingest reads it; nothing is written.

    Predictions are clipped to the labels' range in training, those of the baselines too; every row counts once.

    Args:
        events: a file or folder, see :func:`mtl.read.open_file`.
        columns: our column name → the file's.
        with_baselines: train :mod:`mtl.baselines` on the events table and measure them on the same rows.

    Returns:
        model_version; n; the measures of the model's loss (:mod:`mtl.metrics`): rmse and mae in label units, or log_loss
        (nats), brier, accuracy, mae, auc and ece (calibration), or deviance, rmse and mae; for squared loss coverage90, the
        share of labels inside the 90% interval; by_user_events, the same (but auc and ece) by the user's number of events in
        the model; baselines; seconds.

    Raises:
        InputError: the file cannot be read as asked, is empty, or has a row that ingest would refuse.
        StateError: no version is live, or there are no events for the baselines.
    """
    started = time.monotonic()
    file = open_file(tables.spark, events, settings.ingest, texts=None)
    model = load_model(tables)
    rows = read_events(file, columns or {}, model.loss, model.contexts).persist()
    train = tables.read(schema.EVENTS).persist()
    try:
        check(rows, events)
        scored = score(tables, model, rows.select(USER_ID, INPUT_ID, LABEL, OFFSET, CONTEXT))
        names: tuple[str, ...] = ()
        chosen: dict[str, dict[str, Any]] = {}
        if with_baselines:
            names = baselines.names(LOSSES[model.loss])
            scored, chosen = baselines.with_baselines(tables, model, settings.evaluate, train, scored)
        users = tables.of_version(schema.USERS, model.version).select(USER_ID, N_EVENTS)
        scored = scored.join(users, USER_ID, "left").persist()
        groups = _sums(scored, model, names)
        ranked = {name: ranking(scored, model, name) for name in (PREDICTION, *names)}
        scored.unpersist()
    finally:
        train.unpersist()
        rows.unpersist()
    n = sum(group["n"] for group in groups)
    return {
        "model_version": model.version,
        **measures(model, PREDICTION, groups),
        **ranked[PREDICTION],
        "n": n,
        **({"coverage90": sum(group["inside"] for group in groups) / n} if model.loss == "squared" else {}),
        "by_user_events": [
            {
                _FROM: group[_FROM],
                "to": _last(group[_FROM]),
                "n": group["n"],
                "users": group["users"],
                **measures(model, PREDICTION, [group]),
                "baselines": {name: measures(model, name, [group]) for name in names},
            }
            for group in groups
        ],
        **(
            {"baselines": {name: measures(model, name, groups) | ranked[name] | chosen.get(name, {}) for name in names}}
            if names
            else {}
        ),
        "seconds": round(time.monotonic() - started, 3),
    }


def read_events(file: SourceFile, columns: Mapping[str, str], loss: str, contexts: Sequence[str]) -> DataFrame:
    """The rows of a file of events as ingest would type them, with the reason where it would refuse one.

    Raises:
        InputError: the file cannot be read as asked.
    """
    found = match_events(file, columns, contexts)
    for ours, theirs in columns.items():
        if found.get(ours) != theirs:
            raise InputError(f"--columns {ours}={theirs}: {file.path} has no column {theirs} to rename")
    return typed_events(file, found, loss, contexts=contexts).select(USER_ID, INPUT_ID, LABEL, OFFSET, CONTEXT, REASON)


def check(rows: DataFrame, path: str) -> None:
    """Refuse a file without events, or with any row that is none.

    Raises:
        InputError: names how many rows are refused, and the reason of one.
    """
    with readable(path, "events"):
        n, refused, reason = rows.agg(F.count("*"), F.count(REASON), F.first(REASON, ignorenulls=True)).collect()[0]
    if refused:
        raise InputError(f"{path}: {refused} of {n} rows cannot be used; the first: {reason}")
    if not n:
        raise InputError(f"{path}: there is no event to evaluate on")


def _sums(scored: DataFrame, model: Model, names: tuple[str, ...]) -> list[Row]:
    """Sums of errors over groups of users by their number of events, in that order."""
    n_events = F.coalesce(F.col(N_EVENTS), F.lit(0))
    group = F.greatest(*(F.when(n_events >= edge, edge) for edge in EDGES), F.lit(0))
    inside = F.abs(F.col(LABEL) - F.col(PREDICTION)) <= _WITHIN * F.col(STD)
    groups = (
        scored.groupBy(group.alias(_FROM))
        .agg(
            F.count("*").alias("n"),
            F.count_distinct(USER_ID).alias("users"),
            F.sum(inside.cast("long")).alias("inside"),
            *(column for name in (PREDICTION, *names) for column in sums(model, name)),
        )
        .collect()
    )
    return sorted(groups, key=lambda row: row[_FROM])


def _last(first: int) -> int | None:
    """The largest number of events in the group that begins with ``first``; None where there is no limit."""
    above = EDGES[EDGES.index(first) + 1 :]
    return above[0] - 1 if above else None
