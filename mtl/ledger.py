"""The update stream's rows of the ledger: what each version's batches, releases, recoveries and erasures did."""

from __future__ import annotations

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import schema
from mtl.checkpoint import end_of
from mtl.model import Model
from mtl.tables import Tables

UPDATE, ERASE = "update", "erase"  # the ledger's queries that change users


def ledger_of(tables: Tables, version: int, query: str = UPDATE, commit: int | None = None) -> DataFrame:
    """The rows of a version's batches, releases and recoveries, or of its erasures; now or as of a commit of the ledger."""
    rows = tables.read(schema.LEDGER, commit).where(F.col(schema.QUERY) == query)
    return rows.where(F.split(schema.APPLICATION_ID, "-")[1] == f"v{version}")


def batches_of(tables: Tables, version: int) -> DataFrame:
    """Those that stand for a place in the source: batches and recoveries."""
    return ledger_of(tables, version).where(F.col(schema.OFFSETS).isNotNull())


def last_batch(tables: Tables, version: int) -> Row | None:
    return batches_of(tables, version).orderBy(F.col(schema.CREATED_AT).desc()).first()


def consumed(tables: Tables, model: Model) -> int | None:
    """The events commit through which training and stream have read; None where the stream is within one."""
    last = last_batch(tables, model.version)
    if last is None:
        return model.events_version
    commit, file = end_of(last[schema.OFFSETS])
    return commit - 1 if file < 0 else None


def added(tables: Tables, version: int, query: str = UPDATE) -> int:
    """How many events these rows say that the version's users got; negative of erasures."""
    return ledger_of(tables, version, query).agg(F.sum(schema.ACCEPTED)).first()[0] or 0
