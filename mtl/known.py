"""The events that the table knows, by an index of their ids at a cost that does not grow with the table.

A key is the first 128 bits of SHA-256 of the event id. Two ids with one key are not known and cannot be searched for
(2^64 trials); by chance, a table of 10^9 events has such a pair with probability 10^-21: this is what "exact" means
here, and it is no less than what derived ids are themselves.

The keys are in an :class:`mtl.idset.IdSet` beside the stream's checkpoint, marked with the table and the version that
they are of. It is a cache and never the truth: what others committed since is read from the files that they added, a
set that is missing, damaged or of another table is built anew, and a crash before a batch's own keys are added is
healed the same way. After an erasure the set is built anew, for a key of it may be of an event that is gone.
"""

from __future__ import annotations

import logging
import time
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from mtl.batches import Batch, count_rows, persistently
from mtl.idset import IdSet, Keys
from mtl.schema import EVENT_ID, EVENTS
from mtl.tables import Tables

log = logging.getLogger("mtl")

_KEY = "key"
_BYTES_AT_ONCE = 1 << 28  # of files of the table: what building the index reads before it writes


class KnownEvents:
    """The ids of the events table; ``folder`` holds the index, for one process at a time."""

    def __init__(self, tables: Tables, folder: str):
        self.tables = tables
        self.ids = IdSet(folder)
        self.version: int | None = None  # of the table, that the index is of
        self.details: Row | None = None

    def refresh(self) -> None:
        """Take in what the table has and the index has not."""
        self.details = details = self.details or self.tables.delta(EVENTS).detail().first()
        version = self.tables.version(EVENTS)
        mark = self.ids.mark or {}
        if mark.get("table") != details["id"] or mark["version"] > version:
            self.ids.clear()
        elif mark["version"] == version:
            self.version = version
            return
        if self.ids.mark and self.tables.only_rearranged_since(EVENTS, mark["version"]):
            self._mark(version)
            return
        files = self._files(version)
        if self.ids.mark and self.tables.erased_since(EVENTS, mark["version"]):
            self.ids.clear()
        if self.ids.mark:
            try:
                files -= self._files(mark["version"])
            except (PySparkException, Py4JJavaError):  # its log is cleaned
                self.ids.clear()
        started, before = time.monotonic(), len(self.ids)
        average = max(1, details["sizeInBytes"] // max(1, details["numFiles"]))
        at_once = max(1, _BYTES_AT_ONCE // average)
        ordered = sorted(files)
        for begin in range(0, len(ordered), at_once):
            part = ordered[begin : begin + at_once]
            rows = self.tables.spark.read.schema(f"{EVENT_ID} string").parquet(*part)
            self.ids.add(_keys(rows.select(_key().alias(_KEY)).toArrow()), None)  # a crash starts over
        self._mark(version)
        took = time.monotonic() - started
        log.info("ingest: %d ids indexed from %d files, %.1f s", len(self.ids) - before, len(files), took)

    def _mark(self, version: int) -> None:
        """Note that the index is of this version of the table."""
        assert self.details is not None
        self.ids.add(np.empty((0, 2), np.uint64), {"table": self.details["id"], "version": version})
        self.version = version

    def append(self, events: DataFrame, batch: Batch) -> int | None:
        """Append those events whose id is not in the table, at most once.

        Args:
            events: rows of the table, one an id.
            batch: whose they are.

        Returns:
            How many events of the batch the table has then; None where the append was refused, for another ingest
            used its transaction up.
        """
        self.refresh()
        rows = events.select(EVENT_ID, _key().alias(_KEY)).toArrow()
        keys = _keys(rows)
        known = self.ids.contains(keys)
        if known.any():
            there = pa.table({EVENT_ID: rows[EVENT_ID].filter(pa.array(known))})
            there = F.broadcast(self.tables.spark.createDataFrame(there))
            events = events.join(there, EVENT_ID, "left_anti").select(events.columns)
        new = keys[~known]
        if len(new):
            self._append(events, batch)
        n = count_rows(self.tables, EVENTS, batch.name)
        if n < len(new):
            return None
        if len(new):
            self._add(new)
        return n

    def _append(self, events: DataFrame, batch: Batch) -> None:
        persistently(lambda: self.tables.append(EVENTS, events, once=batch.committed))

    def _add(self, keys: Keys) -> None:
        version = self.tables.version(EVENTS)
        # This append's alone; else others wrote, and the next refresh sees to it.
        if self.version is not None and version == self.version + 1:
            self.ids.add(keys, {**self.ids.mark, "version": version})
            self.version = version

    def _files(self, version: int) -> set[str]:
        return {unquote(file) for file in self.tables.read(EVENTS, version).inputFiles()}


def _key() -> Column:
    return F.unhex(F.substring(F.sha2(F.col(EVENT_ID), 256), 1, 32))


def _keys(rows: pa.Table) -> Keys:
    column = rows[_KEY].combine_chunks().cast(pa.binary(16))
    return np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)[column.offset : column.offset + len(column)]
