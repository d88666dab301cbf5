"""Small files put together and old ones removed, between the batches of the streams that write them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mtl import schema
from mtl.config import CareSettings
from mtl.tables import Tables

if TYPE_CHECKING:
    from mtl.stream import Stream

log = logging.getLogger("mtl")

# Written by every version's stream, each in a partition of its own.
_OF_A_VERSION = (schema.USERS, schema.FEATURES, schema.WAITING)
# Written by appends only, which a compaction never disturbs.
_SHARED = (schema.EVENTS, schema.QUARANTINE, schema.LEDGER, schema.PROGRESS)


class Care:
    """Compacts after every so many batches, vacuums after every so many compactions."""

    def __init__(self, tables: Tables, settings: CareSettings):
        self.tables = tables.apart()  # the streams' sessions may hold a transaction's id just now
        self.settings = settings
        self._batches: dict[int, int] = {}  # of each version, at the last look

    def look(self, streams: Mapping[int, Stream], live: int | None) -> None:
        """Compact what has had its batches; one stream at a time, each between two of its batches."""
        every = self.settings.compact_every_batches
        for version, stream in streams.items():
            before, done = self._batches.get(version, stream.batches_before), stream.batches
            self._batches[version] = done
            if not every or done // every == before // every:
                continue
            with stream.updater.gate:
                for table in _OF_A_VERSION:
                    compact(self.tables, table, version)
            if version == live:
                for table in _SHARED:
                    compact(self.tables, table)
                rarely = every * self.settings.vacuum_every_compactions
                if rarely and done // rarely != before // rarely:
                    for table in (*_OF_A_VERSION, *_SHARED):
                        vacuum(self.tables, table)


def compact(tables: Tables, table: str, version: int | None = None) -> None:
    """OPTIMIZE the table, or a version's partition of it."""
    if not tables.exists(table):
        return
    where = f" WHERE {schema.MODEL_VERSION} = {version}" if version is not None else ""
    row = tables.spark.sql(f"OPTIMIZE {tables.name(table)}{where}").first()
    metrics = row["metrics"]
    if metrics["numFilesAdded"]:
        log.info("care: %s: %d files are now %d", table, metrics["numFilesRemoved"], metrics["numFilesAdded"])


def vacuum(tables: Tables, table: str) -> None:
    """Remove files that are older than the table's retention and no longer of it."""
    if tables.exists(table):
        tables.spark.sql(f"VACUUM {tables.name(table)}").collect()
