"""The update job: the live version and its candidates kept up to date side by side, and the switch from one to another.

Every version has a query of its own (:mod:`mtl.stream`), so a candidate that catches up never holds the live one up. What
is live is one word in the models table: the job writes it when its policy says so, reads it on every look, and follows
whatever a person writes there.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from pyspark.sql import functions as F

from mtl import models, schema
from mtl.care import Care
from mtl.checkpoint import end_of
from mtl.config import Settings
from mtl.errors import LockedError
from mtl.ledger import batches_of
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import MODEL_VERSION
from mtl.stream import Stream
from mtl.switch import Comparison, Validated, compare, has_drifted
from mtl.tables import Tables
from mtl.watch import Watch

log = logging.getLogger("mtl")


def update(
    tables: Tables,
    settings: Settings,
    available_now: bool = True,
    version: int | None = None,
    stop: threading.Event | None = None,
    from_ledger: bool = False,
) -> dict[str, Any]:
    """Apply events to the users of the live version and its candidates, each from where it stopped.

    Args:
        available_now: end when all events there are have been applied, and not only when ``stop`` is set.
        version: this version alone.
        from_ledger: give up the old checkpoint of ``version``, by default the live one's, and go on from the ledger.

    Returns:
        What was done for the version that was live at the end, and for the others under ``versions``.

    Raises:
        StateError: there is no such version, or another process updates it.
        ReplayError: the version was updated through another checkpoint, or its checkpoint is damaged.
    """
    started = time.monotonic()
    model = load_model(tables, version)
    tables.create(schema.EVENTS, schema.INPUTS, schema.USER_ATTRIBUTES, schema.WAITING, schema.LEDGER, schema.PROGRESS)
    fleet = Fleet(tables, settings, only=version)
    try:
        if from_ledger:
            fleet.start(model.version, from_ledger=True)
        stop = stop or threading.Event()
        fleet.drain(stop) if available_now else fleet.run(stop)
    finally:
        fleet.close()
    return {**fleet.report(version or models.live_version(tables)), "seconds": round(time.monotonic() - started, 3)}


def between_looks(settings: Settings) -> float:
    """Time between two looks at the tables (seconds)."""
    return max(0.5, min(settings.update.trigger_seconds, 5))


class Fleet:
    """The streams of the versions that are updated, one of them live."""

    def __init__(self, tables: Tables, settings: Settings, only: int | None = None):
        self.tables = tables
        self.settings = settings
        self.only = only
        self.streams: dict[int, Stream] = {}
        self.tallies: dict[int, dict[str, int]] = {}
        self.comparisons: dict[int, Comparison] = {}
        # Batches of a candidate and of the live version, and which that was, at the last comparison.
        self._compared: dict[int, tuple[int, ...]] = {}
        self.promoted: list[int] = []
        self._failed: dict[int, Exception] = {}  # of candidates whose stream died: they hold nobody up
        self._leaving: dict[int, float] = {}  # versions that were live, and when their stream stops
        self._retraining: threading.Thread | None = None
        self._care = Care(tables, settings.care)
        where = settings.update.metrics_host, settings.update.metrics_port
        self.watch = Watch(*where) if settings.update.metrics_port else None
        self.live = models.live_version(tables)

    def start(self, version: int, from_ledger: bool = False) -> Stream:
        if version not in self.streams:
            self.streams[version] = Stream(self.tables, self.settings, load_model(self.tables, version), from_ledger)
            if self.watch:
                self.streams[version].tables.spark.streams.addListener(self.watch.listener)
            log.info("update: model version %d is followed", version)
        return self.streams[version]

    def drain(self, stop: threading.Event) -> None:
        """Every stream to its end, the live one first; then the switch, if the policy says so."""
        for version in self._wanted():
            try:
                self.start(version).drain(stop)
            except Exception as error:
                self._take_down(version, error)
            if stop.is_set():
                return
        self._judge()
        self._care.look(self.streams, self.live)

    def run(self, stop: threading.Event) -> None:
        """Tend the streams until ``stop``."""
        while not stop.is_set():
            self._look()
            stop.wait(between_looks(self.settings))

    def close(self) -> None:
        for version in list(self.streams):
            self._end(version)
        if self.watch:
            self.watch.close()

    def report(self, version: int | None) -> dict[str, Any]:
        nothing = {"batches": 0, "events": 0, "applied": 0, "waited": 0, "released": 0}
        others = {str(v): tally for v, tally in self.tallies.items() if v != version}
        compared = {str(v): vars(comparison) for v, comparison in self.comparisons.items() if comparison.n}
        return {
            "model_version": version,
            **self.tallies.get(version or 0, nothing),
            "versions": others,
            "compared": compared,
            "promoted": self.promoted,
            **({"failed_candidates": {v: str(error) for v, error in self._failed.items()}} if self._failed else {}),
        }

    def _look(self) -> None:
        live = models.live_version(self.tables)
        if live != self.live:
            log.info("update: model version %s is live, it was %s", live, self.live)
            if self.live is not None:
                self._leaving[self.live] = time.monotonic() + self.settings.switch.grace_seconds
            self.live = live
        wanted = self._wanted()
        for version in wanted:
            try:
                self.start(version).tend()
                self._failed.pop(version, None)
            except Exception as error:
                self._take_down(version, error)
        for version in [v for v in self.streams if v not in wanted]:
            self._end(version)
        self._judge()
        self._watch_drift()
        self._care.look(self.streams, self.live)
        if self.watch:
            self.watch.look(self)

    def _wanted(self) -> list[int]:
        """The live version, candidates newer than it, and those that were live a moment ago."""
        if self.only is not None:
            return [self.only]
        # One that another job holds is tried again, until that has ended.
        out = {v for v, error in self._failed.items() if not isinstance(error, LockedError)}
        candidates = [v for v in models.candidates(self.tables) if v > (self.live or 0) and v not in out]
        now = time.monotonic()
        leaving = [v for v, until in self._leaving.items() if now < until and v != self.live]
        return list(dict.fromkeys([*([self.live] if self.live else []), *candidates, *leaving]))

    def _take_down(self, version: int, error: Exception) -> None:
        """A candidate's failure is its own; the live version's, or that of the one that was asked for, is the job's."""
        self._end(version)
        if version in (self.live, self.only):
            raise error
        if str(error) != str(self._failed.get(version)):
            log.warning("update: model version %d is not followed: %s", version, error)
        self._failed[version] = error

    def _end(self, version: int) -> None:
        stream = self.streams.pop(version, None)
        if stream:
            self.tallies[version] = vars(stream.updater.tally)
            stream.close()

    def _judge(self) -> None:
        """Compare the candidates with the live version, and switch or refuse where the policy is automatic."""
        if self.live is None or self.only is not None:
            return
        policy = self.settings.switch
        for version in sorted(v for v in self.streams if v > self.live and v not in self._leaving):
            head = self.tables.version(schema.EVENTS)
            if head - self.streams[version].consumed > policy.lag_commits:
                continue
            batches = tuple(self.streams[of].batches for of in (version, self.live))
            if self._compared.get(version) != (*batches, self.live):
                self.comparisons[version] = compare_versions(self.tables, version, self.live)
                self._compared[version] = (*batches, self.live)
            comparison = self.comparisons[version]
            verdict = comparison.verdict(policy)
            if policy.policy == "manual" or verdict == "wait":
                continue
            log.info("update: candidate %d against %d: %s, %s", version, self.live, comparison, verdict)
            if verdict == "promote":
                models.promote(self.tables, version)
                self.promoted.append(version)
                return
            models.refuse(self.tables, version)

    def _watch_drift(self) -> None:
        """Ask for a retraining when the live version's errors outgrow its own uncertainty."""
        if self.live is None or self.live not in self.streams:
            return
        updater = self.streams[self.live].updater
        surprise, n = updater.surprise(self.settings.switch.surprise_events)
        if not has_drifted(surprise, n, self.settings.switch) or models.is_answered(self.tables, self.live):
            return
        reason = f"model version {self.live}: mean squared standardized error {surprise:.2f} over {n} events"
        log.warning("update: a retraining is asked for: %s", reason)
        models.request_retraining(self.tables, reason)
        updater.forget_surprises()  # the next request is of other events
        if self.settings.switch.retrain_here and not (self._retraining and self._retraining.is_alive()):
            self._retraining = threading.Thread(target=self._retrain, name="retraining", daemon=True)
            self._retraining.start()

    def _retrain(self) -> None:
        try:
            retrain(self.tables.apart(), self.settings)
        except Exception as error:  # of a thread: nobody else would hear of it
            log.error("update: the retraining failed, and the request stays: %s", error)


def compare_versions(tables: Tables, candidate: int, live: int) -> Comparison:
    """:func:`mtl.switch.compare` with what the progress table holds."""
    start = {
        row[MODEL_VERSION]: (row[schema.EVENTS_VERSION] + 1, -1)
        for row in tables.read(schema.MODELS)
        .where(F.col(MODEL_VERSION).isin(candidate, live))
        .select(MODEL_VERSION, schema.EVENTS_VERSION)
        .collect()
    }
    return compare(_validated(tables, candidate), start[candidate], _validated(tables, live), start[live])


def _validated(tables: Tables, version: int) -> list[Validated]:
    """Batches of the ledger, with what the progress table has of them: nothing where all their events waited."""
    batch = [schema.APPLICATION_ID, schema.BATCH_ID]
    # The two versions' batches are not the same: each counts by its events, however many of them were measured.
    loss = F.col(schema.LOSS) / F.col(schema.VALIDATED) * F.col(schema.N_EVENTS)
    measured = tables.read(schema.PROGRESS).where(F.col(schema.VALIDATED) > 0)
    measured = measured.select(*batch, schema.N_EVENTS, loss.alias(schema.LOSS))
    rows = batches_of(tables, version).join(measured, batch, "left").orderBy(schema.CREATED_AT)
    return [
        Validated(end_of(row[schema.OFFSETS]), row[schema.N_EVENTS] or 0, row[schema.LOSS] or 0.0)
        for row in rows.select(schema.OFFSETS, schema.N_EVENTS, schema.LOSS, schema.CREATED_AT).collect()
    ]
