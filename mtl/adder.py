"""A batch's events added to its users' rows: by Spark, or in this process where they are few.

To find the rows of a few thousand users in the table, Spark reads nearly all of it, and to compute them it starts more tasks than
there is work. The update job is the only writer of its version's users: it can read them once, and know from then on what
the table holds, which is what it wrote itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.kept import KeptUsers
from mtl.model import Model
from mtl.partitions import give_back, settled
from mtl.schema import USER_ID
from mtl.tables import Tables
from mtl.upsert import BROADCAST_AT_MOST, UsersTable
from mtl.users import (
    MEASURED,
    MEASURED_OF,
    WRITTEN,
    Measure,
    SharedInputs,
    needed_of,
    prior_mean_rows,
    prior_means,
    updated_rows,
    updated_users,
)

FEW = 50_000  # events of a batch that is added here, at most


class Adder:
    """Computes the new rows of a model version's users, one batch at a time.

    Args:
        partitions: hash partitions of users, where Spark computes.
        measure: see :func:`mtl.users.updated_users`.
        keep_bytes: memory for users' rows in this process; where they need more, Spark computes all batches.
    """

    def __init__(
        self, tables: Tables, users: UsersTable, model: Model, partitions: int, measure: Measure, keep_bytes: int
    ):
        self.tables = tables
        self.users = users
        self.model = model
        self.partitions = partitions
        self.measure = measure
        self.keep_bytes = keep_bytes
        self._kept: KeptUsers | None = None
        self._were_few = False  # the events of the batch before

    @contextmanager
    def added(
        self, events: DataFrame, n: int, inputs: SharedInputs, of_all: bool, repeated: bool
    ) -> Iterator[tuple[pa.Table, DataFrame]]:
        """What is measured of ``n`` events, and the new rows of their users; to be written within.

        Args:
            inputs: with every input of the events.
            of_all: the rows of users without events come as well.
            repeated: an earlier run may have written the rows; these would not be what the table holds then.
        """
        few = n <= FEW and not repeated
        # None unless the write succeeds: after a failure nobody knows what the table holds.
        kept, self._kept = self._kept_for_few() if few else None, None
        if kept is not None:
            rows = self._computed_here(events, inputs, of_all, kept)
            users = rows.filter(rows[USER_ID].is_valid()).select(WRITTEN)
            yield rows.filter(rows[USER_ID].is_null()).select([MEASURED_OF, MEASURED]), self._frame(users)
            kept.put(users)
            self._kept = kept
        else:
            # Unlike a cached plan, MERGE takes what is settled.
            by_spark = settled(self._computed_by_spark(events, n, inputs, of_all))
            try:
                measured = by_spark.where(F.col(MEASURED).isNotNull()).select(MEASURED_OF, MEASURED).toArrow()
                yield measured, by_spark.where(F.col(USER_ID).isNotNull()).select(*WRITTEN)
            finally:
                give_back(by_spark)
        self._were_few = n <= FEW

    def forget(self) -> None:
        """Give the memory back; others may write to the table now."""
        self._kept = None

    def _kept_for_few(self) -> KeptUsers | None:
        """The users there are, where they fit; read when a second batch in a row can use them."""
        if not self._were_few or KeptUsers.bytes_of(self.users.n, self.model.d) > self.keep_bytes:
            return None
        if self._kept is None:
            return KeptUsers(self.users.rows().select(*WRITTEN).toArrow(), self.model.d)
        return self._kept

    def _computed_here(self, events: DataFrame, inputs: SharedInputs, of_all: bool, kept: KeptUsers) -> pa.Table:
        rows = needed_of(events, self.model).toArrow()
        users = rows[USER_ID].combine_chunks()
        tables = [rows, kept.rows(None if of_all else users), *self._described(kept.without(users))]
        together = pa.concat_tables(tables, promote_options="default")
        return pa.Table.from_batches(updated_rows(together, self.model, inputs, self.measure, of_all))

    def _described(self, users: pa.Array) -> list[pa.Table]:
        """Prior means of those of these users, who have no row yet, that have attributes."""
        attributes = self._attributes()
        if attributes is None or not len(users):
            return []
        ids = self._frame(pa.table({USER_ID: users}))
        return [prior_mean_rows(attributes.join(F.broadcast(ids), USER_ID, "left_semi").toArrow(), self.model)]

    def _computed_by_spark(self, events: DataFrame, n: int, inputs: SharedInputs, of_all: bool) -> DataFrame:
        users = events.select(USER_ID)
        if n <= BROADCAST_AT_MOST:
            users = F.broadcast(users)  # else every state is shuffled to find out which are asked for
        states = self.users.rows()
        if not of_all:
            states = states.join(users, USER_ID, "left_semi")
        attributes, described = self._attributes(), None
        if attributes is not None:
            described = prior_means(attributes.join(users, USER_ID, "left_semi"), self.model)
        return updated_users(events, states, described, self.model, inputs, self.partitions, self.measure, of_all)

    def _attributes(self) -> DataFrame | None:
        """Of the users that have any."""
        attributes = self.tables.read(schema.USER_ATTRIBUTES)
        return attributes if len(attributes.columns) > 1 else None

    def _frame(self, rows: pa.Table) -> DataFrame:
        return self.tables.spark.createDataFrame(rows)
