"""What the update streams have not applied: commits of events that are not read yet, and events that wait for their input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.checkpoint import Place
from mtl.tables import Tables

FIGURES = ("lag_commits", "lag_events", "lag_seconds")


def lag(tables: Tables, consumed: int) -> dict[str, int]:
    """Commits of events after ``consumed``, the events in them, and the age of the oldest (seconds).

    Reads the log entries of these commits alone.
    """
    behind = tables.version(schema.EVENTS) - consumed
    if behind <= 0:
        return dict.fromkeys(FIGURES, 0)
    metrics = F.col("operationMetrics")
    written = F.coalesce(F.try_element_at(metrics, F.lit("numTargetRowsInserted")), metrics["numOutputRows"])
    age = F.unix_timestamp(F.current_timestamp()) - F.unix_timestamp(F.min("timestamp"))
    commits = tables.delta(schema.EVENTS).history(behind)
    row = commits.agg(F.count(F.lit(1)), F.sum(written.cast("long")), age).first()
    return dict(zip(FIGURES, (value or 0 for value in row), strict=True))


def unreleased(tables: Tables, version: int) -> DataFrame:
    """A version's events whose input is not known yet."""
    return tables.of_version(schema.WAITING, version).where(F.col(schema.RELEASED).isNull())


def delays(
    first: int, ends: Sequence[Place], applied: Sequence[datetime], committed: Mapping[int, datetime]
) -> list[float]:
    """How long the oldest commit of each batch had waited when the batch was applied (seconds).

    Args:
        first: the commit that the first batch began at.
        ends, applied: of the batches, in their order.
        committed: when each commit of events was made; NaN where the log no longer has it.
    """
    begun = [first, *(commit for commit, _ in ends[:-1])]
    return [
        (at - committed[commit]).total_seconds() if commit in committed else float("nan")
        for commit, at in zip(begun, applied, strict=True)
    ]
