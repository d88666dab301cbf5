"""The turns in which training, batches and releases gave events to users, as the ledger and the events' log have them.

With other losses than squared the working values of an event are about what was believed when it came
(:func:`mtl.working.settle`), so that users equal a replay and not one pass. Which events a batch had follows from the
offsets in the ledger: Delta's stream reads commit by commit, and the files of a commit in the order of its log.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.checkpoint import Place, end_of
from mtl.errors import StateError
from mtl.model import Model
from mtl.schema import BATCH, EVENT_ID
from mtl.tables import REARRANGING, Tables
from mtl.users import TRAINING, TURN

_NOT_YET = -1  # the turn of events that are not applied

_NAME, _LATE = "_mtl_file", "_mtl_late"


def in_turns(tables: Tables, model: Model, ledger: DataFrame, waiting: DataFrame, consumed: int) -> DataFrame:
    """Events that training or the stream has given to users, with their turn: 0 for training, then the ledger's order.

    Args:
        ledger: the rows of the version's batches and releases.
        waiting: the version's waiting events, released or not.
        consumed: the last commit of the events table that the stream has read from.

    Raises:
        StateError: the order can no longer be known, for commits or files have been cleaned up.
    """
    # Batches and releases are applied one at a time, in the order of their ledger rows.
    turns = list(enumerate(ledger.orderBy(schema.CREATED_AT).collect(), TRAINING + 1))
    batches = [(turn, end_of(row[schema.OFFSETS])) for turn, row in turns if row[schema.OFFSETS] is not None]
    releases = {row[schema.BATCH_ID]: turn for turn, row in turns if row[schema.OFFSETS] is None}
    location = tables.location(schema.EVENTS)
    files = files_added(tables, location, model.events_version + 1, consumed)
    read = batch_of([place for place, _ in files], [end for _, end in batches])
    turn_of = {path: _NOT_YET if i is None else batches[i][0] for (_, path), i in zip(files, read, strict=True)}
    by_name = _table(tables, _NAME, {_name(path): turn for path, turn in turn_of.items()}, pa.string())

    events, kept = snapshot(tables, consumed)
    alive = {_name(path) for path in events.inputFiles()}
    with_file = events.withColumn(_NAME, F.col("_metadata.file_name"))
    in_order = kept(with_file).join(by_name, _NAME, "left").drop(_NAME)
    # Compaction rewrites files, and the new ones tell nothing of the order.
    rewritten = [f"{location}/{path}" for path in turn_of if _name(path) not in alive]
    if rewritten:
        before = ids_of_files(tables, rewritten).join(by_name, _NAME)
        before = before.groupBy(EVENT_ID).agg(F.max(TURN).alias(_LATE))  # a corrected event came twice
        in_order = in_order.join(before, EVENT_ID, "left").withColumn(TURN, F.coalesce(TURN, _LATE)).drop(_LATE)
    released = waiting.select(EVENT_ID, schema.RELEASED).join(
        _table(tables, schema.RELEASED, releases, pa.int64()), schema.RELEASED, "left"
    )
    late = released.select(EVENT_ID, F.coalesce(TURN, F.lit(_NOT_YET)).alias(_LATE))
    turn = F.coalesce(_LATE, TURN, F.lit(TRAINING))
    in_order = in_order.join(late, EVENT_ID, "left").withColumn(TURN, turn).drop(_LATE)
    return in_order.where(F.col(TURN) != _NOT_YET)


def snapshot(tables: Tables, commit: int) -> tuple[DataFrame, Callable[[DataFrame], DataFrame]]:
    """Events of the commits through one of them; and what leaves those of a frame of them that were not erased since.

    Where later commits added no events the table is read as it is now, so that old versions may be vacuumed.
    """
    since = tables.version(schema.EVENTS) - commit
    history = tables.delta(schema.EVENTS).history(since) if since else tables.delta(schema.EVENTS).history(1).limit(0)
    later = [(row["operation"], row["userMetadata"] or "") for row in history.collect()]
    erasures = [operation for operation, metadata in later if metadata.startswith(schema.ERASURE)]
    if all(operation in REARRANGING for operation, metadata in later if not metadata.startswith(schema.ERASURE)):
        return tables.read(schema.EVENTS), lambda events: events
    if not erasures:
        return tables.read(schema.EVENTS, commit), lambda events: events
    # A corrected event has the same id, and another batch.
    now = tables.read(schema.EVENTS).select(F.col(EVENT_ID).alias("_mtl_id"), F.col(BATCH).alias("_mtl_batch"))
    same = (F.col(EVENT_ID) == F.col("_mtl_id")) & F.col(BATCH).eqNullSafe(F.col("_mtl_batch"))
    return tables.read(schema.EVENTS, commit), lambda events: events.join(now, same, "left_semi")


def batch_of(files: list[Place], ends: list[Place]) -> list[int | None]:
    """Which of the batches, whose last files are ``ends`` in their order, read each file; None: none has yet."""
    found = (bisect_left(ends, file) for file in files)
    return [i if i < len(ends) else None for i in found]


def files_added(tables: Tables, location: str, first: int, last: int) -> list[tuple[Place, str]]:
    """Place and path of the files that commits first … last of the events table added, in order."""
    logs = [f"{location}/_delta_log/{commit:020}.json" for commit in range(first, last + 1)]
    if not logs:
        return []
    try:
        text = tables.spark.read.text(logs, wholetext=True)
    except AnalysisException as error:
        raise StateError(
            f"commits {first} to {last} of the events are no longer all in the table's log, and with them the order in "
            f"which the stream read: train a new version with jobs/retrain.py"
        ) from error
    commit = F.split(F.col("_metadata.file_name"), r"\.")[0].cast("long").alias("commit")
    actions = text.select(commit, F.posexplode(F.split("value", "\n")).alias("line", "action"))
    path, added, removed = (
        F.get_json_object("action", f"$.{name}") for name in ("add.path", "add.dataChange", "remove.dataChange")
    )
    changes = actions.select("commit", "line", F.when(added == "true", path).alias("path"), removed.alias("removed"))
    rows = changes.where("path IS NOT NULL OR removed = 'true'").orderBy("commit", "line").collect()
    passed_over = {row["commit"] for row in rows if row["removed"]}  # the stream reads no commit that erases
    numbers: Counter[int] = Counter()
    files = []
    for row in rows:
        if row["commit"] not in passed_over:
            files.append(((row["commit"], numbers[row["commit"]]), row["path"]))
            numbers[row["commit"]] += 1
    return files


def ids_of_files(tables: Tables, paths: list[str]) -> DataFrame:
    """Event ids of files that are no longer of the table, with the file's name."""
    try:
        return tables.spark.read.parquet(*paths).select(EVENT_ID, F.col("_metadata.file_name").alias(_NAME))
    except AnalysisException as error:
        raise StateError(
            "files of events were compacted and then vacuumed, and with them went the order in which the stream read: "
            "train a new version with jobs/retrain.py"
        ) from error


def _table(tables: Tables, key: str, turns: Mapping[Any, int], kind: pa.DataType) -> DataFrame:
    columns = {key: pa.array(turns.keys(), kind), TURN: pa.array(turns.values(), pa.int64())}
    return F.broadcast(tables.spark.createDataFrame(pa.table(columns)))


def _name(path: str) -> str:
    return path.rpartition("/")[2]
