"""A small problem whose events are streamed, and what tests of the stream ask of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import functions as F

from mtl import schema
from mtl.audit import audit
from mtl.config import Settings, load_settings
from mtl.layout import SCHEMAS
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, USERS, WEIGHT
from mtl.tables import Tables
from mtl.updater import Updater

PROBLEM = planted(3, users=20, inputs=12, k=2, events=400)
TRAINED = 250  # events that training sees; the others stream


def settings(*assignments: str) -> Settings:
    return load_settings(
        [], ["tables.root=unused", "model.k=2", "train.iterations=3", "encode.min_category_count=1", *assignments]
    )


ONE_FILE_A_BATCH = settings("update.max_files_per_trigger=1")


def rows(events: np.ndarray, users: str = "u", inputs: str = "x") -> pd.DataFrame:
    return pd.DataFrame(
        {
            EVENT_ID: [f"{users}{inputs}{i}" for i in events],
            USER_ID: [f"{users}{i}" for i in PROBLEM.user[events]],
            INPUT_ID: [f"{inputs}{i}" for i in PROBLEM.input[events]],
            LABEL: PROBLEM.label[events],
            WEIGHT: PROBLEM.weight[events],
        }
    )


def append(tables: Tables, events: pd.DataFrame, files: int = 1) -> None:
    """One commit."""
    missing = [F.lit(None).cast(c.dataType).alias(c.name) for c in SCHEMAS[schema.EVENTS] if c.name not in events]
    new = tables.spark.createDataFrame(events).select("*", *missing)
    new = new.coalesce(1) if files == 1 else new.repartition(files)
    tables.append(schema.EVENTS, new.select(SCHEMAS[schema.EVENTS].names))


def vacuum(tables: Tables, table: str) -> None:
    """Take away at once what the table no longer has."""
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    tables.spark.conf.set(check, "false")
    try:
        tables.spark.sql(f"VACUUM {tables.name(table)} RETAIN 0 HOURS").collect()
    finally:
        tables.spark.conf.unset(check)


def state(tables: Tables) -> pd.DataFrame:
    kept = tables.read(USERS).select(USER_ID, schema.A, schema.B, schema.W, schema.N_EVENTS).toPandas()
    return kept.set_index(USER_ID).sort_index()


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    assert one.index.equals(other.index)
    assert (one[schema.N_EVENTS] == other[schema.N_EVENTS]).all()
    for name in (schema.A, schema.B, schema.W):
        np.testing.assert_allclose(np.stack(one[name]), np.stack(other[name]), rtol=1e-8, atol=1e-8)


def broken(tables: Tables) -> list[str]:
    """Invariants that fail; the events here come without ingest, so its own is left out."""
    return [name for name in audit(tables, settings())["broken"] if name != "ingest_adds_up"]


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, step: str, before: bool, call: int = 0) -> Iterator[None]:
    """The job dies before or after its ``call``-th ``step``."""
    real, calls = getattr(Updater, step), []

    def die(self: Updater, *arguments: object, **named: object) -> object:
        calls.append(step)
        if before and len(calls) == call + 1:
            raise RuntimeError("killed")
        result = real(self, *arguments, **named)
        if len(calls) == call + 1:
            raise RuntimeError("killed")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Updater, step, die)
        with pytest.raises(RuntimeError, match="killed"):
            yield
