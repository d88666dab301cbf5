"""Every event of a micro-batch added to its user once, whatever dies in between.

A micro-batch N of the query with application id *app* takes these steps, each one Delta commit, at most once for (app, N):

1. events whose input is not known are set aside in `waiting`, tagged N;
2. a ledger row: offsets, fingerprint, counts;
3. a progress row: what the other events cost when predicted before they are known (:mod:`mtl.progress`);
4. where there are events of inputs that training had none of, a MERGE of these into `features` (:mod:`mtl.arrivals`);
5. their users into `users`, by one MERGE or, where they are most of them, one write of all (:mod:`mtl.upsert`).

A batch that is repeated after a crash finds the steps that were committed and does the others. What it applies is
fixed by step 1 and the batch itself: its events less those tagged N. The fingerprint in the ledger is compared on every
repeat, for a damaged checkpoint can plan another batch under an old number, which Delta's own guard would silently skip.

When a waiting event's input arrives it is applied in a *release*: tagged in `waiting`, then MERGE, then the ledger,
under an application id of its own, between two batches. Batches and releases are applied one at a time, in the order of their
ledger rows, for with other losses than squared the order matters a little.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import arrivals, progress, schema
from mtl.adder import Adder
from mtl.arrow import matrix
from mtl.backlog import unreleased
from mtl.blocks import index_of
from mtl.checkpoint import Checkpoint
from mtl.errors import ReplayError
from mtl.gate import Gate
from mtl.ledger import UPDATE
from mtl.materialize import materialize
from mtl.model import Model
from mtl.parse import EVENT_COLUMNS
from mtl.progress import Progress
from mtl.schema import EVENT_ID, INPUT_ID, MODEL_VERSION, USER_ID
from mtl.tables import Tables
from mtl.upsert import UsersTable
from mtl.users import MEASURED, MEASURED_OF, SharedInputs

log = logging.getLogger("mtl")


@dataclass
class Tally:
    """What one run of a version's query did."""

    batches: int = 0
    events: int = 0
    applied: int = 0
    waited: int = 0
    released: int = 0


@dataclass(frozen=True)
class Already:
    """Events that an earlier checkpoint gave to the users, of a commit that it was in the middle of."""

    commit: int
    events: DataFrame  # event_id


@dataclass
class Updater:
    """Applies batches of events to the users of one model version; one writer, one batch or release at a time."""

    tables: Tables
    model: Model
    checkpoint: Checkpoint
    partitions: int
    learn_arrivals: bool
    rewrite_above: float  # see UsersTable
    keep_bytes: int  # see Adder
    tally: Tally = field(default_factory=Tally)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.gate = Gate()
        self.inputs = self._load_inputs()
        self.inputs_version: int | None = None  # the commit of inputs at the last release
        self.interrupted = False  # a batch was begun and may not be in users: nothing may overtake it
        self.recent = Progress.nothing(self.model.d)  # of the last batch
        self.users = UsersTable(self.tables, self.model.version, self.rewrite_above)
        measure = _progress_and_evidence if self.learn_arrivals else _progress
        self.adder = Adder(self.tables, self.users, self.model, self.partitions, measure, self.keep_bytes)
        self.updated = 0  # users in this run, a user once a batch
        self.seconds: dict[str, float] = {}  # of the last batch, by phase
        self._surprises: deque[tuple[float, int]] = deque(maxlen=1000)
        self.already: Already | None = None

    @property
    def application(self) -> str:
        """The application id: a new checkpoint is a new application, or Delta would skip its first batches."""
        return f"{UPDATE}-v{self.model.version}-{self.checkpoint.id}"

    @property
    def release_application(self) -> str:
        return f"release-v{self.model.version}"

    def apply(self, batch: DataFrame, number: int) -> None:
        """Micro-batch ``number`` of the stream, first time or repeated.

        Raises:
            ReplayError: the ledger knows this batch number with other events.
        """
        with self.gate:
            started = time.monotonic()
            batch = batch.persist()
            try:
                applied, waited = self._apply(batch, number)
            except Exception as error:
                self.interrupted = True
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
        application, offsets = self.application, self.checkpoint.offsets(number)
        if self.already and self.checkpoint.begins_by(number, self.already.commit):
            batch = batch.join(self.already.events, EVENT_ID, "left_anti")
        with self._timed("read"):
            totals = (
                batch.groupBy(INPUT_ID)
                .agg(F.count(EVENT_ID).alias("n"), F.bit_xor(F.xxhash64(EVENT_ID)).alias("hash"))
                .toArrow()
            )
        n = sum(totals["n"].to_pylist())
        fingerprint = f"{n}:{np.bitwise_xor.reduce(totals['hash'].to_numpy())}"
        planned = self._row(schema.LEDGER, application, number) if self._may_repeat(application) else None
        if planned:
            self._compare(planned, fingerprint, offsets)
        unknown = pa.array([]) if planned else self._know(totals[INPUT_ID].combine_chunks())
        if len(unknown):
            self._set_aside(batch, unknown, application, number)
        tagged = (F.col(schema.APPLICATION_ID) == application) & (F.col(schema.BATCH_ID) == number)
        aside = self._waiting().where(tagged).select(EVENT_ID)
        waited = aside.count() if len(unknown) or self._may_repeat(application) else 0
        if not planned:
            counts = {schema.OFFERED: n, schema.ACCEPTED: n - waited, schema.WAITED: waited}
            self._write_ledger(application, number, counts, offsets, fingerprint)
        if n > waited:
            ready = batch.join(F.broadcast(aside), EVENT_ID, "left_anti") if waited else batch
            self._add_to_users(ready, n - waited, application, number, offsets)
        return n - waited, waited

    def _compare(self, planned: Row, fingerprint: str, offsets: str) -> None:
        """Refuse a batch that is not the one that the ledger has under its number."""
        if (planned[schema.FINGERPRINT], planned[schema.OFFSETS]) != (fingerprint, offsets):
            raise ReplayError(
                f"batch {planned[schema.BATCH_ID]} of {self.application} was {planned[schema.FINGERPRINT]} at "
                f"{planned[schema.OFFSETS]} and now is {fingerprint} at {offsets}: the checkpoint {self.checkpoint.folder} is "
                f"damaged; nothing was applied. {self.checkpoint.advice}"
            )

    def release(self) -> int:
        """Apply the waiting events whose input has become known, after any release that died; how many they were.

        0 while a batch is interrupted.
        """
        with self.gate:
            if self.interrupted:
                return 0
            self._resume_release()
            inputs = _distinct_inputs(unreleased(self.tables, self.model.version))
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
            if not self.interrupted:  # by a batch that it waited for
                self.inputs_version = version

    def finish_release(self) -> None:
        """What a release that died left to do."""
        with self.gate:
            self._resume_release()

    def resume(self) -> None:
        """What died in a former run comes before anything new: the ledger's order is the order of application."""
        self.finish_release()
        own = F.col(schema.APPLICATION_ID) == self.application
        aside = self._waiting().where(own).select(schema.BATCH_ID)  # before its row in the ledger
        begun = self._ledger(self.application).select(schema.BATCH_ID).unionAll(aside)
        last = begun.agg(F.max(schema.BATCH_ID)).first()[0]
        self.interrupted = last is not None and not self.checkpoint.has_committed(last)

    def _resume_release(self) -> None:
        """Finish a release that was tagged and not recorded."""
        last = self._waiting().agg(F.max(schema.RELEASED)).collect()[0][0]
        if last is not None and not self._row(schema.LEDGER, self.release_application, last):
            self._finish_release(last)

    def _finish_release(self, number: int) -> int:
        """MERGE, then the ledger row by which a release is known to be complete."""
        events = self._waiting().where(F.col(schema.RELEASED) == number).persist()
        try:
            n = events.count()
            self._know(_distinct_inputs(events))
            self._add_to_users(events, n, self.release_application, number)
        finally:
            events.unpersist()
        counts = {schema.OFFERED: 0, schema.ACCEPTED: n, schema.RELEASED: n}
        self._write_ledger(self.release_application, number, counts)
        self.tally.released += n
        self.tally.applied += n
        log.info("update: released %d waiting events", n)
        return n

    def _add_to_users(
        self, events: DataFrame, n: int, application: str, number: int, offsets: str | None = None
    ) -> None:
        """The progress row and the events' users, at most once each for (application, number)."""
        of_all = self.users.are_most(events.select(USER_ID), n)
        with ExitStack() as held:
            with self._timed("compute"):
                added = self.adder.added(events, n, self.inputs, of_all, self._may_repeat(application))
                measured, rows = held.enter_context(added)
            with self._timed("record"):
                of_inputs = measured[MEASURED_OF].is_valid()
                self._record_progress(measured.filter(pc.invert(of_inputs)), n, application, number, offsets)
                self._learn_arrivals(measured.filter(of_inputs), application, number)
            with self._timed("write"):
                if of_all:
                    self.users.replace(rows, application, number)
                else:
                    self.users.merge(rows, n, application, number)

    def _record_progress(self, measured: pa.Table, n: int, application: str, number: int, offsets: str | None) -> None:
        *sums, users = matrix(measured[MEASURED], len(measured[MEASURED][0])).sum(0)
        self.recent = Progress.unpack(sums)
        self.updated += int(users)
        self._surprises.append((self.recent.standardized.sum(), int(self.recent.n.sum())))
        row = {
            MODEL_VERSION: self.model.version,
            schema.APPLICATION_ID: application,
            schema.BATCH_ID: number,
            schema.OFFSETS: offsets,
            schema.N_EVENTS: n,
            **progress.row_of(self.recent),
        }
        self._append(schema.PROGRESS, row, application, number)

    def _learn_arrivals(self, measured: pa.Table, application: str, number: int) -> None:
        """What the events say of inputs that training had none of, into their features, once for (application, number)."""
        if not len(measured):
            return
        codes = measured[MEASURED_OF].combine_chunks().dictionary_encode()
        of_partitions = matrix(measured[MEASURED], len(measured[MEASURED][0]))
        evidence = np.zeros((len(codes.dictionary), of_partitions.shape[1]))
        np.add.at(evidence, codes.indices.to_numpy(), of_partitions)
        rows = self._features_of(codes.dictionary)
        learnt = arrivals.learn(rows, evidence[index_of(rows[INPUT_ID], codes.dictionary)], self.model)
        new = self.tables.spark.createDataFrame(learnt).alias("new")
        same = f"stored.{MODEL_VERSION} = {self.model.version} AND stored.{INPUT_ID} = new.{INPUT_ID}"
        with self.tables.marked(mark_of(application, number)), self.tables.once(application, number):
            self.tables.delta(schema.FEATURES).alias("stored").merge(new, same).whenMatchedUpdateAll().execute()
        # As the table has them: a repeated batch's were there already.
        self.inputs = arrivals.renewed(self.inputs, self._features_of(codes.dictionary), self.model)

    def _features_of(self, inputs: pa.Array) -> pa.Table:
        rows = self.tables.of_version(schema.FEATURES, self.model.version).join(
            F.broadcast(self._ids(inputs)), INPUT_ID, "left_semi"
        )
        return rows.toArrow()

    def surprise(self, at_least: int) -> tuple[float, int]:
        """Mean squared standardized error of the last batches with ``at_least`` events in all, and how many they are."""
        total, n = 0.0, 0
        for of_batch, events in reversed(self._surprises):
            total, n = total + of_batch, n + events
            if n >= at_least:
                break
        return total / max(n, 1), n

    def forget_surprises(self) -> None:
        self._surprises.clear()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started

    def _know(self, inputs: pa.Array) -> pa.Array:
        """Those of ``inputs`` without features, after evaluating the oracle for those that have attributes."""
        missing = inputs.filter(pa.array(index_of(inputs, self.inputs.ids) < 0))
        if not len(missing):
            return missing
        if materialize(self.tables, self.model, self._ids(missing)) or self._came_elsewhere(missing):
            self.inputs = self._load_inputs()
        return missing.filter(pa.array(index_of(missing, self.inputs.ids) < 0))

    def _came_elsewhere(self, inputs: pa.Array) -> bool:
        """Whether some of these have features that another job materialized."""
        return len(self._features_of(inputs)) > 0

    def _load_inputs(self) -> SharedInputs:
        return arrivals.shared_inputs(self.tables.of_version(schema.FEATURES, self.model.version).toArrow(), self.model)

    def _set_aside(self, batch: DataFrame, unknown: pa.Array, application: str, number: int) -> None:
        rows = batch.join(F.broadcast(self._ids(unknown)), INPUT_ID, "left_semi").select(
            F.lit(self.model.version).cast("long").alias(MODEL_VERSION),
            F.lit(application).alias(schema.APPLICATION_ID),
            *EVENT_COLUMNS,
            F.lit(number).cast("long").alias(schema.BATCH_ID),
            F.lit(None).cast("long").alias(schema.RELEASED),
        )
        self.tables.append(schema.WAITING, rows, once=(application, number))

    def _waiting(self) -> DataFrame:
        return self.tables.of_version(schema.WAITING, self.model.version)

    def _ledger(self, application: str) -> DataFrame:
        return self.tables.read(schema.LEDGER).where(F.col(schema.APPLICATION_ID) == application)

    def _row(self, table: str, application: str, number: int) -> Row | None:
        of_batch = (F.col(schema.APPLICATION_ID) == application) & (F.col(schema.BATCH_ID) == number)
        return self.tables.read(table).where(of_batch).first()

    def _may_repeat(self, application: str) -> bool:
        """Only the first batch of a run can be one that an earlier run began; of releases any."""
        return application == self.release_application or not self.tally.batches

    def _write_ledger(
        self,
        application: str,
        number: int,
        counts: dict[str, int],
        offsets: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        row = {
            schema.QUERY: UPDATE,
            schema.APPLICATION_ID: application,
            schema.BATCH_ID: number,
            schema.SOURCE: self.tables.name(schema.EVENTS),
            schema.OFFSETS: offsets,
            schema.FINGERPRINT: fingerprint,
            **counts,
        }
        self._append(schema.LEDGER, row, application, number)

    def _append(self, table: str, row: dict[str, Any], application: str, number: int) -> None:
        """One row with the time, at most once for (application, number).

        The version's only writer looks whether it is there, and only where it may be: Delta's own guard reads the state
        of the whole table for every commit, which takes twice as long as the commit.
        """
        if self._may_repeat(application) and self._row(table, application, number):
            return
        self.tables.append_rows(table, [row])

    def _ids(self, inputs: pa.Array) -> DataFrame:
        return self.tables.spark.createDataFrame(pa.table({INPUT_ID: inputs}))


def mark_of(application: str, number: int) -> str:
    """Metadata of the commit by which a batch's arrivals were learnt."""
    return f"{application} batch {number}"


def _progress(table: pa.Table, model: Model, inputs: SharedInputs) -> list[tuple[pa.Array, np.ndarray]]:
    users = pc.count_distinct(table[USER_ID].filter(table[INPUT_ID].is_valid())).as_py()
    sums = progress.measure(table, model, inputs).pack()
    return [(pa.nulls(1, pa.string()), np.append(sums, users)[None, :])]  # as Updater._record_progress takes them apart


def _progress_and_evidence(table: pa.Table, model: Model, inputs: SharedInputs) -> list[tuple[pa.Array, np.ndarray]]:
    return [*_progress(table, model, inputs), arrivals.evidence(table, model, inputs)]


def _distinct_inputs(events: DataFrame) -> pa.Array:
    return events.select(INPUT_ID).distinct().toArrow()[INPUT_ID].combine_chunks()
