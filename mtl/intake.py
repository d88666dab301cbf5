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
  (:func:`mtl.batches.fence_streams`). Either the append came first and the MERGE sees it, or it changes nothing, which
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException, StreamingQueryException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import schema
from mtl.batches import Batch, IngestReport, close, count_rows, counts, open_batches, plan, recover
from mtl.checkpoint import Checkpoint
from mtl.config import Settings
from mtl.errors import ConfigError, ReplayError, StateError
from mtl.gate import Gate
from mtl.ingest import distinct_events, merge_events, quarantine
from mtl.known import KnownEvents
from mtl.lock import exclusive
from mtl.parse import EVENT_COLUMNS, check_renames
from mtl.read import is_remote
from mtl.schema import EVENTS, LEDGER, REASON
from mtl.source import Columns, Source
from mtl.tables import Tables

log = logging.getLogger("mtl")

_ADVICE = (
    "Restore the checkpoint that was; or remove it, to read the source anew from source.starting_offsets (kafka) or its "
    "first file on: events that are there count once, but erased ones would come back"
)
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

    def __init__(self, tables: Tables, settings: Settings, source: Source, folder: str):
        self.tables, self.settings, self.source = tables, settings, source
        self.checkpoint = Checkpoint(folder, _ADVICE)
        self.columns = f"{folder}-columns.json"
        self.known = KnownEvents(tables, f"{folder}-ids")
        self.gate = Gate()
        self.tally = Tally()
        self.failure: Exception | None = None

    def batch(self, number: int) -> Batch:
        """Micro-batch ``number``: a new checkpoint is a new application, or Delta would skip its first batches."""
        # 16 digits, for Delta's statistics of a column hold 32 characters.
        return Batch(self.checkpoint.id.replace("-", "")[:16], number)

    def apply(self, batch: DataFrame, number: int) -> None:
        """Micro-batch ``number`` of the stream, first time or repeated.

        Raises:
            ReplayError: the ledger knows this batch number with other rows.
            InputError: columns of the source drifted, and ``source.drift`` says stop.
        """
        with self.gate:
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

    def _apply(self, offered: DataFrame, number: int) -> IngestReport:
        batch, offsets = self.batch(number), self._offsets(number)
        rows, ids_given, seen, (n, refused, total) = self._read(offered)
        try:
            report = IngestReport(n, 0, 0, refused, batch.name)
            marks = {schema.OFFSETS: offsets, schema.FINGERPRINT: f"{n}:{total or 0}"}
            closed = self._check(batch, marks)
            if closed:
                seen.keep()
                return replace(report, **{name: closed[name] for name in counts(report)})
            self._plan(batch, report, marks)
            origin = F.lit(self.source.name).alias(schema.SOURCE), F.lit(batch.name).alias(schema.BATCH)
            if report.quarantined:
                quarantine(self.tables, rows, origin, batch.refused)
            events = distinct_events(rows.where(F.col(REASON).isNull()), ids_given)
            accepted = self._insert(events.select("*", *origin), batch)
            report = replace(report, accepted=accepted, duplicates=n - refused - accepted)
            self._close(batch, report, marks)
            seen.keep()
            return report
        finally:
            rows.unpersist()

    def _read(self, offered: DataFrame) -> tuple[DataFrame, bool, Columns, Row]:
        """The rows, persisted; whether any came with an id; the columns with theirs; and (rows, refused ones, sum of hashes)."""
        try:
            return self._counted(offered, probe=False)
        except (PySparkException, Py4JJavaError):
            if self.settings.source.kind != "folder":
                raise
            return self._counted(offered, probe=True)  # what files hold is met only when their rows are read

    def _counted(self, offered: DataFrame, probe: bool) -> tuple[DataFrame, bool, Columns, Row]:
        seen = Columns(self.columns)
        rows, ids_given = self.source.events(offered, seen, probe)
        rows = rows.persist()
        try:
            hashed = F.xxhash64(*EVENT_COLUMNS, REASON).cast("decimal(38,0)")
            return rows, ids_given, seen, rows.agg(F.count("*"), F.count(REASON), F.sum(hashed)).first()
        except BaseException:
            rows.unpersist()
            raise

    def _check(self, batch: Batch, marks: Mapping[str, str]) -> Row | None:
        """The batch's closing row where there is one; a planned one must be this batch."""
        same = (F.col(schema.APPLICATION_ID) == batch.application) & (F.col(schema.BATCH_ID) == batch.number)
        rows = self.tables.read(LEDGER).where(same).collect()
        if any(row[schema.STATE] == schema.ABANDONED for row in rows):
            raise ReplayError(
                f"batch {batch.number} of {self.checkpoint.folder} was abandoned when the stream began from another "
                f"checkpoint; nothing was ingested. {_ADVICE}"
            )
        for row in rows:
            if any(row[name] != mark for name, mark in marks.items()):
                raise ReplayError(
                    f"batch {batch.number} of {batch.application} was {row[schema.FINGERPRINT]} at "
                    f"{row[schema.OFFSETS]} and now is {marks[schema.FINGERPRINT]} at {marks[schema.OFFSETS]}: the checkpoint "
                    f"{self.checkpoint.folder} is damaged, or files, model.loss or the columns changed since; nothing was "
                    f"ingested. {_ADVICE}"
                )
        return next((row for row in rows if row[schema.STATE] == schema.DONE), None)

    def _plan(self, batch: Batch, report: IngestReport, marks: Mapping[str, str]) -> None:
        plan(self.tables, batch, report, self.source.name, **marks)

    def _insert(self, events: DataFrame, batch: Batch) -> int:
        """Step 3; how many rows of the batch there are then."""
        if open_batches(self.tables, batch.application):
            recover(self.tables, self.settings.ingest.recover_after_minutes)
        else:
            accepted = self.known.append(events, batch)
            if accepted is not None:
                return accepted
        log.info("ingest: another ingest is at work: batch %d is merged", batch.number)
        merge_events(self.tables, events, batch)
        return count_rows(self.tables, EVENTS, batch.name)

    def _close(self, batch: Batch, report: IngestReport, marks: Mapping[str, str]) -> None:
        if close(self.tables, batch, report, self.source.name, schema.DONE, **marks) == schema.ABANDONED:
            raise StateError(
                f"batch {batch.number} of {self.checkpoint.folder} was abandoned meanwhile by another ingest stream on these "
                f"tables, which have one stream at a time: its {report.quarantined} refused rows are not in the quarantine. "
                f"Stop the other. {_ADVICE}"
            )

    def _offsets(self, number: int) -> str:
        """Where the batch begins and ends in the source, as Spark wrote it before the batch."""
        start, end = (json.loads(self.checkpoint.offsets(of)) if of >= 0 else None for of in (number - 1, number))
        return json.dumps({"start": start, "end": end})

    def start(self) -> None:
        """Refuse a checkpoint that cannot be the one behind the ledger, and close what other checkpoints left open.

        Raises:
            ReplayError: it has lost a batch that the ledger knows.
        """
        application = ""
        if not self.checkpoint.is_new:
            application = self.batch(0).application
            rows = self.tables.read(LEDGER).where(F.col(schema.APPLICATION_ID) == application)
            last = rows.agg(F.max(schema.BATCH_ID)).first()[0]
            if last is not None:
                self.checkpoint.offsets(last)
        recover(self.tables, self.settings.ingest.recover_after_minutes, stream=application)


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
    check_renames(columns or {}, settings.model.contexts)
    source = Source(tables.spark, settings, columns or {})
    checkpoint = checkpoint_of(tables, settings, source)
    locks = [f"{checkpoint}.lock"]
    if tables.checkpoints:
        locks.append(f"{tables.checkpoints}/ingest.lock")
    with ExitStack() as held:
        for path in locks:
            held.enter_context(exclusive(path, "the ingest stream"))
        rows = source.stream()
        tables.create(EVENTS, schema.QUARANTINE, LEDGER)
        intake = Intake(tables, settings, source, checkpoint)
        intake.start()
        stop = stop or threading.Event()
        stuck = -1  # batches at the last start anew
        while True:
            try:
                _run(intake, rows, available_now, stop)
                return intake.tally
            except StreamingQueryException as error:
                rows = source.stream()
                source.check(rows, Columns(intake.columns))  # a table that drifted says more clearly what is the matter
                if _ADDED not in str(error) or intake.tally.batches == stuck:
                    raise
                stuck = intake.tally.batches
                log.info("ingest: the source table has new columns: the stream starts again")


def checkpoint_of(tables: Tables, settings: Settings, source: Source) -> str:
    """The stream's checkpoint folder.

    Raises:
        ConfigError: no local folder is named, and the tables are in a catalog or store.
    """
    if settings.source.checkpoint and not is_remote(settings.source.checkpoint):
        return os.path.abspath(settings.source.checkpoint)
    if settings.source.checkpoint or tables.checkpoints is None:
        raise ConfigError("source.checkpoint: name a local folder, for the index of event ids is beside it")
    return f"{tables.checkpoints}/ingest-{source.slug}"


def _run(intake: Intake, rows: DataFrame, available_now: bool, stop: threading.Event) -> None:
    seconds = intake.settings.source.trigger_seconds
    intake.gate = Gate()  # the last run closed its own
    writer = rows.writeStream.foreachBatch(intake.apply).option("checkpointLocation", intake.checkpoint.folder)
    writer = writer.trigger(availableNow=True) if available_now else writer.trigger(processingTime=f"{seconds} seconds")
    query = writer.queryName(f"ingest-{intake.source.slug}").start()
    with _stopped(query, intake.gate):
        try:
            while not query.awaitTermination(1) and not stop.is_set():
                pass
        except StreamingQueryException as error:
            if intake.failure:
                raise intake.failure from error
            raise


@contextmanager
def _stopped(query: Any, gate: Gate) -> Iterator[None]:
    try:
        yield
    finally:
        gate.close()
        query.stop()
