"""Events from files into the tables, each exactly once, each refused row kept with its reason.

The steps of one batch, and why in this order. Delta commits one table at a time; the pair (application, version) is
compared in the same commit as the data (``Tables.once``), so each step happens once however often it is tried.

0. Everything about the files that can be wrong is found before the first write.
1. ``ledger``: *planned*, with what was offered. From here on a crash leaves a trace that a later ingest finds.
2. ``quarantine``: the refused rows. Before the events: rows of a batch that never commits can be deleted here, while
   ``events`` is append-only.
3. ``events``: an insert-only MERGE on event_id, under (ingest-<batch>, 1). This commit decides.
4. ``ledger``: *done*, with the counts found in the tables, under (ingest-<batch>, 1).

A later ingest closes planned batches older than ``ingest.recover_after_minutes``. It first takes (ingest-<batch>, 1)
on ``events`` with an empty append: a process that was only slow can then no longer insert. Rows of the batch in
``events`` mean that step 3 happened: *done*. Else *abandoned*; both write the closing ledger row under the same pair,
so there is one, and who comes second obeys it. The quarantine rows of an abandoned batch are deleted last, and looked
for again by every later ingest. A crash after step 3 of a batch with nothing new also ends abandoned: nothing of it
was kept, so nothing is lost.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TypeVar

import delta.exceptions
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from mtl.attributes import ATTRIBUTE_TABLES, AttributeReport, OfferedAttributes, read_attributes, write_attributes
from mtl.config import Settings
from mtl.errors import InputError, StateError
from mtl.parse import EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS, typed_events
from mtl.read import match, open_file, readable
from mtl.schema import (
    ABANDONED,
    ACCEPTED,
    APPLICATION_ID,
    BATCH,
    BATCH_ID,
    CREATED_AT,
    DONE,
    DUPLICATES,
    EVENT_ID,
    EVENTS,
    INPUTS,
    LEDGER,
    OFFERED,
    PLANNED,
    QUARANTINE,
    QUARANTINED,
    QUERY,
    RAW,
    REASON,
    SCHEMAS,
    SOURCE,
    STATE,
    USER_ATTRIBUTES,
)
from mtl.tables import Tables

log = logging.getLogger("mtl")

INGEST = "ingest"  # the ledger's query
_REFUSED, _COMMITTED = 0, 1  # versions of a batch's application id, by step
_ATTEMPTS = 5
# Delta's Python classes for conflicts have no base class of their own.
_CONFLICTS = tuple(getattr(delta.exceptions, name) for name in delta.exceptions.__all__)

Done = TypeVar("Done")


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows of one batch: offered = accepted + duplicates + quarantined."""

    offered: int
    accepted: int
    duplicates: int
    quarantined: int
    batch: str


@dataclass(frozen=True)
class _OfferedEvents:
    rows: DataFrame  # typed, with REASON and RAW; persisted
    source: str
    plan: IngestReport  # accepted and duplicates still 0
    used: frozenset[str]  # our names of the renames that applied
    ids_given: bool  # the file has a column of event ids


def ingest_files(
    tables: Tables,
    settings: Settings,
    events: str | None = None,
    inputs: str | None = None,
    users: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[IngestReport, dict[str, AttributeReport]]:
    """Ingest up to three files; all are read and checked before the first write.

    Args:
        events, inputs, users: a file or a folder each, see :func:`mtl.read.open_file`.
        columns: our column name → the files', applied to every file that it concerns.

    Returns:
        The report on events (all 0 without an events file) and those on attributes by table.

    Raises:
        InputError: nothing is offered, or a file cannot be read as asked; the tables are unchanged.
        StateError: another process declared this batch crashed in the meantime.
    """
    columns = columns or {}
    attributes = [(table, path) for table, path in ((INPUTS, inputs), (USER_ATTRIBUTES, users)) if path]
    if not (events or attributes):
        raise InputError("nothing to ingest: give --events, --inputs or --users")
    offered: _OfferedEvents | None = None
    offers: list[OfferedAttributes] = []
    try:
        if events:
            offered = _read_events(tables, settings, events, columns)
        for table, path in attributes:
            offers.append(read_attributes(tables, settings.ingest, path, table, columns))
        used = (offered.used if offered else frozenset()).union(*(offer.used for offer in offers))
        for ours in columns.keys() - used:
            raise InputError(
                f"--columns {ours}={columns[ours]}: no file offered has a column {columns[ours]} to rename"
            )
        reports = {offer.table: persistently(partial(write_attributes, tables, offer)) for offer in offers}
        if offered is None:
            return IngestReport(0, 0, 0, 0, ""), reports
        return _write_events(tables, settings, offered), reports
    finally:
        for rows in [offer.rows for offer in offers] + ([offered.rows] if offered else []):
            rows.unpersist()


def ingest_events(tables: Tables, settings: Settings, path: str, columns: Mapping[str, str]) -> IngestReport:
    """Ingest one file or folder of events, see :func:`ingest_files`.

    An event without an id gets one derived from its content (:func:`mtl.parse.derived_id`), so the same file twice
    adds nothing, and two equal rows of one file are one event and one duplicate.
    """
    return ingest_files(tables, settings, events=path, columns=columns)[0]


def ingest_attributes(
    tables: Tables, settings: Settings, path: str, table: str, columns: Mapping[str, str]
) -> AttributeReport:
    """Ingest one file or folder of attributes into ``table``, ``INPUTS`` or ``USER_ATTRIBUTES``."""
    if table not in ATTRIBUTE_TABLES:
        raise ValueError(f"no attribute table: {table}")
    offered = {"inputs": path} if table == INPUTS else {"users": path}
    return ingest_files(tables, settings, **offered, columns=columns)[1][table]


def recover(tables: Tables, older_than_minutes: float) -> list[str]:
    """Close the batches of crashed ingests as done or abandoned.

    Args:
        older_than_minutes: younger planned batches may still be running and are left alone.

    Returns:
        The batches that were closed.
    """
    before = datetime.now(timezone.utc) - timedelta(minutes=older_than_minutes)
    open_batches = (
        tables.read(LEDGER)
        .where((F.col(QUERY) == INGEST) & F.col(BATCH_ID).isNull())  # a stream repeats its own
        .groupBy(APPLICATION_ID)
        .agg(
            F.max(F.when(F.col(STATE) != PLANNED, F.col(STATE))).alias(STATE),
            F.min(CREATED_AT).alias(CREATED_AT),
            *(
                F.max(F.when(F.col(STATE) == PLANNED, F.col(name))).alias(name)
                for name in (SOURCE, OFFERED, QUARANTINED)
            ),
        )
        .where((F.col(STATE).isNull() & (F.col(CREATED_AT) <= F.lit(before))) | (F.col(STATE) == ABANDONED))
        .collect()
    )
    pending = [row for row in open_batches if row[STATE] is None]
    abandoned = [row[APPLICATION_ID] for row in open_batches if row[STATE] == ABANDONED]
    abandoned += [row[APPLICATION_ID] for row in pending if _settle(tables, row) == ABANDONED]
    for application in abandoned:
        _fence(tables, QUARANTINE, application, _REFUSED)
    if abandoned:
        stale = F.col(BATCH).isin([_batch(application) for application in abandoned])
        persistently(lambda: tables.delta(QUARANTINE).delete(stale))
    return [_batch(row[APPLICATION_ID]) for row in pending]


def _settle(tables: Tables, planned: Row) -> str:
    application, batch = planned[APPLICATION_ID], _batch(planned[APPLICATION_ID])
    _fence(tables, EVENTS, application, _COMMITTED)
    accepted = count_rows(tables, EVENTS, batch)
    nothing_valid = planned[OFFERED] == planned[QUARANTINED]
    complete = accepted > 0 or (nothing_valid and count_rows(tables, QUARANTINE, batch) == planned[QUARANTINED])
    duplicates = planned[OFFERED] - planned[QUARANTINED] - accepted
    report = IngestReport(planned[OFFERED], accepted, duplicates, planned[QUARANTINED], batch)
    if not complete:
        report = replace(report, accepted=0, duplicates=0, quarantined=0)
    state = _close(tables, report, planned[SOURCE], DONE if complete else ABANDONED)
    log.info("ingest: an earlier batch %s of %s had crashed; it is %s", batch, planned[SOURCE], state)
    return state


def _read_events(tables: Tables, settings: Settings, path: str, columns: Mapping[str, str]) -> _OfferedEvents:
    log.info("ingest: reading events from %s", path)
    file = open_file(tables.spark, path, settings.ingest, texts=None)
    found = match(file, columns, EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS)
    rows = typed_events(file, found, settings.model.loss).persist()
    with readable(path, file.format):
        counts = rows.agg(F.count("*"), F.count(REASON)).collect()[0]
    plan = IngestReport(counts[0], 0, 0, counts[1], uuid.uuid4().hex)
    used = frozenset(ours for ours, theirs in columns.items() if found.get(ours) == theirs)
    return _OfferedEvents(rows, path, plan, used, ids_given=EVENT_ID in found)


def _write_events(tables: Tables, settings: Settings, offered: _OfferedEvents) -> IngestReport:
    tables.create(EVENTS, QUARANTINE, LEDGER)
    recover(tables, settings.ingest.recover_after_minutes)
    _plan(tables, offered)
    _quarantine(tables, offered)
    _insert(tables, offered)
    plan = offered.plan
    accepted = count_rows(tables, EVENTS, plan.batch)
    report = replace(plan, accepted=accepted, duplicates=plan.offered - plan.quarantined - accepted)
    if _close(tables, report, offered.source, DONE) == ABANDONED:
        raise StateError(
            f"batch {plan.batch} took longer than ingest.recover_after_minutes and another ingest declared it "
            f"crashed; nothing of it was kept: ingest {offered.source} again"
        )
    refused = count_rows(tables, QUARANTINE, plan.batch) if plan.quarantined else 0
    if report.duplicates < 0 or refused != plan.quarantined:
        raise StateError(f"batch {plan.batch} does not add up: {report}; run jobs/audit.py")
    log.info("ingest: %s: %s", offered.source, report)
    return report


def _plan(tables: Tables, offered: _OfferedEvents) -> None:
    _record(tables, offered.plan, offered.source, PLANNED, _REFUSED)


def _quarantine(tables: Tables, offered: _OfferedEvents) -> None:
    if offered.plan.quarantined:
        quarantine(tables, offered.rows, _origin(offered), (_application(offered.plan.batch), _REFUSED))


def quarantine(tables: Tables, rows: DataFrame, origin: tuple[Column, Column], once: tuple[str, int]) -> None:
    """Append those of the typed rows that have a reason to the quarantine, at most once."""
    refused = rows.where(F.col(REASON).isNotNull()).select(
        RAW, REASON, *origin, F.current_timestamp().alias(CREATED_AT)
    )
    persistently(lambda: tables.append(QUARANTINE, refused, once=once))


def _insert(tables: Tables, offered: _OfferedEvents) -> None:
    valid = offered.rows.where(F.col(REASON).isNull())
    events = distinct_events(valid, offered.ids_given).select("*", *_origin(offered))
    application = _application(offered.plan.batch)
    merge_events(tables, events, application, once=(application, _COMMITTED))


def distinct_events(valid: DataFrame, ids_given: bool) -> DataFrame:
    """One row an event id; of rows that differ the smallest, whichever partition it came from.

    Args:
        ids_given: False where all ids are derived: they are equal only where the rows are.
    """
    events = valid.select(*EVENT_COLUMNS).distinct()
    if not ids_given:
        return events
    smallest = F.min(F.struct(*EVENT_COLUMNS[1:])).alias("smallest")
    return events.groupBy(EVENT_ID).agg(smallest).select(EVENT_ID, "smallest.*")


def merge_events(tables: Tables, events: DataFrame, application: str, once: tuple[str, int] | None = None) -> None:
    """Insert those events whose id is not in the table, in one commit; no other ingest comes in between.

    Args:
        events: one row an id.
        application: the ingest's own, whose open batches are not in its way.
        once: (application, version) of the commit; None where a repeated merge finds its own rows.
    """
    fence_streams(tables, application)

    def merge() -> None:
        with tables.once(*once) if once else nullcontext():
            (
                tables.delta(EVENTS)
                .alias("known")
                .merge(events.alias("new"), f"known.{EVENT_ID} = new.{EVENT_ID}")
                .whenNotMatchedInsertAll()
                .execute()
            )

    persistently(merge)


def open_batches(tables: Tables, application: str) -> list[tuple[str, int | None]]:
    """(application, number) of the ingests other than ``application`` that are planned and not closed.

    The number is None for files and the micro-batch's for a stream.
    """
    rows = tables.read(LEDGER).where((F.col(QUERY) == INGEST) & (F.col(APPLICATION_ID) != application))
    batches = rows.groupBy(APPLICATION_ID, BATCH_ID).agg(F.bool_and(F.col(STATE) == PLANNED).alias(STATE))
    return [(row[APPLICATION_ID], row[BATCH_ID]) for row in batches.where(F.col(STATE)).collect()]


def fence_streams(tables: Tables, application: str) -> None:
    """Let no open micro-batch of a stream other than ``application`` append any more: it will have to merge."""
    for other, number in open_batches(tables, application):
        if number is not None:
            _fence(tables, EVENTS, other, number)


def _close(tables: Tables, report: IngestReport, source: str, state: str) -> str:
    """Write the batch's closing ledger row unless there is one; returns the state it closed with."""
    _record(tables, report, source, state, _COMMITTED)
    rows = tables.read(LEDGER).where((F.col(QUERY) == INGEST) & (F.col(APPLICATION_ID) == _application(report.batch)))
    return rows.where(F.col(STATE) != PLANNED).select(STATE).collect()[0][0]


def _record(tables: Tables, report: IngestReport, source: str, state: str, version: int) -> None:
    record(tables, (_application(report.batch), version), {SOURCE: source, STATE: state, **counts(report)})


def record(tables: Tables, once: tuple[str, int], values: Mapping[str, object]) -> None:
    """Write a ledger row of the ingest ``once[0]``, at most once for (application, version)."""
    row = {QUERY: INGEST, APPLICATION_ID: once[0], CREATED_AT: datetime.now(timezone.utc), **values}
    rows = tables.spark.createDataFrame([tuple(map(row.get, SCHEMAS[LEDGER].names))], SCHEMAS[LEDGER])
    persistently(lambda: tables.append(LEDGER, rows, once=once))


def counts(report: IngestReport) -> dict[str, int]:
    """The report's counts by the ledger's columns."""
    return {name: getattr(report, name) for name in (OFFERED, ACCEPTED, DUPLICATES, QUARANTINED)}


def _fence(tables: Tables, table: str, application: str, version: int) -> None:
    """Use up (application, version) on the table, so that whoever comes later with it changes nothing."""

    nothing = tables.spark.createDataFrame([], SCHEMAS[table])
    persistently(lambda: tables.append(table, nothing, once=(application, version)))


def persistently(write: Callable[[], Done]) -> Done:
    """Repeat a write that lost to a concurrent one."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return write()
        except _CONFLICTS:
            log.info("ingest: another process wrote at the same time; attempt %d of %d", attempt + 1, _ATTEMPTS)
            time.sleep(attempt)
    return write()


def count_rows(tables: Tables, table: str, batch: str) -> int:
    """Rows of ``table`` that the ingest batch wrote."""
    return tables.read(table).where(F.col(BATCH) == batch).count()


def _origin(offered: _OfferedEvents) -> tuple[Column, Column]:
    return F.lit(offered.source).alias(SOURCE), F.lit(offered.plan.batch).alias(BATCH)


def _application(batch: str) -> str:
    return f"{INGEST}-{batch}"


def batch_name() -> Column:
    """The name under which events and quarantine have a ledger row's batch, of a file or a stream."""
    digits = F.regexp_replace(APPLICATION_ID, f"^{INGEST}-", "")
    return F.concat_ws("-", digits, F.lpad(F.col(BATCH_ID).cast("string"), 9, "0"))


def _batch(application: str) -> str:
    return application.removeprefix(f"{INGEST}-")
