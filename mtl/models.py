"""Model versions in their table: which there are, which one is live, and how that is switched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.errors import StateError
from mtl.lock import exclusive
from mtl.model import Model, model_of
from mtl.tables import Tables


def load_model(tables: Tables, version: int | None = None) -> Model:
    """The model of a version, the live one by default.

    Raises:
        StateError: there is no such version, or none is live.
    """
    models = tables.read(schema.MODELS)
    wanted = F.col(schema.STATUS) == schema.LIVE if version is None else F.col(schema.MODEL_VERSION) == version
    rows = models.where(wanted).collect()
    if not rows:
        what = (
            "no model version is live: run jobs/retrain.py"
            if version is None
            else f"there is no model version {version}"
        )
        raise StateError(f"{what} (tables.root = {tables.root})")
    return model_of(rows[0].asDict())


@contextmanager
def one_retraining(tables: Tables) -> Iterator[None]:
    """The numbers of versions are one retraining's at a time, where a lock can be held; elsewhere that is the caller's matter.

    Raises:
        LockedError: another is running.
    """
    folder = tables.checkpoints
    with exclusive(f"{folder}/retrain.lock", "a retraining") if folder else nullcontext():
        yield


def next_version(tables: Tables) -> int:
    """The number for a new version; rows that a retraining left behind when it died are cleared from under it."""
    last = tables.read(schema.MODELS).agg(F.max(schema.MODEL_VERSION)).collect()[0][0]
    version = (last or 0) + 1
    for table in (schema.FEATURES, schema.USERS):
        tables.delta(table).delete(F.col(schema.MODEL_VERSION) >= version)
    return version


def publish(tables: Tables, row: Mapping[str, Any]) -> None:
    """Append the row of a model (:func:`mtl.model.model_row`): from then on the version exists."""
    now = datetime.now(timezone.utc)
    promoted = now if row[schema.STATUS] == schema.LIVE else None
    tables.append_rows(schema.MODELS, [{**row, schema.CREATED_AT: now, schema.PROMOTED_AT: promoted}])


def versions(tables: Tables) -> DataFrame:
    """(model_version, status, promoted_at) of every version."""
    rows = tables.read(schema.MODELS).where(F.col(schema.STATUS) != schema.REQUESTED)
    return rows.select(schema.MODEL_VERSION, schema.STATUS, schema.PROMOTED_AT)


def live_version(tables: Tables) -> int | None:
    row = versions(tables).where(F.col(schema.STATUS) == schema.LIVE).first()
    return row[schema.MODEL_VERSION] if row else None


def has_live(tables: Tables) -> bool:
    return live_version(tables) is not None


def candidates(tables: Tables) -> list[int]:
    rows = versions(tables).where(F.col(schema.STATUS) == schema.CANDIDATE).collect()
    return sorted(row[schema.MODEL_VERSION] for row in rows)


def refuse(tables: Tables, version: int) -> None:
    """Take a candidate out of the running: worse than the live version on fresh events."""
    same = (F.col(schema.MODEL_VERSION) == version) & (F.col(schema.STATUS) == schema.CANDIDATE)
    tables.delta(schema.MODELS).update(same, {schema.STATUS: F.lit(schema.REFUSED)})


def request_retraining(tables: Tables, reason: str) -> None:
    """A row in models that asks for a new version; the next version that is published answers it."""
    row = {schema.STATUS: schema.REQUESTED, schema.METRICS: json.dumps({"reason": reason})}
    tables.append_rows(schema.MODELS, [row])


def is_requested(tables: Tables) -> bool:
    """Whether a retraining was asked for after the newest version."""
    asked = F.max(F.when(F.col(schema.STATUS) == schema.REQUESTED, F.col(schema.CREATED_AT)))
    made = F.max(F.when(F.col(schema.STATUS) != schema.REQUESTED, F.col(schema.CREATED_AT)))
    row = tables.read(schema.MODELS).agg(asked.alias("asked"), made.alias("made")).first()
    return row["asked"] is not None and (row["made"] is None or row["asked"] > row["made"])


def is_answered(tables: Tables, live: int) -> bool:
    """Whether a retraining has been asked for already, or a version later than the live one waits to take its place."""
    return is_requested(tables) or any(version > live for version in candidates(tables))


def promote(tables: Tables, version: int | None = None) -> dict[str, int | None]:
    """Make a version live, the newest candidate by default, and retire the one that was; one commit.

    Raises:
        StateError: there is no such version, or no candidate.
    """
    rows = versions(tables).collect()
    live = next((row[schema.MODEL_VERSION] for row in rows if row[schema.STATUS] == schema.LIVE), None)
    if version is None:
        version = max(
            (row[schema.MODEL_VERSION] for row in rows if row[schema.STATUS] == schema.CANDIDATE), default=None
        )
        if version is None:
            raise StateError("there is no candidate to promote: run jobs/retrain.py, or name a version")
    elif version not in [row[schema.MODEL_VERSION] for row in rows]:
        raise StateError(
            f"there is no model version {version}: there are {sorted(row[schema.MODEL_VERSION] for row in rows)}"
        )
    if version != live:
        _flip(tables.delta(schema.MODELS), version)
    return {"live": version, "was": live}


def rollback(tables: Tables) -> dict[str, int | None]:
    """Make the version live again that was live before this one.

    Raises:
        StateError: no other version has been live.
    """
    retired = (
        versions(tables).where(F.col(schema.STATUS) == schema.RETIRED).where(F.col(schema.PROMOTED_AT).isNotNull())
    )
    before = retired.orderBy(F.col(schema.PROMOTED_AT).desc()).first()
    if before is None:
        raise StateError("no other version has been live: there is nothing to roll back to")
    return promote(tables, before[schema.MODEL_VERSION])


def _flip(models: DeltaTable, version: int) -> None:
    status, is_new = F.col(schema.STATUS), F.col(schema.MODEL_VERSION) == version
    models.update(
        is_new | (status == schema.LIVE),
        {
            schema.STATUS: F.when(is_new, schema.LIVE).otherwise(schema.RETIRED),
            schema.PROMOTED_AT: F.when(is_new, F.current_timestamp()).otherwise(F.col(schema.PROMOTED_AT)),
        },
    )
