"""New rows of users into the users table, in one commit: merged, or where they are most of a version's, all of these anew.

A MERGE joins the new rows with those that are stored, once to find the files, once to write and once to mark what is
replaced, so it costs by the users that there are as well as by those that change. Where nearly all of them change, writing all
takes half as long; the two are even near 60% of them. It leaves no replaced rows behind for later reads to skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.errors import StateError
from mtl.schema import MODEL_VERSION, USER_ID
from mtl.tables import Tables
from mtl.users import WRITTEN

SHUFFLED_AT_MOST = 50_000  # rows that are better shuffled than told the ids of all users
BROADCAST_AT_MOST = 4_000_000  # users, whose ids are some 60 bytes each in memory

# Doubles that seem random: a dictionary of them makes files larger, compression 7% smaller, and either makes writing slower.
_FILES = {"parquet.enable.dictionary": "false", "spark.sql.parquet.compression.codec": "uncompressed"}
_MERGE = {
    # The rows to merge are computed and kept by us: Delta need not make a copy of its own. Nor one task write them all,
    # as it does to have one file a partition: files are compacted later (mtl.care).
    "spark.databricks.delta.merge.materializeSource": "none",
    "spark.databricks.delta.merge.repartitionBeforeWrite.enabled": "false",
}
_BROADCAST, _LARGEST_BROADCAST = "spark.sql.autoBroadcastJoinThreshold", "8g"


class UsersTable:
    """A model version's rows of the users table; one writer.

    Args:
        tables: with a session of the caller's own, which gets the settings for this.
        rewrite_above: part of the stored users above which all are written anew.
    """

    def __init__(self, tables: Tables, version: int, rewrite_above: float):
        self.tables = tables
        self.version = version
        self.rewrite_above = rewrite_above
        for key, value in {**_FILES, **_MERGE}.items():
            tables.spark.conf.set(key, value)
        self._n: int | None = None

    def rows(self) -> DataFrame:
        """Those that are stored."""
        return self.tables.of_version(schema.USERS, self.version)

    @property
    def n(self) -> int:
        """How many are stored."""
        if self._n is None:
            self._n = self.rows().count()
        return self._n

    def are_most(self, users: DataFrame, n_events: int) -> bool:
        """Whether the users of ``n_events`` events are so many, about, that all had better be written."""
        if self.rewrite_above >= 1:
            return False
        enough = self.rewrite_above * self.n
        return n_events > enough and users.agg(F.approx_count_distinct(USER_ID)).collect()[0][0] > enough

    def merge(self, rows: DataFrame, at_most: int, application: str, number: int) -> None:
        """Insert the rows or put them in the place of their users', once for (application, number).

        Args:
            at_most: how many rows there may be.
        """
        n = self.n
        same = f"stored.{MODEL_VERSION} = {self.version} AND stored.{USER_ID} = new.{USER_ID}"
        values = {name: F.col(f"new.{name}") for name in (MODEL_VERSION, *WRITTEN)}
        with self._joining(at_most), self.tables.once(application, number):
            merge = self.tables.delta(schema.USERS).alias("stored").merge(self._of_version(rows).alias("new"), same)
            done = merge.whenMatchedUpdate(set=values).whenNotMatchedInsert(values=values).execute().first()
        self._n = n + (done["num_inserted_rows"] if done else 0)

    def replace(self, rows: DataFrame, application: str, number: int) -> None:
        """Have these as all rows of the version, once for (application, number).

        Args:
            rows: new ones of some users and the others as they are stored; computed already, for they are counted first.

        Raises:
            StateError: there are fewer rows than are stored.
        """
        n = rows.count()
        if n < self.n:
            raise StateError(f"{n} users of model version {self.version} were to replace {self.n}: nothing was written")
        where = f"{MODEL_VERSION} = {self.version}"
        self.tables.replace(schema.USERS, self._of_version(rows), where, (application, number))
        self._n = n

    def _of_version(self, rows: DataFrame) -> DataFrame:
        return rows.select(F.lit(self.version).cast("long").alias(MODEL_VERSION), *WRITTEN)

    @contextmanager
    def _joining(self, at_most: int) -> Iterator[None]:
        """Let a MERGE of many rows send the stored users' ids to them, not these through a shuffle, where that fits in memory."""
        conf = self.tables.spark.conf
        before = conf.get(_BROADCAST)
        if at_most > SHUFFLED_AT_MOST and self.n <= BROADCAST_AT_MOST:
            conf.set(_BROADCAST, _LARGEST_BROADCAST)
        try:
            yield
        finally:
            conf.set(_BROADCAST, before)
