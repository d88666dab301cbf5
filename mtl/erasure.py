"""One request to erase: the users or events that are meant, and its row of the ``erasures`` table."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.config import Settings
from mtl.errors import InputError
from mtl.ledger import ERASE
from mtl.parse import EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS, offered_events, text_id
from mtl.read import MALFORMED, match, open_file, quoted
from mtl.schema import EVENT_ID, RAW, REASON, USER_ID
from mtl.tables import Tables


@dataclass(frozen=True)
class Erasure:
    """One request: ids of users or of events, and for a correction the file that the events come back from."""

    id: str
    key: str  # USER_ID or EVENT_ID
    ids: tuple[str, ...]
    corrections: str | None = None  # JSON: path, columns

    @classmethod
    def of(cls, key: str, ids: Iterable[str], corrections: str | None = None) -> Erasure:
        """A new one."""
        return cls(uuid.uuid4().hex, key, tuple(dict.fromkeys(ids)), corrections)

    @property
    def application(self) -> str:
        return f"{ERASE}-{self.id}"

    @property
    def metadata(self) -> str:
        return schema.ERASURE + self.id

    def frame(self, tables: Tables) -> DataFrame:
        return tables.spark.createDataFrame([(i,) for i in self.ids], f"{self.key} string")


def ids_of_file(tables: Tables, settings: Settings, path: str, columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """What a file's ids are of, USER_ID or EVENT_ID, and the ids.

    Raises:
        InputError: it is no list of one of them, or a row has none.
    """
    source = open_file(tables.spark, path, settings.ingest, texts=None)
    found = match(source, columns, (USER_ID, EVENT_ID), ())
    if len(found) != 1:
        raise InputError(
            f"{path}: give one column, {USER_ID} of whole users or {EVENT_ID} of single events, not {found or 'none'}"
        )
    ((key, theirs),) = found.items()
    identity = F.when(F.col(MALFORMED).isNull(), text_id(quoted(theirs), source.kind(theirs)))
    rows = source.rows.select(identity.alias(key), F.when(identity.isNull(), source.raw()).alias(RAW)).collect()
    if not rows:
        raise InputError(f"{path}: there is no {key} in it")
    unread = [row[RAW] for row in rows if row[key] is None]
    if unread:
        raise InputError(
            f"{path}: {len(unread)} of {len(rows)} rows have no {key}; nothing was erased; the first: {unread[0]}"
        )
    return key, [row[key] for row in rows]


def correction(tables: Tables, settings: Settings, path: str, columns: Mapping[str, str]) -> Erasure:
    """Of the events of a file that differ from those there are under their ids, to be ingested anew.

    Raises:
        InputError: a row is no event, an id is unknown, or is there twice.
    """
    source = open_file(tables.spark, path, settings.ingest, texts=None)
    _, rows = offered_events(source, columns, settings.model, (EVENT_ID, *REQUIRED_EVENT_COLUMNS))
    rows = rows.persist()
    try:
        n, ids, refused, reason = rows.agg(
            F.count("*"), F.count_distinct(EVENT_ID), F.count(REASON), F.first(REASON, ignorenulls=True)
        ).collect()[0]
        if refused:
            raise InputError(
                f"{path}: {refused} of {n} rows are no events, and nothing was changed; the first: {reason}"
            )
        if n != ids:
            raise InputError(f"{path}: {n} rows have {ids} different ids: an event is corrected to one row")
        stored = tables.read(schema.EVENTS).select(*EVENT_COLUMNS)
        new = rows.select(*EVENT_COLUMNS)
        unknown = new.join(stored, EVENT_ID, "left_anti").select(EVENT_ID).first()
        if unknown:
            raise InputError(f"{path}: there is no event {unknown[0]} to correct; new events go to jobs/ingest.py")
        changed = new.exceptAll(stored).select(EVENT_ID).collect()
    finally:
        rows.unpersist()
    where = json.dumps({"path": os.path.abspath(path) if os.path.exists(path) else path, "columns": dict(columns)})
    return Erasure.of(EVENT_ID, (row[0] for row in changed), where)


def pending(tables: Tables) -> list[Erasure]:
    """Those that were begun and have not ended, the oldest first."""
    rows = tables.read(schema.ERASURES).where(F.col(schema.STATE) == schema.PLANNED).orderBy(schema.CREATED_AT)
    return [
        Erasure(row[schema.ERASURE_ID], row[schema.KEY], tuple(row[schema.IDS]), row[schema.CORRECTIONS])
        for row in rows.collect()
    ]


def plan(tables: Tables, erasure: Erasure) -> None:
    """Write its row, once."""
    row = {
        schema.ERASURE_ID: erasure.id,
        schema.STATE: schema.PLANNED,
        schema.KEY: erasure.key,
        schema.IDS: list(erasure.ids),
        schema.CORRECTIONS: erasure.corrections,
    }
    tables.append_rows(schema.ERASURES, [row], once=(erasure.application, 0))


def close(tables: Tables, erasure: Erasure, report: dict[str, Any]) -> None:
    """Have its row say that it is done, and forget its ids."""
    values = {
        schema.STATE: F.lit(schema.DONE),
        schema.IDS: F.array().cast("array<string>"),
        schema.CORRECTIONS: F.lit(None).cast("string"),
        schema.REPORT: F.lit(json.dumps(report)),
        schema.FINISHED_AT: F.current_timestamp(),
    }
    tables.delta(schema.ERASURES).update(F.col(schema.ERASURE_ID) == erasure.id, values)
