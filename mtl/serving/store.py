"""The server's own copy of what it needs of the tables: one LMDB environment, and a file of the inputs' features beside it.

Written by the refresher alone, durably; read by every worker. A reader's transaction sees one state. Keys of users and
inputs begin with the model version, so that another version is loaded beside the live one and shown by one small write
(:meth:`Store.write_live`). Rows of features are appended to a version's file, whose number of rows that count is in the
environment; those of inputs that were learnt anew are overwritten where they are.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import lmdb
import msgspec
import numpy as np

from mtl.errors import StateError
from mtl.gaussian import Array
from mtl.serving.records import cycle_of, digest, prefix

_LIVE, _SEEN_VERSIONS, _POPULAR, _MODEL_LIST = b"live", b"versions", b"popular", b"model_list"
_IDENTITY = b"identity"
_TABLES = (b"meta", b"models", b"users", b"index", b"ids", b"attributes", b"counts", b"seen", b"confirmed")
_AT_ONCE = 10_000  # records a transaction


class Live(msgspec.Struct, frozen=True):
    """Which model version is shown, and where its features are."""

    model_version: int
    d: int
    generation: int  # of the features' files: which keys lead to their rows
    features: str  # file names in the store's folder
    top: str
    n_inputs: int
    capacity: int  # columns of ``top``
    switched_at: float  # seconds since 1970


class Popular(msgspec.Struct, frozen=True):
    input: str
    n_events: int
    mean_label: float


class Acts(NamedTuple):
    """Who acted on what, in some rows of the events table."""

    seen: list[tuple[bytes, bytes]]  # digests of user and input; in the order of users each page is met once
    counts: list[tuple[str, int, float]]  # of each input: its id, its events, and the sum of their labels


class Store:
    """The environment of one folder.

    Args:
        folder: made where it is missing.
        size_gb: of the address space that is reserved; the file grows as it fills.
        readonly: for workers.
    """

    def __init__(self, folder: str | Path, size_gb: float, readonly: bool = False):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.environment = lmdb.open(
                str(self.folder / "tables.lmdb"),
                map_size=int(size_gb * 2**30),
                max_dbs=len(_TABLES),
                max_readers=512,
                subdir=False,
                readonly=readonly,
                lock=True,
                readahead=False,
            )
            self.environment.reader_check()  # a process that was killed while it read holds pages
            self._db = {
                name: self.environment.open_db(
                    name, create=not readonly, dupsort=name == b"seen", dupfixed=name == b"seen"
                )
                for name in _TABLES
            }
        except lmdb.Error as error:
            raise StateError(
                f"{self.folder}/tables.lmdb cannot be used: {error}. Where it is damaged delete it, it is made from the "
                "tables; but leave the logs beside it. Where memory is short set a smaller serve.store_gb"
            ) from error

    def close(self) -> None:
        self.environment.close()

    def reading(self) -> lmdb.Transaction:
        """A context in which everything read is of one moment."""
        return self.environment.begin(buffers=True)

    # What a request reads, all within one transaction.

    def live(self, transaction: lmdb.Transaction) -> Live | None:
        value = transaction.get(_LIVE, db=self._db[b"meta"])
        return None if value is None else msgspec.msgpack.decode(value, type=Live)

    def user(self, transaction: lmdb.Transaction, version: bytes, user: bytes) -> Any:
        """A user's record by the prefix of a version and the digest; None where there is none."""
        return transaction.get(version + user, db=self._db[b"users"])

    def input_row(self, transaction: lmdb.Transaction, generation: bytes, input_digest: bytes) -> int | None:
        """Where an input's features are; rows from ``n_inputs`` on do not count yet."""
        value = transaction.get(generation + input_digest, db=self._db[b"index"])
        return None if value is None else int.from_bytes(value, "big")

    def input_ids(self, transaction: lmdb.Transaction, generation: bytes, rows: Iterable[int]) -> list[str]:
        table = self._db[b"ids"]
        keys = (generation + int(row).to_bytes(4, "big") for row in rows)
        return [str(cast(bytes, transaction.get(key, db=table)), "utf-8") for key in keys]

    def attributes(self, transaction: lmdb.Transaction, input_id: str) -> dict[str, Any] | None:
        value = transaction.get(digest(input_id), db=self._db[b"attributes"])
        return None if value is None else msgspec.msgpack.decode(value)

    def seen(self, transaction: lmdb.Transaction, user: bytes) -> list[bytes]:
        """Digests of the inputs of which the events table has an event of the user."""
        cursor = transaction.cursor(db=self._db[b"seen"])
        return [bytes(value) for value in cursor.iternext_dup()] if cursor.set_key(user) else []

    def count(self, transaction: lmdb.Transaction, input_id: str) -> tuple[int, float]:
        """Number of events of an input, and the sum of their labels."""
        value = transaction.get(digest(input_id), db=self._db[b"counts"])
        return (0, 0.0) if value is None else tuple(msgspec.msgpack.decode(value)[1:])

    def model_list(self, transaction: lmdb.Transaction) -> list[dict[str, Any]]:
        """What is told of every model version."""
        value = transaction.get(_MODEL_LIST, db=self._db[b"meta"])
        return [] if value is None else msgspec.msgpack.decode(value)

    def popular(self, transaction: lmdb.Transaction) -> list[Popular]:
        value = transaction.get(_POPULAR, db=self._db[b"meta"])
        return [] if value is None else msgspec.msgpack.decode(value, type=list[Popular])

    def model_row(self, transaction: lmdb.Transaction, version: int) -> dict[str, Any] | None:
        value = transaction.get(prefix(version), db=self._db[b"models"])
        return None if value is None else msgspec.msgpack.decode(value)

    def versions(self, transaction: lmdb.Transaction) -> dict[str, int]:
        """Commit of each table up to which it was read."""
        value = transaction.get(_SEEN_VERSIONS, db=self._db[b"meta"])
        return {} if value is None else msgspec.msgpack.decode(value)

    def identity(self) -> str | None:
        """Of the tables that are copied: others at the same place have another."""
        with self.reading() as transaction:
            value = transaction.get(_IDENTITY, db=self._db[b"meta"])
            return None if value is None else str(value, "utf-8")

    def is_confirmed(self, event_id: str) -> bool:
        """Whether an observation is known to be in its user's row."""
        with self.reading() as transaction:
            return transaction.get(digest(event_id), db=self._db[b"confirmed"]) is not None

    # What the refresher writes.

    def write_model(self, version: int, row: dict[str, Any]) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(prefix(version), msgspec.msgpack.encode(row), db=self._db[b"models"])

    def new_generation(self) -> int:
        """A number that no files of features had before."""
        with self.environment.begin(write=True) as transaction:
            versions = self.versions(transaction)
            versions["generation"] = versions.get("generation", 0) + 1
            transaction.put(_SEEN_VERSIONS, msgspec.msgpack.encode(versions), db=self._db[b"meta"])
        return versions["generation"]

    def write_users(self, version: int, users: Iterable[tuple[bytes, bytes]]) -> None:
        """(digest, record) of users, some thousands a transaction, each user whole."""
        for part in _parts(users):
            part.sort(key=itemgetter(0))  # each page is met once
            with self.environment.begin(write=True) as transaction:
                transaction.cursor(db=self._db[b"users"]).putmulti((prefix(version) + user, it) for user, it in part)

    def write_input_ids(self, generation: int, first: int, ids: Iterable[str]) -> None:
        """Ids of the rows from ``first`` on."""
        for part in _parts(enumerate(ids, first)):
            with self.environment.begin(write=True) as transaction:
                for row, identity in part:
                    number = row.to_bytes(4, "big")
                    transaction.put(prefix(generation) + digest(identity), number, db=self._db[b"index"])
                    transaction.put(prefix(generation) + number, identity.encode(), db=self._db[b"ids"])

    def write_attributes(self, inputs: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for part in _parts(inputs):
            with self.environment.begin(write=True) as transaction:
                for identity, values in part:
                    transaction.put(digest(identity), msgspec.msgpack.encode(values), db=self._db[b"attributes"])

    def write_events(self, version: int, parts: Iterable[Acts], anew: bool = False) -> None:
        """What commit ``version`` of the events table adds, in any number of parts; or, ``anew``, all that it holds.

        One transaction: a reader sees all of it or nothing, and so does who begins again after a crash.
        """
        seen, counts, meta = self._db[b"seen"], self._db[b"counts"], self._db[b"meta"]
        with self.environment.begin(write=True) as transaction:
            if anew:
                transaction.drop(seen, delete=False)
                transaction.drop(counts, delete=False)
            for part in parts:
                transaction.cursor(db=seen).putmulti(part.seen)
                for identity, n, total in part.counts:
                    key = digest(identity)
                    known = transaction.get(key, db=counts)
                    if known is not None:
                        _, before, sum_before = msgspec.msgpack.decode(known)
                        n, total = n + before, total + sum_before
                    transaction.put(key, msgspec.msgpack.encode((identity, n, total)), db=counts)
            together = {**self.versions(transaction), "events": version}
            transaction.put(_SEEN_VERSIONS, msgspec.msgpack.encode(together), db=meta)

    def write_popular(self, most: int) -> None:
        """The inputs of most events, from the counts."""
        with self.environment.begin(write=True) as transaction:
            cursor = transaction.cursor(db=self._db[b"counts"])
            rows = [msgspec.msgpack.decode(value) for _, value in cursor]
            rows.sort(key=lambda row: (-row[1], row[0]))
            popular = [Popular(identity, n, total / n) for identity, n, total in rows[:most]]
            transaction.put(_POPULAR, msgspec.msgpack.encode(popular), db=self._db[b"meta"])

    def confirm(self, event_ids: Iterable[str], now: float) -> None:
        """Remember observations that are in their users' rows: an overlay made anew from the log leaves them out."""
        stamp = int(now).to_bytes(8, "big")
        with self.environment.begin(write=True) as transaction:
            for identity in event_ids:
                transaction.put(digest(identity), stamp, db=self._db[b"confirmed"])

    def forget_confirmed(self, before: float) -> None:
        """Observations confirmed before a time (seconds since 1970), of which the log has no line any more."""
        with self.environment.begin(write=True) as transaction:
            cursor = transaction.cursor(db=self._db[b"confirmed"])
            there = cursor.first()
            while there:
                is_old = int.from_bytes(cursor.value(), "big") < before
                there = delete(cursor) if is_old else cursor.next()

    def write_model_list(self, models: list[dict[str, Any]]) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(_MODEL_LIST, msgspec.msgpack.encode(models), db=self._db[b"meta"])

    def write_identity(self, identity: str) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(_IDENTITY, identity.encode(), db=self._db[b"meta"])

    def write_versions(self, **versions: int) -> None:
        with self.environment.begin(write=True) as transaction:
            together = {**self.versions(transaction), **versions}
            transaction.put(_SEEN_VERSIONS, msgspec.msgpack.encode(together), db=self._db[b"meta"])

    def write_live(self, live: Live, **versions: int) -> None:
        """The switch: one transaction, after everything that it shows."""
        with self.environment.begin(write=True) as transaction:
            together = {**self.versions(transaction), **versions}
            transaction.put(_SEEN_VERSIONS, msgspec.msgpack.encode(together), db=self._db[b"meta"])
            transaction.put(_LIVE, msgspec.msgpack.encode(live), db=self._db[b"meta"])

    def delete_users_before(self, version: int, cycle: int) -> int:
        """Users of a version that a whole reading in ``cycle`` did not meet: they are gone from the table."""
        deleted = 0
        with self.environment.begin(write=True) as transaction:
            cursor = transaction.cursor(db=self._db[b"users"])
            there = cursor.set_range(prefix(version))
            while there and cursor.key().startswith(prefix(version)):
                if cycle_of(cursor.value()) != cycle:
                    there = delete(cursor)
                    deleted += 1
                else:
                    there = cursor.next()
        return deleted

    def delete_other_versions(self, live: Live) -> None:
        """Users, inputs and files of versions that are not shown, some thousands of records a transaction."""
        for name, shown in (
            (b"users", live.model_version),
            (b"models", live.model_version),
            (b"index", live.generation),
            (b"ids", live.generation),
        ):
            while self._delete_some(self._db[name], shown):
                pass
        for file in self.folder.glob("features-*"):
            if file.name not in (live.features, live.top):
                file.unlink(missing_ok=True)

    def _delete_some(self, table: Any, shown: int) -> bool:
        with self.environment.begin(write=True) as transaction:
            cursor = transaction.cursor(db=table)
            there, deleted = cursor.first(), 0
            while there and deleted < _AT_ONCE:
                if cursor.key()[:4] == prefix(shown):
                    there = cursor.set_range(prefix(shown + 1))
                    continue
                there = delete(cursor)
                deleted += 1
        return deleted == _AT_ONCE


def delete(cursor: lmdb.Cursor) -> bool:
    """Delete the record at the cursor; whether there is another behind it, where the cursor is then."""
    cursor.delete()
    return bool(cursor.key())


def new_feature_files(version: int) -> tuple[str, str]:
    """Names of a version's files of features and of the columns that top-k runs over."""
    token = uuid.uuid4().hex[:8]
    return f"features-{version}-{token}.rows", f"features-{version}-{token}.top"


def write_features(folder: Path, live: Live, first: int, rows: Array, top: Array) -> None:
    """Put rows of features from row ``first`` on, on disk before it returns.

    Args:
        rows: (n, width) float64.
        top: (d, n) float32, see :mod:`mtl.serving.scorer`; row i begins at i·capacity.
    """
    with _opened(folder / live.features) as file:
        file.seek(first * rows.shape[1] * 8)
        file.write(np.ascontiguousarray(rows, np.float64).tobytes())
        file.flush()
        os.fsync(file.fileno())
    with _opened(folder / live.top) as file:
        file.truncate(len(top) * live.capacity * 4)
        for i, values in enumerate(np.ascontiguousarray(top, np.float32)):
            file.seek((i * live.capacity + first) * 4)
            file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def rewrite_features(folder: Path, live: Live, places: Array, rows: Array, top: Array) -> None:
    """Put other features in the rows at ``places``, (n,); the rest as for :func:`write_features`."""
    at_rows = np.memmap(folder / live.features, np.float64, "r+", shape=(live.n_inputs, rows.shape[1]))
    at_top = np.memmap(folder / live.top, np.float32, "r+", shape=(live.d, live.capacity))
    at_rows[places], at_top[:, places] = rows, top
    at_rows.flush()
    at_top.flush()


def read_features(folder: Path, live: Live, width: int) -> tuple[Array, Array]:
    """The rows (n, width) and the columns (d, n) of what is shown, mapped, not read."""
    if not live.n_inputs:
        return np.empty((0, width)), np.empty((live.d, 0), np.float32)
    rows = np.memmap(folder / live.features, np.float64, "r", shape=(live.n_inputs, width))
    top = np.memmap(folder / live.top, np.float32, "r", shape=(live.d, live.capacity))
    return np.asarray(rows), np.asarray(top)[:, : live.n_inputs]


def _opened(path: Path) -> Any:
    return open(path, "r+b" if path.exists() else "w+b")


def _parts(records: Iterable[Any]) -> Iterator[list[Any]]:
    part = []
    for record in records:
        part.append(record)
        if len(part) == _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
