"""The ingest stream: events from a source that goes on, each into the table once.

A micro-batch N of the query with application id *app* takes these steps, each one Delta commit that happens once:

1. ``ledger``: *planned*, with offsets, fingerprint and what was offered, under (app, 2N).
2. ``quarantine``: the refused rows, under (app, N).
3. ``events``: an append of those whose id is not in the table, under (app, N).
4. ``ledger``: *done*, with the counts found in the table, under (app, 2N+1).

A batch that is repeated after a crash finds the steps that were committed and does the others; its rows carry its name
(``batch``), and ids that it has appended are known. The fingerprint is compared on every repeat, for a damaged
checkpoint can plan another batch under an old number.

What makes the append exact is that the table holds what the index (:class:`mtl.known.KnownEvents`) says, from the look
into the index to the commit. This process is the only stream by a lock. Files may be ingested at any time, by a MERGE:

- A file's ingest that is open in the ledger after step 1: the batch is merged too, and Delta lets one of two MERGEs
  through.
- One that opens later finds this batch open in the ledger, and uses up (app, N) on ``events`` before it merges
  (:func:`mtl.ingest.fence_streams`). Either the append came first and the MERGE sees it, or it changes nothing, which
  is seen by counting, and the batch is merged.

The same holds for a process that was declared dead and is not, so that the lock is a courtesy, not the guard.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import schema
from mtl.config import Settings
from mtl.errors import ConfigError, MtlError, ReplayError
from mtl.ingest import (
    INGEST,
    IngestReport,
    count_rows,
    counts,
    distinct_events,
    merge_events,
    open_batches,
    quarantine,
    record,
    recover,
)
from mtl.known import KnownEvents
from mtl.lock import exclusive
from mtl.parse import EVENT_COLUMNS
from mtl.schema import EVENTS, LEDGER, REASON
from mtl.source import Columns, Source
from mtl.tables import Tables

log = logging.getLogger("mtl")

_ADVICE = "Restore the checkpoint that was, or remove it to read the source anew: events that are there count once"
_ADDED = "DELTA_SCHEMA_CHANGED"  # a source table has a new column: Delta's stream is to be started again


@dataclass
class Tally:
    """What one run of the job did; offered = accepted + duplicates + quarantined."""

    batches: int = 0
    offered: int = 0
    accepted: int = 0
    duplicates: int = 0
    quarantined: int = 0


class Intake:
    """Takes micro-batches of a source into the tables; one at a time."""

    def __init__(self, tables: Tables, settings: Settings, source: Source, checkpoint: str):
        self.tables, self.settings, self.source, self.checkpoint = tables, settings, source, checkpoint
        self.seen = Columns(f"{checkpoint}-columns.json")
        self.known = KnownEvents(tables, f"{checkpoint}-ids")
        self.lock = threading.Lock()
        self.tally = Tally()
        self.failure: Exception | None = None

    @property
    def application(self) -> str:
        """The application id: a new checkpoint is a new application, or Delta would skip its first batches."""
        return f"{INGEST}-{self._digits()}"

    def _digits(self) -> str:
        with open(f"{self.checkpoint}/metadata") as file:
            return json.load(file)["id"].replace("-", "")[:16]  # whole in Delta's statistics of 32 characters

    def apply(self, batch: DataFrame, number: int) -> None:
        """Micro-batch ``number`` of the stream, first time or repeated.

        Raises:
            ReplayError: the ledger knows this batch number with other rows.
            InputError: columns of the source drifted, and ``source.drift`` says stop.
        """
        with self.lock:
            started = time.monotonic()
            try:
                report = self._apply(batch, number)
            except Exception as error:
                self.failure = error  # the stream hands on only its text
                raise
            self.tally.batches += 1
            for name, count in counts(report).items():
                setattr(self.tally, name, getattr(self.tally, name) + count)
            log.info("ingest: batch %d: %s, %.1f s", number, counts(report), time.monotonic() - started)

    def _apply(self, batch: DataFrame, number: int) -> IngestReport:
        rows, ids_given = self.source.events(batch, self.seen)
        rows = rows.persist()
        try:
            offsets = self._offsets(number)
            fingerprint, report = self._offer(rows, number)
            closed = self._check(number, offsets, fingerprint)
            if closed:
                return replace(report, **{name: closed[name] for name in counts(report)})
            row = {schema.BATCH_ID: number, schema.SOURCE: self.source.name, schema.OFFSETS: offsets}
            row |= {schema.FINGERPRINT: fingerprint}
            self._plan(row, report, number)
            origin = F.lit(self.source.name).alias(schema.SOURCE), F.lit(report.batch).alias(schema.BATCH)
            if report.quarantined:
                quarantine(self.tables, rows, origin, (self.application, number))
            events = distinct_events(rows.where(F.col(REASON).isNull()), ids_given)
            accepted = self._insert(events.select("*", *origin), number, report.batch)
            duplicates = report.offered - report.quarantined - accepted
            return self._close(row, replace(report, accepted=accepted, duplicates=duplicates), number)
        finally:
            rows.unpersist()

    def _offer(self, rows: DataFrame, number: int) -> tuple[str, IngestReport]:
        hashed = F.xxhash64(*EVENT_COLUMNS, REASON).cast("decimal(38,0)")
        n, refused, total = rows.agg(F.count("*"), F.count(REASON), F.sum(hashed)).first()
        return f"{n}:{total or 0}", IngestReport(n, 0, 0, refused, f"{self._digits()}-{number:09d}")

    def _check(self, number: int, offsets: str, fingerprint: str) -> Row | None:
        """The batch's closing row where there is one; a planned one must be this batch."""
        same = (F.col(schema.APPLICATION_ID) == self.application) & (F.col(schema.BATCH_ID) == number)
        rows = self.tables.read(LEDGER).where(same).collect()
        for row in rows:
            if (row[schema.FINGERPRINT], row[schema.OFFSETS]) != (fingerprint, offsets):
                raise ReplayError(
                    f"batch {number} of {self.application} was {row[schema.FINGERPRINT]} at {row[schema.OFFSETS]} and "
                    f"now is {fingerprint} at {offsets}: the checkpoint {self.checkpoint} is damaged, or files, "
                    f"model.loss or the columns changed since; nothing was ingested. {_ADVICE}"
                )
        return next((row for row in rows if row[schema.STATE] == schema.DONE), None)

    def _plan(self, row: Mapping[str, Any], report: IngestReport, number: int) -> None:
        values = {**row, **counts(report), schema.STATE: schema.PLANNED}
        record(self.tables, (self.application, 2 * number), values)

    def _insert(self, events: DataFrame, number: int, batch: str) -> int:
        """Step 3; how many rows of the batch there are then."""
        if open_batches(self.tables, self.application):
            recover(self.tables, self.settings.ingest.recover_after_minutes)
        else:
            accepted = self.known.append(events, batch, (self.application, number))
            if accepted is not None:
                return accepted
        log.info("ingest: another ingest is at work: batch %d is merged", number)
        merge_events(self.tables, events, self.application)
        return count_rows(self.tables, EVENTS, batch)

    def _close(self, row: Mapping[str, Any], report: IngestReport, number: int) -> IngestReport:
        record(self.tables, (self.application, 2 * number + 1), {**row, **counts(report), schema.STATE: schema.DONE})
        return report

    def _offsets(self, number: int) -> str:
        """Where the batch begins and ends in the source, as Spark wrote it before the batch."""

        def end(of: int) -> Any:
            with open(f"{self.checkpoint}/offsets/{of}") as file:
                return json.loads(file.read().splitlines()[2])

        return json.dumps({"start": end(number - 1) if number else None, "end": end(number)})

    def check(self) -> None:
        """Refuse a checkpoint that cannot be the one behind the ledger.

        Raises:
            ReplayError: it has lost a batch that the ledger knows.
        """
        if not os.path.exists(f"{self.checkpoint}/metadata"):
            return
        rows = self.tables.read(LEDGER).where(F.col(schema.APPLICATION_ID) == self.application)
        last = rows.agg(F.max(schema.BATCH_ID)).first()[0]
        if last is not None and not os.path.exists(f"{self.checkpoint}/offsets/{last}"):
            raise ReplayError(f"{self.checkpoint} has lost batch {last}, which the ledger knows. {_ADVICE}")


def ingest_stream(
    tables: Tables,
    settings: Settings,
    columns: Mapping[str, str] | None = None,
    available_now: bool = True,
    stop: threading.Event | None = None,
) -> Tally:
    """Run the ingest stream of the configured source from where it stopped.

    Args:
        columns: our column name → the source's.
        available_now: end when all there is has been ingested; else run until ``stop`` is set.

    Raises:
        StateError: another stream ingests into these tables.
        ReplayError: the checkpoint is damaged.
        InputError, ConfigError: the source cannot be read as configured.
    """
    source = Source(tables.spark, settings, columns or {})
    checkpoint = checkpoint_of(tables, settings, source)
    with exclusive(f"{os.path.dirname(checkpoint)}/ingest.lock", "the ingest stream"):
        rows = source.stream()
        tables.create(EVENTS, schema.QUARANTINE, LEDGER)
        recover(tables, settings.ingest.recover_after_minutes)
        intake = Intake(tables, settings, source, checkpoint)
        intake.check()
        stop = stop or threading.Event()
        while True:
            try:
                _run(intake, rows, available_now, stop)
                return intake.tally
            except StreamingQueryException as error:
                if _ADDED not in str(error):
                    raise
                log.info("ingest: the source table has new columns: the stream starts again")
                rows = source.stream()


def checkpoint_of(tables: Tables, settings: Settings, source: Source) -> str:
    """The stream's checkpoint folder.

    Raises:
        ConfigError: the tables are in a catalog and no folder is named.
    """
    if settings.source.checkpoint:
        return os.path.abspath(settings.source.checkpoint)
    if tables.in_catalog:
        raise ConfigError("source.checkpoint: name a folder, for tables in a catalog have none beside them")
    return f"{tables.root}/_checkpoints/ingest-{source.slug}"


def _run(intake: Intake, rows: DataFrame, available_now: bool, stop: threading.Event) -> None:
    seconds = intake.settings.source.trigger_seconds
    writer = rows.writeStream.foreachBatch(intake.apply).option("checkpointLocation", intake.checkpoint)
    writer = writer.trigger(availableNow=True) if available_now else writer.trigger(processingTime=f"{seconds} seconds")
    query = writer.queryName(f"ingest-{intake.source.slug}").start()
    with _stopped(query, intake.lock):
        try:
            while not query.awaitTermination(1) and not stop.is_set():
                pass
        except StreamingQueryException as error:
            if isinstance(intake.failure, MtlError):
                raise intake.failure from error
            raise


@contextmanager
def _stopped(query: Any, lock: threading.Lock) -> Iterator[None]:
    try:
        yield
    finally:
        with lock:  # a stop waits for the batch in hand
            query.stop()
