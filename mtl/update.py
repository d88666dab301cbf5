"""The update stream: every event added to its user once, whatever dies in between.

A micro-batch N of the query with application id *app* takes these steps, each one Delta commit that carries (app, N):

1. events whose input is not known are set aside in `waiting`, tagged N;
2. a ledger row: offsets, fingerprint, counts;
3. one MERGE of the other events' users into `users`.

A batch that is repeated after a crash finds the steps that were committed and does the others. What it applies is
fixed by step 1 and the batch itself: its events less those tagged N. The fingerprint in the ledger is compared on every
repeat, for a damaged checkpoint can plan another batch under an old number, which Delta's own guard would silently skip.

When a waiting event's input arrives it is applied in a *release*: tagged in `waiting`, then MERGE, then the ledger,
under an application id of its own, between two batches. Batches and releases are applied one at a time, in the order of their
ledger rows, for with other losses than squared the order matters a little.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import features, schema
from mtl.blocks import index_of
from mtl.config import Settings
from mtl.errors import ConfigError, ReplayError
from mtl.materialize import features_of, materialize
from mtl.model import Model
from mtl.models import load_model
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, MODEL_VERSION, USER_ID, WEIGHT
from mtl.tables import Tables
from mtl.users import WRITTEN, SharedInputs, prior_means, updated_users

log = logging.getLogger("mtl")

QUERY = "update"
_ADVICE = "Restore the checkpoint that was, or train a new version with jobs/retrain.py"


@dataclass
class Tally:
    """What one run of the job did."""

    batches: int = 0
    events: int = 0
    applied: int = 0
    waited: int = 0
    released: int = 0


@dataclass
class Updater:
    """Applies batches of events to the users of one model version; one writer, one batch or release at a time."""

    tables: Tables
    model: Model
    checkpoint: str
    partitions: int
    tally: Tally = field(default_factory=Tally)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.inputs = self._load_inputs()
        self.inputs_version: int | None = None  # the commit of inputs at the last release
        self.interrupted = False  # the ledger's last batch may not be in users yet: nothing may overtake it

    @property
    def application(self) -> str:
        """The application id: a new checkpoint is a new application, or Delta would skip its first batches."""
        return f"{QUERY}-v{self.model.version}-{_checkpoint_id(self.checkpoint)}"

    @property
    def release_application(self) -> str:
        return f"release-v{self.model.version}"

    def apply(self, batch: DataFrame, number: int) -> None:
        """Micro-batch ``number`` of the stream, first time or repeated.

        Raises:
            ReplayError: the ledger knows this batch number with other events.
        """
        with self.lock:
            started = time.monotonic()
            batch = batch.persist()
            try:
                applied, waited = self._apply(batch, number)
            except Exception as error:
                self.failure = error  # the stream hands on only its text
                raise
            finally:
                batch.unpersist()
            self.interrupted = False
            self.tally.batches += 1
            self.tally.events += applied + waited
            self.tally.applied += applied
            self.tally.waited += waited
            seconds = time.monotonic() - started
            log.info("update: batch %d, %d events applied, %d waiting, %.1f s", number, applied, waited, seconds)

    def _apply(self, batch: DataFrame, number: int) -> tuple[int, int]:
        application, offsets = self.application, _offsets(self.checkpoint, number)
        totals = (
            batch.groupBy(INPUT_ID)
            .agg(F.count(EVENT_ID).alias("n"), F.sum(F.xxhash64(EVENT_ID).cast("decimal(38,0)")).alias("hash"))
            .toArrow()
        )
        n = sum(totals["n"].to_pylist())
        fingerprint = f"{n}:{sum(map(int, totals['hash'].to_pylist()))}"
        planned = self._ledger_row(application, number)
        if planned and (planned[schema.FINGERPRINT], planned[schema.OFFSETS]) != (fingerprint, offsets):
            raise ReplayError(
                f"batch {number} of {application} was {planned[schema.FINGERPRINT]} at {planned[schema.OFFSETS]} and now "
                f"is {fingerprint} at {offsets}: the checkpoint {self.checkpoint} is damaged; nothing was applied. {_ADVICE}"
            )
        if not planned:
            unknown = self._know(totals[INPUT_ID].combine_chunks())
            if len(unknown):
                self._set_aside(batch, unknown, application, number)
        tagged = (F.col(schema.APPLICATION_ID) == application) & (F.col(schema.BATCH_ID) == number)
        aside = self._waiting().where(tagged).select(EVENT_ID)
        waited = aside.count()
        if not planned:
            counts = {schema.OFFERED: n, schema.ACCEPTED: n - waited, schema.WAITED: waited}
            self._write_ledger(application, number, counts, offsets, fingerprint)
        if n > waited:
            ready = batch.join(F.broadcast(aside), EVENT_ID, "left_anti") if waited else batch
            self._merge(ready, application, number)
        return n - waited, waited

    def release(self) -> int:
        """Apply the waiting events whose input has become known, after any release that died; how many they were."""
        with self.lock:
            self._resume_release()
            inputs = _distinct_inputs(self._waiting().where(F.col(schema.RELEASED).isNull()))
            unknown = self._know(inputs)
            if len(unknown) == len(inputs):
                return 0
            number = self._ledger(self.release_application).count()  # waiting rows may be erased, these never are
            source = self._ids(inputs.filter(pa.array(index_of(inputs, unknown) < 0))).alias("known")
            same = (
                f"w.{INPUT_ID} = known.{INPUT_ID} AND w.{MODEL_VERSION} = {self.model.version} "
                f"AND w.{schema.RELEASED} IS NULL"
            )
            with self.tables.once(self.release_application, number):
                tag = self.tables.delta(schema.WAITING).alias("w").merge(source, same)
                tag.whenMatchedUpdate(set={schema.RELEASED: F.lit(number)}).execute()
            return self._finish_release(number)

    def release_if_inputs_came(self) -> None:
        """:meth:`release` when the inputs table has a commit that was not looked at yet."""
        version = self.tables.version(schema.INPUTS)
        if version != self.inputs_version and not self.interrupted:
            self.release()
            self.inputs_version = version

    def resume(self) -> None:
        """What died in a former run comes before anything new: the ledger's order is the order of application."""
        with self.lock:
            self._resume_release()
        rows = self.tables.read(schema.LEDGER).where(F.col(schema.APPLICATION_ID) == self.application)
        last = rows.agg(F.max(schema.BATCH_ID)).collect()[0][0]
        self.interrupted = last is not None and not os.path.exists(f"{self.checkpoint}/commits/{last}")

    def _resume_release(self) -> None:
        """Finish a release that was tagged and not recorded."""
        last = self._waiting().agg(F.max(schema.RELEASED)).collect()[0][0]
        if last is not None and not self._ledger_row(self.release_application, last):
            self._finish_release(last)

    def _finish_release(self, number: int) -> int:
        """MERGE, then the ledger row by which a release is known to be complete."""
        events = self._waiting().where(F.col(schema.RELEASED) == number).persist()
        try:
            n = events.count()
            self._know(_distinct_inputs(events))
            self._merge(events, self.release_application, number)
        finally:
            events.unpersist()
        counts = {schema.OFFERED: 0, schema.ACCEPTED: n, schema.RELEASED: n}
        self._write_ledger(self.release_application, number, counts)
        self.tally.released += n
        self.tally.applied += n
        log.info("update: released %d waiting events", n)
        return n

    def _merge(self, events: DataFrame, application: str, number: int) -> None:
        """One MERGE of the events' users, at most once for (application, number)."""
        version = self.model.version
        users = events.select(USER_ID).distinct()
        states = self.tables.read(schema.USERS).where(F.col(MODEL_VERSION) == version).join(users, USER_ID, "left_semi")
        attributes = self.tables.read(schema.USER_ATTRIBUTES)
        described = None
        if len(attributes.columns) > 1:
            described = prior_means(attributes.join(users, USER_ID, "left_semi"), self.model)
        rows = updated_users(events, states, described, self.model, self.inputs, self.partitions)
        rows = rows.withColumn(MODEL_VERSION, F.lit(version).cast("long")).alias("new")
        same = f"stored.{MODEL_VERSION} = {version} AND stored.{USER_ID} = new.{USER_ID}"
        values = {name: F.col(f"new.{name}") for name in (MODEL_VERSION, *WRITTEN)}
        with self.tables.once(application, number):
            merge = self.tables.delta(schema.USERS).alias("stored").merge(rows, same)
            merge.whenMatchedUpdate(set=values).whenNotMatchedInsert(values=values).execute()

    def _know(self, inputs: pa.Array) -> pa.Array:
        """Those of ``inputs`` without features, after evaluating the oracle for those that have attributes."""
        missing = inputs.filter(pa.array(index_of(inputs, self.inputs.ids) < 0))
        if not len(missing):
            return missing
        materialize(self.tables, self.model, self._ids(missing))
        self.inputs = self._load_inputs()
        return missing.filter(pa.array(index_of(missing, self.inputs.ids) < 0))

    def _load_inputs(self) -> SharedInputs:
        rows = features_of(self.tables, self.model).toArrow()
        return SharedInputs(rows[INPUT_ID].combine_chunks(), features.from_rows(rows, self.model.d))

    def _set_aside(self, batch: DataFrame, unknown: pa.Array, application: str, number: int) -> None:
        rows = batch.join(F.broadcast(self._ids(unknown)), INPUT_ID, "left_semi").select(
            F.lit(self.model.version).cast("long").alias(MODEL_VERSION),
            F.lit(application).alias(schema.APPLICATION_ID),
            *(EVENT_ID, USER_ID, INPUT_ID, LABEL, WEIGHT, schema.EVENT_TIME),
            F.lit(number).cast("long").alias(schema.BATCH_ID),
            F.lit(None).cast("long").alias(schema.RELEASED),
        )
        self.tables.append(schema.WAITING, rows, once=(application, number))

    def _waiting(self) -> DataFrame:
        return self.tables.read(schema.WAITING).where(F.col(MODEL_VERSION) == self.model.version)

    def _ledger(self, application: str) -> DataFrame:
        return self.tables.read(schema.LEDGER).where(F.col(schema.APPLICATION_ID) == application)

    def _ledger_row(self, application: str, number: int) -> Row | None:
        return self._ledger(application).where(F.col(schema.BATCH_ID) == number).first()

    def _write_ledger(
        self,
        application: str,
        number: int,
        counts: dict[str, int],
        offsets: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        row = {
            schema.QUERY: QUERY,
            schema.APPLICATION_ID: application,
            schema.BATCH_ID: number,
            schema.SOURCE: self.tables.name(schema.EVENTS),
            schema.OFFSETS: offsets,
            schema.FINGERPRINT: fingerprint,
            **counts,
        }
        rows = self.tables.spark.createDataFrame([row], schema.SCHEMAS[schema.LEDGER])
        rows = rows.withColumn(schema.CREATED_AT, F.current_timestamp())
        self.tables.append(schema.LEDGER, rows, once=(application, number))

    def _ids(self, inputs: pa.Array) -> DataFrame:
        return self.tables.spark.createDataFrame(pa.table({INPUT_ID: inputs}))


def update(
    tables: Tables,
    settings: Settings,
    available_now: bool = True,
    version: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Run the update query of a model version, the live one by default, from where it stopped.

    Args:
        available_now: end when all events there are have been applied; else run until ``stop`` is set.

    Raises:
        StateError: there is no such version.
        ReplayError: the version was updated through another checkpoint, or its checkpoint is damaged.
    """
    started = time.monotonic()
    model = load_model(tables, version)
    checkpoint = checkpoint_of(tables, settings, model)
    tables.create(schema.EVENTS, schema.INPUTS, schema.USER_ATTRIBUTES, schema.WAITING, schema.LEDGER)
    partitions = settings.update.partitions or tables.spark.sparkContext.defaultParallelism
    updater = Updater(tables, model, checkpoint, partitions)
    _check(updater)
    if not _is_new(checkpoint):
        updater.resume()
    stop = stop or threading.Event()
    if _await_events(updater, settings, available_now, stop):
        _run(updater, settings, available_now, stop)
    updater.release()
    return {"model_version": model.version, **vars(updater.tally), "seconds": round(time.monotonic() - started, 3)}


def checkpoint_of(tables: Tables, settings: Settings, model: Model) -> str:
    if settings.update.checkpoint:
        return settings.update.checkpoint
    if tables.in_catalog:
        raise ConfigError("update.checkpoint: name a folder, for tables in a catalog have none beside them")
    return f"{tables.root}/_checkpoints/update-v{model.version}"


def _distinct_inputs(events: DataFrame) -> pa.Array:
    return events.select(INPUT_ID).distinct().toArrow()[INPUT_ID].combine_chunks()


def _await_events(updater: Updater, settings: Settings, available_now: bool, stop: threading.Event) -> bool:
    """Whether there is a commit to start from: Delta starts no stream at a version that does not exist yet."""
    while _is_new(updater.checkpoint) and updater.tables.version(schema.EVENTS) == updater.model.events_version:
        if available_now or stop.wait(max(1.0, settings.update.trigger_seconds)):
            return False
    return True


def _run(updater: Updater, settings: Settings, available_now: bool, stop: threading.Event) -> None:
    events = updater.tables.stream(
        schema.EVENTS,
        startingVersion=updater.model.events_version + 1,
        maxFilesPerTrigger=settings.update.max_files_per_trigger,
        skipChangeCommits="true",  # erasures, see mtl.erase
    ).select(EVENT_ID, USER_ID, INPUT_ID, LABEL, WEIGHT, schema.EVENT_TIME)
    writer = events.writeStream.foreachBatch(updater.apply).option("checkpointLocation", updater.checkpoint)
    if available_now:
        writer = writer.trigger(availableNow=True)
    else:
        writer = writer.trigger(processingTime=f"{settings.update.trigger_seconds} seconds")
    query = writer.queryName(f"update-v{updater.model.version}").start()
    try:
        while not query.awaitTermination(max(1, int(settings.update.trigger_seconds))) and not stop.is_set():
            if not available_now:
                updater.release_if_inputs_came()
    except StreamingQueryException as error:
        raise updater.failure or error from error
    finally:
        with updater.lock:  # a stop waits for the batch in hand
            query.stop()


def _check(updater: Updater) -> None:
    """Refuse a checkpoint that cannot be the one behind the ledger."""
    version, checkpoint = updater.model.version, updater.checkpoint
    rows = updater.tables.read(schema.LEDGER).where(F.col(schema.APPLICATION_ID).startswith(f"{QUERY}-v{version}-"))
    last = {row[0]: row[1] for row in rows.groupBy(schema.APPLICATION_ID).agg(F.max(schema.BATCH_ID)).collect()}
    if not last:
        return
    if _is_new(checkpoint) or updater.application not in last:
        raise ReplayError(
            f"model version {version} was updated through another checkpoint than {checkpoint}, and going on from here "
            f"would count its events twice. {_ADVICE}"
        )
    if not os.path.exists(f"{checkpoint}/offsets/{last[updater.application]}"):
        raise ReplayError(f"{checkpoint} has lost batch {last[updater.application]}, which the ledger knows. {_ADVICE}")


def _is_new(checkpoint: str) -> bool:
    return not os.path.exists(f"{checkpoint}/metadata")


def _checkpoint_id(checkpoint: str) -> str:
    with open(f"{checkpoint}/metadata") as file:
        return json.load(file)["id"]


def _offsets(checkpoint: str, number: int) -> str:
    """The batch's end offset in the source, as Spark wrote it before the batch."""
    with open(f"{checkpoint}/offsets/{number}") as file:
        return file.read().splitlines()[2]
