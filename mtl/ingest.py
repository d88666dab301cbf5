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
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from mtl.attributes import AttributeReport, OfferedAttributes, read_attributes, write_attributes
from mtl.batches import Batch, IngestReport, close, count_rows, fence_streams, persistently, plan, recover
from mtl.config import Settings
from mtl.errors import InputError, StateError
from mtl.parse import EVENT_COLUMNS, check_renames, offered_events
from mtl.read import open_file, readable
from mtl.schema import (
    ABANDONED,
    BATCH,
    CREATED_AT,
    DONE,
    EVENT_ID,
    EVENTS,
    INPUTS,
    LEDGER,
    QUARANTINE,
    RAW,
    REASON,
    SOURCE,
    USER_ATTRIBUTES,
)
from mtl.tables import Tables

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class _OfferedEvents:
    rows: DataFrame  # typed, with REASON and RAW; persisted
    source: str
    batch: Batch
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
            if not attributes:
                check_renames(columns, settings.model.contexts)
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


def _read_events(tables: Tables, settings: Settings, path: str, columns: Mapping[str, str]) -> _OfferedEvents:
    log.info("ingest: reading events from %s", path)
    file = open_file(tables.spark, path, settings.ingest, texts=None)
    found, rows = offered_events(file, columns, settings.model)
    rows = rows.persist()
    with readable(path, file.format):
        counts = rows.agg(F.count("*"), F.count(REASON)).collect()[0]
    batch = Batch(uuid.uuid4().hex)
    planned = IngestReport(counts[0], 0, 0, counts[1], batch.name)
    used = frozenset(ours for ours, theirs in columns.items() if found.get(ours) == theirs)
    return _OfferedEvents(rows, path, batch, planned, used, ids_given=EVENT_ID in found)


def _write_events(tables: Tables, settings: Settings, offered: _OfferedEvents) -> IngestReport:
    tables.create(EVENTS, QUARANTINE, LEDGER)
    recover(tables, settings.ingest.recover_after_minutes)
    _plan(tables, offered)
    _quarantine(tables, offered)
    _insert(tables, offered)
    planned = offered.plan
    accepted = count_rows(tables, EVENTS, planned.batch)
    report = replace(planned, accepted=accepted, duplicates=planned.offered - planned.quarantined - accepted)
    if close(tables, offered.batch, report, offered.source, DONE) == ABANDONED:
        raise StateError(
            f"batch {planned.batch} took longer than ingest.recover_after_minutes and another ingest declared it "
            f"crashed; nothing of it was kept: ingest {offered.source} again"
        )
    refused = count_rows(tables, QUARANTINE, planned.batch) if planned.quarantined else 0
    if report.duplicates < 0 or refused != planned.quarantined:
        raise StateError(f"batch {planned.batch} does not add up: {report}; run jobs/audit.py")
    log.info("ingest: %s: %s", offered.source, report)
    return report


def _plan(tables: Tables, offered: _OfferedEvents) -> None:
    plan(tables, offered.batch, offered.plan, offered.source)


def _quarantine(tables: Tables, offered: _OfferedEvents) -> None:
    if offered.plan.quarantined:
        quarantine(tables, offered.rows, _origin(offered), offered.batch.refused)


def quarantine(tables: Tables, rows: DataFrame, origin: tuple[Column, Column], once: tuple[str, int]) -> None:
    """Append those of the typed rows that have a reason to the quarantine, at most once."""
    refused = rows.where(F.col(REASON).isNotNull()).select(
        RAW, REASON, *origin, F.current_timestamp().alias(CREATED_AT)
    )
    persistently(lambda: tables.append(QUARANTINE, refused, once=once))


def _insert(tables: Tables, offered: _OfferedEvents) -> None:
    valid = offered.rows.where(F.col(REASON).isNull())
    events = distinct_events(valid, offered.ids_given).select("*", *_origin(offered))
    merge_events(tables, events, offered.batch, once=offered.batch.committed)


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


def merge_events(tables: Tables, events: DataFrame, batch: Batch, once: tuple[str, int] | None = None) -> None:
    """Insert those events whose id is not in the table, in one commit; no other ingest comes in between.

    Args:
        events: one row an id.
        batch: whose they are; what its application has open is not in its way.
        once: (application, version) of the commit; None where a repeated merge finds its own rows.
    """
    fence_streams(tables, batch.application)

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


def _origin(offered: _OfferedEvents) -> tuple[Column, Column]:
    return F.lit(offered.source).alias(SOURCE), F.lit(offered.plan.batch).alias(BATCH)
