"""The ingest's batches in the ledger: planned, closed, and recovered where their process died.

A batch is a call of the ingest of files or a micro-batch of a stream. It is open from its row *planned* to its row
*done* or *abandoned*.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import TypeVar

import delta.exceptions
from pyspark.sql import Column, Row
from pyspark.sql import functions as F

from mtl.layout import SCHEMAS
from mtl.schema import (
    ABANDONED,
    ACCEPTED,
    APPLICATION_ID,
    BATCH,
    BATCH_ID,
    CREATED_AT,
    DONE,
    DUPLICATES,
    EVENTS,
    LEDGER,
    OFFERED,
    PLANNED,
    QUARANTINE,
    QUARANTINED,
    QUERY,
    SOURCE,
    STATE,
)
from mtl.tables import Tables

log = logging.getLogger("mtl")

INGEST = "ingest"  # the ledger's query
_ATTEMPTS = 5
# Delta's Python classes for conflicts have no base class of their own.
_CONFLICTS = tuple(getattr(delta.exceptions, name) for name in delta.exceptions.__all__)

Done = TypeVar("Done")


@dataclass(frozen=True)
class Batch:
    """One batch: files have an application id each, a stream has one and numbers its batches."""

    digits: str
    number: int | None = None

    @property
    def application(self) -> str:
        return f"{INGEST}-{self.digits}"

    @property
    def name(self) -> str:
        """What its rows in events and quarantine carry."""
        return self.digits if self.number is None else f"{self.digits}-{self.number:09d}"

    # Each table has (application, version) of its own; the version is 0 or 1 where there are no numbers.

    @property
    def refused(self) -> tuple[str, int]:
        """The transaction of its rows in the quarantine."""
        return self.application, self.number or 0

    @property
    def committed(self) -> tuple[str, int]:
        """The transaction of its rows in the events."""
        return self.application, 1 if self.number is None else self.number

    @property
    def planned(self) -> tuple[str, int]:
        """The transaction of its first row in the ledger."""
        return self.application, 2 * (self.number or 0)

    @property
    def closed(self) -> tuple[str, int]:
        """The transaction of its last row in the ledger."""
        return self.application, 2 * (self.number or 0) + 1


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows of one batch: offered = accepted + duplicates + quarantined."""

    offered: int
    accepted: int
    duplicates: int
    quarantined: int
    batch: str


def counts(report: IngestReport) -> dict[str, int]:
    """The report's counts by the ledger's columns."""
    return {name: getattr(report, name) for name in (OFFERED, ACCEPTED, DUPLICATES, QUARANTINED)}


def batch_name() -> Column:
    """:attr:`Batch.name` of a ledger row."""
    digits = F.regexp_replace(APPLICATION_ID, f"^{INGEST}-", "")
    return F.concat_ws("-", digits, F.lpad(F.col(BATCH_ID).cast("string"), 9, "0"))


def plan(tables: Tables, batch: Batch, report: IngestReport, source: str, **columns: object) -> None:
    """Open the batch, once.

    Args:
        columns: further ones of the ledger.
    """
    _record(tables, batch, batch.planned, report, {SOURCE: source, STATE: PLANNED, **columns})


def close(tables: Tables, batch: Batch, report: IngestReport, source: str, state: str, **columns: object) -> str:
    """Write the batch's closing ledger row unless there is one; returns the state it closed with."""
    _record(tables, batch, batch.closed, report, {SOURCE: source, STATE: state, **columns})
    row = (F.col(APPLICATION_ID) == batch.application) & F.col(BATCH_ID).eqNullSafe(F.lit(batch.number))
    return tables.read(LEDGER).where(row & (F.col(STATE) != PLANNED)).select(STATE).collect()[0][0]


def _record(
    tables: Tables, batch: Batch, once: tuple[str, int], report: IngestReport, values: dict[str, object]
) -> None:
    row = {QUERY: INGEST, APPLICATION_ID: batch.application, BATCH_ID: batch.number, **counts(report), **values}
    persistently(lambda: tables.append_rows(LEDGER, [row], once=once))


def open_batches(tables: Tables, application: str) -> list[Batch]:
    """The open batches of other applications than this one."""
    rows = tables.read(LEDGER).where((F.col(QUERY) == INGEST) & (F.col(APPLICATION_ID) != application))
    batches = rows.groupBy(APPLICATION_ID, BATCH_ID).agg(F.bool_and(F.col(STATE) == PLANNED).alias(STATE))
    return [_batch(row) for row in batches.where(F.col(STATE)).collect()]


def fence_streams(tables: Tables, application: str) -> None:
    """Let no open micro-batch of another application append any more: it will have to merge."""
    for batch in open_batches(tables, application):
        if batch.number is not None:
            _fence(tables, EVENTS, batch.committed)


def recover(tables: Tables, older_than_minutes: float, stream: str | None = None) -> list[str]:
    """Close the batches of crashed ingests as done or abandoned.

    Args:
        older_than_minutes: younger ones of files may still be running and are left alone.
        stream: the application id of the one stream there is: open batches of others are closed as well. None: those
            of streams are left alone, for a stream repeats its own.

    Returns:
        The batches that were closed.
    """
    before = F.lit(datetime.now(timezone.utc) - timedelta(minutes=older_than_minutes))
    of_files = F.col(BATCH_ID).isNull()
    left = (
        tables.read(LEDGER)
        .where((F.col(QUERY) == INGEST) & (of_files if stream is None else F.col(APPLICATION_ID) != stream))
        .groupBy(APPLICATION_ID, BATCH_ID)
        .agg(
            F.max(F.when(F.col(STATE) != PLANNED, F.col(STATE))).alias(STATE),
            F.min(CREATED_AT).alias(CREATED_AT),
            *(
                F.max(F.when(F.col(STATE) == PLANNED, F.col(name))).alias(name)
                for name in (SOURCE, OFFERED, QUARANTINED)
            ),
        )
        .where((F.col(STATE).isNull() & (~of_files | (F.col(CREATED_AT) <= before))) | (F.col(STATE) == ABANDONED))
        .collect()
    )
    pending = [row for row in left if row[STATE] is None]
    abandoned = [_batch(row) for row in left if row[STATE] == ABANDONED]
    abandoned += [_batch(row) for row in pending if _settle(tables, row) == ABANDONED]
    for batch in abandoned:
        _fence(tables, QUARANTINE, batch.refused)
    if abandoned:
        stale = F.col(BATCH).isin([batch.name for batch in abandoned])
        persistently(lambda: tables.delta(QUARANTINE).delete(stale))
    return [_batch(row).name for row in pending]


def _settle(tables: Tables, planned: Row) -> str:
    batch = _batch(planned)
    _fence(tables, EVENTS, batch.committed)
    accepted = count_rows(tables, EVENTS, batch.name)
    nothing_valid = planned[OFFERED] == planned[QUARANTINED]
    complete = accepted > 0 or (nothing_valid and count_rows(tables, QUARANTINE, batch.name) == planned[QUARANTINED])
    duplicates = planned[OFFERED] - planned[QUARANTINED] - accepted
    report = IngestReport(planned[OFFERED], accepted, duplicates, planned[QUARANTINED], batch.name)
    if not complete:
        report = replace(report, accepted=0, duplicates=0, quarantined=0)
    state = close(tables, batch, report, planned[SOURCE], DONE if complete else ABANDONED)
    log.info("ingest: an earlier batch %s of %s had crashed; it is %s", batch.name, planned[SOURCE], state)
    return state


def _batch(row: Row) -> Batch:
    return Batch(row[APPLICATION_ID].removeprefix(f"{INGEST}-"), row[BATCH_ID])


def _fence(tables: Tables, table: str, once: tuple[str, int]) -> None:
    """Use up (application, version) on the table, so that whoever comes later with it changes nothing."""
    nothing = tables.spark.createDataFrame([], SCHEMAS[table])
    persistently(lambda: tables.append(table, nothing, once=once))


def persistently(write: Callable[[], Done]) -> Done:
    """Repeat a write that lost to a concurrent one."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return write()
        except _CONFLICTS:
            log.info("another process wrote at the same time; attempt %d of %d", attempt + 1, _ATTEMPTS)
            time.sleep(attempt)
    return write()


def count_rows(tables: Tables, table: str, batch: str) -> int:
    """Rows of ``table`` that the batch of this name wrote."""
    return tables.read(table).where(F.col(BATCH) == batch).count()


def ingested(tables: Tables) -> tuple[int, int]:
    """Rows that all batches were offered, and those that they refused."""
    done = tables.read(LEDGER).where((F.col(QUERY) == INGEST) & (F.col(STATE) == DONE))
    offered, refused = done.agg(F.sum(OFFERED), F.sum(QUARANTINED)).first()
    return offered or 0, refused or 0
