"""The update query of one model version: started when there is something to read, tended, stopped between batches."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack

from pyspark.errors import StreamingQueryException
from pyspark.sql.streaming import StreamingQuery

from mtl import schema
from mtl.checkpoint import Checkpoint, end_of
from mtl.config import Settings
from mtl.errors import ConfigError
from mtl.lock import exclusive
from mtl.model import Model
from mtl.parse import EVENT_COLUMNS
from mtl.read import is_remote
from mtl.recover import advice, already_applied, check, drop_unplanned, recover, starting_place
from mtl.sharing import cores
from mtl.tables import Tables
from mtl.updater import Updater
from mtl.zeros import WithZeros

log = logging.getLogger("mtl")


class Stream:
    """A model version's update query in this process, in a session of its own; one writer of the version's users.

    Args:
        from_ledger: give the old checkpoint up and go on from the ledger (:mod:`mtl.recover`).

    Raises:
        StateError: another process updates the version.
        ReplayError: the checkpoint is damaged, or is not the one behind the ledger.
    """

    def __init__(self, tables: Tables, settings: Settings, model: Model, from_ledger: bool = False):
        self.settings = settings
        self.model = model
        self.tables = tables.apart()
        self.query: StreamingQuery | None = None
        checkpoint = Checkpoint(folder_of(tables, settings, model.version), advice(model.version))
        self._held = ExitStack()
        self._held.enter_context(exclusive(f"{checkpoint.folder}.lock", f"the update of model version {model.version}"))
        try:
            self.updater = self._open(checkpoint, from_ledger)
            self.batches_before = checkpoint.done  # of earlier runs
        except BaseException:
            self._held.close()
            raise

    def _open(self, checkpoint: Checkpoint, from_ledger: bool) -> Updater:
        partitions = self.settings.update.partitions or cores(self.tables.spark)
        # An input without the zeros that others have would be learnt from its ones alone (mtl.zeros).
        has_zeros = isinstance(self.model.artefact.users, WithZeros)
        has_residuals = bool(self.model.artefact.inputs.covariance.any())  # else inputs are what the oracle says
        learn_arrivals = self.settings.update.learn_arrivals and has_residuals and not has_zeros
        rewrite_above, keep_bytes = self.settings.update.rewrite_above, self.settings.update.keep_mb << 20
        updater = Updater(self.tables, self.model, checkpoint, partitions, learn_arrivals, rewrite_above, keep_bytes)
        if from_ledger:
            updater.finish_release()
            recover(self.tables, self.model, checkpoint)
        check(updater)
        if checkpoint.is_new:
            drop_unplanned(self.tables, self.model.version)
        else:
            updater.resume()
        updater.already = already_applied(updater)
        return updater

    @property
    def name(self) -> str:
        """The query's, to Spark."""
        return f"update-v{self.model.version}"

    def tend(self) -> None:
        """One look: start the query when there is a commit to start from, apply waiting events whose input came.

        Raises:
            Exception: what a batch died of.
        """
        if self.query is None:
            self._start({"processingTime": f"{self.settings.update.trigger_seconds} seconds"})
        elif not self.query.isActive:
            self._raise()
        self.updater.release_if_inputs_came()

    def drain(self, stop: threading.Event | None = None) -> None:
        """Apply all events there are, and waiting ones whose input is there; return when ``stop`` is set, to be closed."""
        self._start({"availableNow": True})
        try:
            while self.query and not self.query.awaitTermination(1):
                if stop and stop.is_set():
                    return  # to be closed
        except StreamingQueryException as error:
            raise self.updater.failure or error from error
        self.updater.release()
        self.updater.adder.forget()

    def close(self) -> None:
        """Stop after the batch in hand and let others update the version."""
        try:
            if self.query:
                self.updater.gate.close()
                self.query.stop()
        finally:
            self._held.close()

    @property
    def batches(self) -> int:
        """Batches that are done, of all runs with this checkpoint."""
        return self.updater.checkpoint.done

    @property
    def consumed(self) -> int:
        """The last commit of events of which every file has been applied."""
        done = self.batches
        place = end_of(self.updater.checkpoint.offsets(done - 1)) if done else starting_place(self.updater)
        return place[0] - 1  # also where it is within the commit

    def _start(self, trigger: dict[str, str | bool]) -> None:
        """Delta starts no stream at a commit that does not exist yet."""
        first, _ = starting_place(self.updater)
        if self.updater.checkpoint.is_new and self.tables.version(schema.EVENTS) < first:
            return
        update = self.settings.update
        limits: dict[str, str | int] = {"maxFilesPerTrigger": update.max_files_per_trigger}
        if update.max_bytes_per_trigger:
            limits["maxBytesPerTrigger"] = update.max_bytes_per_trigger
        # Events are only ever taken away by an erasure, which sees to the users itself.
        events = self.tables.stream(schema.EVENTS, startingVersion=first, skipChangeCommits="true", **limits)
        events = events.select(*EVENT_COLUMNS)
        writer = events.writeStream.foreachBatch(self.updater.apply)
        writer = writer.option("checkpointLocation", self.updater.checkpoint.folder).trigger(**trigger)
        self.query = writer.queryName(self.name).start()

    def _raise(self) -> None:
        assert self.query is not None
        error = self.updater.failure or self.query.exception()
        raise error or RuntimeError(f"the update query of model version {self.model.version} ended by itself")


def folder_of(tables: Tables, settings: Settings, version: int) -> str:
    """The checkpoint folder of a version's query.

    Raises:
        ConfigError: the tables are in a catalog or an object store and no folder is set, or one that is not local.
    """
    if is_remote(settings.update.checkpoints):
        raise ConfigError("update.checkpoints: name a local folder, which the driver can open")
    if settings.update.checkpoints:
        return f"{settings.update.checkpoints}/update-v{version}"
    if tables.checkpoints is None:
        raise ConfigError("update.checkpoints: name a local folder, for tables elsewhere have none beside them")
    return f"{tables.checkpoints}/update-v{version}"
