"""The Delta tables as the server reads them: whole snapshots, or the files that each commit added; no Spark.

Commits of MERGE and append, and those that write all users anew, put every row that they change into files that they add,
so the files of the commits since the last look are all that need be read; what is newer wins. A commit that only rewrites
(OPTIMIZE) adds no row. Any other kind that touches data is told as a ``reload``; so are commits of an erasure, which take
rows away by MERGE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from mtl.schema import ERASURE, MODEL_VERSION, REPLACED

# Their added files hold every row that they insert or change.
_ADDING = {"MERGE", "WRITE", "STREAMING UPDATE", "UPDATE", "CREATE TABLE"}
_WITHOUT_ROWS = {
    "OPTIMIZE",
    "VACUUM START",
    "VACUUM END",
    "SET TBLPROPERTIES",
    "ADD COLUMNS",
    "UPGRADE PROTOCOL",
    "REORG",
}
_WITHOUT_ROWS |= {"COMPUTE STATS", "CHANGE COLUMN", "DOMAIN METADATA CLEANUP"}

# What reading a table can raise, when it, its store or its log is not there.
UNREADABLE = (DeltaError, OSError, pa.ArrowException)


class Rewritten(Exception):
    """The files that commits added do not tell all that changed: read the whole table."""


class Expired(Rewritten):
    """A commit that was asked for, or a file that it added, is no longer there."""


@dataclass(frozen=True)
class AddedFile:
    """One file that a commit added."""

    path: str
    index: int  # its place among those of the commit, as Spark's streams count them
    model_version: int | None


@dataclass(frozen=True)
class Commit:
    """What one commit did to the rows of a table."""

    version: int
    files: tuple[AddedFile, ...]
    reload: bool  # rows went, or changed in a way that the files do not tell


class Source:
    """The tables under one root.

    Args:
        root: a folder or object-store URI.
    """

    def __init__(self, root: str):
        self.root = root if "://" in root else os.path.abspath(root)
        self._tables: dict[str, DeltaTable] = {}

    def version(self, table: str) -> int | None:
        """The latest commit of the table; None where there is no table yet."""
        known = self._tables.get(table)
        try:
            if known is None:
                known = self._tables[table] = DeltaTable(f"{self.root}/{table}")
            else:
                known.update_incremental()
        except TableNotFoundError:
            self._tables.pop(table, None)
            return None
        except UNREADABLE:
            self._tables.pop(table, None)
            raise
        return known.version()

    def identity(self, table: str) -> str:
        """Of a table that there is, looked up: one that is made anew at its place has another."""
        return str(DeltaTable(f"{self.root}/{table}").metadata().id)

    def commits(self, table: str, after: int, through: int) -> Iterator[Commit]:
        """The commits ``after`` < version ≤ ``through``, in order.

        Raises:
            Expired: the log was cleaned behind ``after``.
        """
        for version in range(after + 1, through + 1):
            try:
                text = self._files(table).open_input_file(f"_delta_log/{version:020d}.json").readall()
            except FileNotFoundError as error:
                raise Expired(f"{table}: commit {version}") from error
            yield _commit(version, [json.loads(line) for line in text.splitlines()])

    def added(self, table: str, after: int, through: int, model_version: int | None) -> Iterator[AddedFile]:
        """The files of a model version that the commits ``after`` < version ≤ ``through`` added, in order.

        Raises:
            Rewritten: they do not tell all that changed.
        """
        if through < after:
            raise Rewritten
        for commit in self.commits(table, after, through):
            if commit.reload:
                raise Rewritten
            yield from (file for file in commit.files if file.model_version == model_version)

    def rows(self, table: str, file: AddedFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a file as the commit wrote them; columns that it lacks are left out.

        Raises:
            Expired: the file was vacuumed; the log outlives what OPTIMIZE replaced.
        """
        try:
            with self._files(table).open_input_file(unquote(file.path)) as opened:
                found = pa.parquet.ParquetFile(opened)
                there = None if columns is None else [name for name in columns if name in found.schema_arrow.names]
                return found.read(columns=there)
        except FileNotFoundError as error:
            raise Expired(f"{table}: {file.path}") from error

    def query(self, table: str, sql: str, version: int | None = None) -> Iterator[pa.RecordBatch]:
        """Record batches of a query over the table, called t in it, as of a commit."""
        opened = DeltaTable(f"{self.root}/{table}", version=version)
        for batch in QueryBuilder().register("t", opened).execute(sql):
            yield _without_views(pa.record_batch(batch))

    def transaction(self, table: str, application: str, version: int) -> int | None:
        """The last transaction of an application that the table holds as of a commit."""
        return DeltaTable(f"{self.root}/{table}", version=version).transaction_version(application)

    def _files(self, table: str) -> pyarrow.fs.PyFileSystem:
        if table not in self._tables:
            self.version(table)
        return pyarrow.fs.PyFileSystem(DeltaStorageHandler.from_table(self._tables[table]._table))


def _without_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with plain text and bytes, on which all of pyarrow's functions work."""
    kinds = [_plain(kind) for kind in batch.schema.types]
    return batch.cast(pa.schema(zip(batch.schema.names, kinds, strict=True)))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _commit(version: int, actions: list[dict[str, Any]]) -> Commit:
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    metadata = info.get("userMetadata") or ""
    if metadata.startswith(ERASURE):
        return Commit(version, (), reload=True)
    adds = [action["add"] for action in actions if "add" in action]
    removed = {action["remove"]["path"] for action in actions if "remove" in action}
    operation = info.get("operation")
    changing = [add for add in adds if add.get("dataChange", True)]
    # A file that comes back with another deletion vector brings no row.
    files = tuple(
        AddedFile(add["path"], index, _model_version(add))
        for index, add in enumerate(changing)
        if add["path"] not in removed
    )
    touches = bool(changing) or any(a["remove"].get("dataChange", True) for a in actions if "remove" in a)
    known = operation in _ADDING and (metadata == REPLACED or not _overwrites(info))
    return Commit(version, files, reload=touches and not known and operation not in _WITHOUT_ROWS)


def _overwrites(info: dict[str, Any]) -> bool:
    return (info.get("operationParameters") or {}).get("mode") == "Overwrite"


def _model_version(add: dict[str, Any]) -> int | None:
    value = (add.get("partitionValues") or {}).get(MODEL_VERSION)
    return None if value is None else int(value)
