"""Delta tables under one root: opened by name, created on first use, written exactly once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
from delta.tables import DeltaTable
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, DataFrameWriter, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from mtl import schema
from mtl.config import is_catalog
from mtl.errors import ConfigError, StateError
from mtl.layout import PARTITIONED_BY, PROPERTIES, SCHEMAS
from mtl.read import is_remote
from mtl.schema import MODEL_VERSION

# Operations of commits that leave a table's rows as they were.
REARRANGING = ("OPTIMIZE", "REORG", "SET TBLPROPERTIES", "VACUUM START", "VACUUM END")

_TXN_APP = "spark.databricks.delta.write.txnAppId"
_TXN_VERSION = "spark.databricks.delta.write.txnVersion"
_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
_APPEND_ONLY = "delta.appendOnly"
# In what Spark and Delta say of a version whose files or log entries are no longer there.
_GONE = ("FILE_NOT_EXIST", "FileNotFound", "VersionNotFound", "DELTA_VERSION", "DELTA_LOG_FILE_NOT_FOUND")


@contextmanager
def as_long_as_kept(otherwise: str) -> Iterator[None]:
    """For a read of what a table held once.

    Raises:
        StateError: with the message ``otherwise``; what it was read from has been vacuumed, or its log cleaned.
    """
    try:
        yield
    except (PySparkException, Py4JError) as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        raise StateError(otherwise) from error


class Tables:
    """The project's Delta tables under one root.

    Args:
        spark: the session to read and write with.
        root: a folder (or object-store URI), or ``catalog.schema``. A folder whose name looks like
            ``catalog.schema`` is written ``./name.name``.
    """

    def __init__(self, spark: SparkSession, root: str):
        if not root.strip():
            raise ConfigError("tables.root is empty: give a folder or catalog.schema")
        self.spark = spark
        self.in_catalog = is_catalog(root)
        self._created: set[str] = set()
        self.root = root if self.in_catalog or "://" in root else os.path.abspath(root)

    @property
    def checkpoints(self) -> str | None:
        """The folder of checkpoints and locks beside the tables; None where they are in a catalog or an object store."""
        return None if self.in_catalog or is_remote(self.root) else f"{self.root}/_checkpoints"

    def apart(self) -> Tables:
        """The same tables in a session of their own: transaction ids set in it reach no other thread's writes."""
        session = self.spark.newSession()
        for key, value in self.spark.conf.getAll.items():
            if session.conf.isModifiable(key):
                session.conf.set(key, value)
        return Tables(session, self.root)

    def name(self, table: str) -> str:
        """The one opaque name by which SQL, reader and writer address ``table``."""
        return f"{self.root}.{table}" if self.in_catalog else f"delta.`{self.root}/{table}`"

    def exists(self, table: str) -> bool:
        if self.in_catalog:
            return self.spark.catalog.tableExists(self.name(table))
        return DeltaTable.isDeltaTable(self.spark, f"{self.root}/{table}")

    def create(self, *tables: str) -> None:
        """Create those of ``tables`` that do not exist yet."""
        for table in tables:
            if table in self._created or self.exists(table):
                self._created.add(table)
                continue
            builder = DeltaTable.createIfNotExists(self.spark).addColumns(SCHEMAS[table])
            builder = (
                builder.tableName(self.name(table)) if self.in_catalog else builder.location(f"{self.root}/{table}")
            )
            for key, value in PROPERTIES[table].items():
                builder = builder.property(key, value)
            if table in PARTITIONED_BY:
                builder = builder.partitionedBy(*PARTITIONED_BY[table])
            builder.execute()
            self._created.add(table)

    def read(self, table: str, version: int | None = None) -> DataFrame:
        """The table, now or as of a commit ``version``; creates an empty one where there is none."""
        self.create(table)
        if version is None:
            return self.spark.read.table(self.name(table))
        return self.spark.read.option("versionAsOf", version).table(self.name(table))

    def of_version(self, table: str, model_version: int, version: int | None = None) -> DataFrame:
        """The rows of a model version, now or as of a commit."""
        return self.read(table, version).where(F.col(MODEL_VERSION) == model_version)

    def changes(self, table: str, since: int) -> DataFrame:
        """The rows that the commits from ``since`` on wrote, of a table with a change data feed, in its columns and its feed's."""
        reader = self.spark.read.option("readChangeFeed", "true").option("startingVersion", since)
        return reader.table(self.name(table))

    def stream(self, table: str, **options: str | int) -> DataFrame:
        """A streaming DataFrame over the table's commits, with Delta's reader ``options``."""
        reader = self.spark.readStream.format("delta").options(**options)
        return reader.table(self.name(table)) if self.in_catalog else reader.load(f"{self.root}/{table}")

    def delta(self, table: str) -> DeltaTable:
        self.create(table)
        return DeltaTable.forName(self.spark, self.name(table))

    def version(self, table: str) -> int:
        """The latest commit version of the table."""
        return self.delta(table).history(1).collect()[0]["version"]

    def version_at(self, table: str, time: datetime) -> int | None:
        """The commit that was the latest at a moment (in UTC); None where there was none, or none is kept."""
        if not self.exists(table):
            return None
        commits = self.delta(table).history().where(F.col("timestamp") <= F.lit(time))
        return commits.agg(F.max("version")).collect()[0][0]

    def location(self, table: str) -> str:
        """The folder or URI of the table's files."""
        return self.delta(table).detail().collect()[0]["location"]

    def append(self, table: str, rows: DataFrame, evolve: bool = False, once: tuple[str, int] | None = None) -> None:
        """Append ``rows``, at most once for (table, application, version) where ``once`` = (application, version) is given.

        The pair goes with the write itself, for a DataFrame of a stream's batch has a session of its own.
        """
        self._save(table, rows.write.mode("append").option("mergeSchema", str(evolve).lower()), once)

    def append_rows(self, table: str, rows: Sequence[Mapping[str, Any]], once: tuple[str, int] | None = None) -> None:
        """:meth:`append` of a few rows by column, what is left out null, with the time in ``created_at``."""
        arrow = to_arrow_schema(SCHEMAS[table], timezone="UTC")
        timed = [{schema.CREATED_AT: datetime.now(timezone.utc), **row} for row in rows]
        # Of an Arrow table Spark makes rows without a task in Python.
        self.append(table, self.spark.createDataFrame(pa.Table.from_pylist(timed, arrow)), once=once)

    def replace(self, table: str, rows: DataFrame, where: str, once: tuple[str, int]) -> None:
        """Have ``rows`` in the place of those ``where``, at most once for (table, application, version)."""
        marked = {"replaceWhere": where, "userMetadata": schema.REPLACED}
        self._save(table, rows.write.mode("overwrite").options(**marked), once)

    def _save(self, table: str, writer: DataFrameWriter, once: tuple[str, int] | None) -> None:
        self.create(table)
        writer = writer.format("delta")
        if once:
            writer = writer.option("txnAppId", once[0]).option("txnVersion", once[1])
        writer.saveAsTable(self.name(table)) if self.in_catalog else writer.save(f"{self.root}/{table}")

    @contextmanager
    def once(self, application: str, version: int) -> Iterator[None]:
        """Every MERGE, update or delete inside happens at most once for (table, application, version); they take no option.

        Delta compares the pair in the same commit as the data, so a write repeated after a crash changes
        nothing. The session settings are removed on leaving: left set, they would silently drop the next
        unrelated write.
        """
        self.spark.conf.set(_TXN_APP, application)
        self.spark.conf.set(_TXN_VERSION, version)
        try:
            yield
        finally:
            self.spark.conf.unset(_TXN_APP)
            self.spark.conf.unset(_TXN_VERSION)

    def erase(self, table: str, keys: DataFrame, key: str, application: str, metadata: str) -> None:
        """Remove the rows whose ``key`` is among ``keys``, at most once for (table, application), append-only or not.

        Args:
            metadata: goes with the commit, see :meth:`commits_with`.
        """
        append_only = PROPERTIES[table].get(_APPEND_ONLY) == "true"
        if append_only:
            self._set_append_only(table, False)
        try:
            with self.marked(metadata), self.once(application, 0):
                same = f"stored.`{key}` = erased.`{key}`"
                merge = self.delta(table).alias("stored").merge(keys.alias("erased"), same)
                merge.whenMatchedDelete().execute()
        finally:
            if append_only:
                self._set_append_only(table, True)

    @contextmanager
    def marked(self, metadata: str) -> Iterator[None]:
        """Commits inside bear ``metadata``."""
        self.spark.conf.set(_METADATA, metadata)
        try:
            yield
        finally:
            self.spark.conf.unset(_METADATA)

    def commits_with(self, table: str, metadata: str) -> list[int]:
        """The versions of the table that were committed with ``metadata``."""
        history = self.delta(table).history().where(F.col("userMetadata") == metadata)
        return [row["version"] for row in history.select("version").collect()]

    def only_rearranged_since(self, table: str, commit: int) -> bool:
        """Whether later commits than this one left the table's rows as they were, in other files."""
        later = self.version(table) - commit
        return later > 0 and self.delta(table).history(later).where(~F.col("operation").isin(*REARRANGING)).isEmpty()

    def erased_since(self, table: str, commit: int) -> bool:
        """Whether a later commit than this one took rows away for an erasure."""
        later = self.version(table) - commit
        if later <= 0:
            return False
        history = self.delta(table).history(later)
        return not history.where(F.col("userMetadata").startswith(schema.ERASURE)).isEmpty()

    def purge(self, table: str) -> None:
        """Rewrite files with rows that are only marked as deleted, so that VACUUM can remove them."""
        self.spark.sql(f"REORG TABLE {self.name(table)} APPLY (PURGE)")

    def _set_append_only(self, table: str, value: bool) -> None:
        assignment = f"'{_APPEND_ONLY}' = '{str(value).lower()}'"
        self.spark.sql(f"ALTER TABLE {self.name(table)} SET TBLPROPERTIES ({assignment})")
