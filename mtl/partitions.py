"""Events tables shuffled by user once, into persisted partitions of event blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl import blocks
from mtl.arrow import lists, matrix
from mtl.blocks import EventBlock
from mtl.contexts import codes_of, columns_of, given_offsets
from mtl.effects import Effects, names_of
from mtl.encode import Encoder
from mtl.gaussian import Array
from mtl.sampling import ROLE
from mtl.schema import INPUT_ID, LABEL, OFFSET, USER_ID, WEIGHT
from mtl.sharing import is_remote, share

_ATTRIBUTES = "attributes"
_ATTRIBUTES_TYPE = T.ArrayType(T.DoubleType())


def partition_events(
    events: DataFrame,
    described: DataFrame | None,
    width: int,
    catalogue: pa.Array,
    partitions: int,
    effects: Effects = (),
) -> DataFrame:
    """Rows of :data:`mtl.blocks.ARROW_SCHEMA`, one a hash partition of users, persisted.

    Args:
        events: user_id, input_id, label, weight; roles, of :func:`mtl.sampling.with_roles`, where there are any; offset and
            context where any event has them.
        described: of :func:`encode_users`, or None where no user has attributes.
        width: p of the users' encoded attributes, constant included.
        catalogue: ids of all inputs; an event of another one is an error of the caller.
        partitions: number of hash partitions.
        effects: of the events' contexts.
    """
    optional = [name for name in (ROLE, OFFSET) if name in events.columns]
    rows = events.select(USER_ID, INPUT_ID, LABEL, WEIGHT, *optional, *columns_of(events, names_of(effects)))
    if described is not None:
        rows = rows.withColumn(_ATTRIBUTES, F.lit(None).cast(_ATTRIBUTES_TYPE)).unionByName(
            described, allowMissingColumns=True
        )
    build = _build_in_arrow(share(events.sparkSession, (catalogue, effects)), width)
    return rows.repartition(partitions, USER_ID).mapInArrow(build, blocks.DDL).persist(StorageLevel.MEMORY_AND_DISK)


def encode_users(users: DataFrame, encoder: Encoder) -> DataFrame:
    """(user_id, attributes): every row of the attribute table encoded, in Arrow batches on the workers."""
    encode = share(users.sparkSession, encoder)

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            z = encode.value(batch.drop_columns([USER_ID]).to_pandas())
            yield pa.record_batch([batch.column(USER_ID), lists(z)], [USER_ID, _ATTRIBUTES])

    return users.mapInArrow(partition, f"{USER_ID} string, {_ATTRIBUTES} array<double>")


def each_block(rows: DataFrame, work: Callable[[EventBlock], Any]) -> list[Any]:
    """What ``work`` gives for every block, computed where the block is; in no particular order."""

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for block in blocks.from_arrow(batches):
            yield pa.record_batch([pa.array([cloudpickle.dumps(work(block))], pa.binary())], ["result"])

    results = rows.drop("users").mapInArrow(partition, "result binary").toArrow()["result"]
    return [cloudpickle.loads(result.as_buffer()) for result in results]


def changed(rows: DataFrame, change: Callable[[EventBlock], EventBlock]) -> DataFrame:
    """The rows with every block changed, persisted; the ones before are given back once these are used."""

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for block in blocks.from_arrow(batches):
            yield blocks.to_arrow(change(block))

    return rows.mapInArrow(partition, blocks.DDL).persist(StorageLevel.MEMORY_AND_DISK)


def settled(rows: DataFrame) -> DataFrame:
    """The rows, computed once and without the plan that led to them; in ``spark.checkpoint.dir`` where that is set.

    Else they are on the executors alone, and with one of these they are lost: the job fails and has to be run again.
    """
    spark = rows.sparkSession
    durable = not is_remote(spark) and spark.sparkContext.getCheckpointDir() is not None
    return rows.checkpoint() if durable else rows.localCheckpoint()


def give_back(rows: DataFrame) -> None:
    """Free what :func:`settled` keeps of these rows, which are not used any more; else it is kept until Java finds that out."""
    if not is_remote(rows.sparkSession):
        rows._jdf.queryExecution().logical().rdd().unpersist(False)


def _build_in_arrow(shared: Any, width: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = [batch for batch in batches if batch.num_rows]
        if not rows:
            return
        catalogue, effects = shared.value
        table = pa.Table.from_batches(rows)
        events, described = table, table.slice(0, 0)
        attributes: Array = np.empty((0, width))
        if _ATTRIBUTES in table.column_names:
            is_event = table[_ATTRIBUTES].is_null()
            events, described = table.filter(is_event), table.filter(pc.invert(is_event))
            attributes = matrix(described[_ATTRIBUTES], width)
        block = blocks.build(
            events[USER_ID],
            blocks.index_of(events[INPUT_ID], catalogue),
            events[LABEL].to_numpy(),
            events[WEIGHT].to_numpy(),
            described[USER_ID],
            attributes,
            events[ROLE].to_numpy() if ROLE in events.column_names else None,
            given_offsets(events),
            codes_of(events, effects),
        )
        yield blocks.to_arrow(block)

    return partition
