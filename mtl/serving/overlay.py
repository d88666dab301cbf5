"""Observations that the tables' users do not contain yet, shared by the workers of one server.

Between an observation's 200 and the row of the users table that contains it, the event lives here and is added to its
user at every read. It must count once at every moment of the hand-over, which takes two environments (this one and
:mod:`mtl.serving.store`) that cannot commit together. The rule:

1. The refresher finds that commit U of the users table contains event e. It marks e here as covered in its cycle c of
   the model version, and commits.
2. It writes the rows of U to the store, each with its cycle c, and commits.
3. It deletes e here.

A reader opens this environment first, then the store, and counts e unless it is marked for the reader's model version with
a cycle no later than that of the user's row: the row has it if and only if it does not count e, whichever of the commits
it saw, and whoever died in between. A later cycle marks anew what an earlier one left, but for what rows contain already.

Nothing here is synced to disk: what it holds is in the log (:mod:`mtl.serving.observations`), which is. After a restart of
the machine it is made from the log again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from mtl.errors import StateError
from mtl.serving.observations import Event
from mtl.serving.records import DIGEST_BYTES, cycle_of, digest

_SIZE = 8 << 30  # of address space
_AT_ONCE = 5_000  # ids a transaction
_TABLES = (b"meta", b"events", b"revisions", b"ids", b"asked")
_SEQUENCE, _BOOT, _STATUS = b"sequence", b"boot", b"status"


class Pending(msgspec.Struct, array_like=True):
    """An observation that the store's row of its user may not contain yet."""

    event: Event
    look_up: bool  # whether the events table may have had this id before
    landed: tuple[int, int] | None = None  # commit of the events table that added it, and the file's place in it
    covered: tuple[int, int] | None = None  # model version whose users have it, and the refresher's cycle


class Status(msgspec.Struct):
    """What the refresher says of itself."""

    checked_at: float = 0.0  # when store and tables last agreed, seconds since 1970


class Overlay:
    """The environment in one folder."""

    def __init__(self, folder: str | Path):
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.environment = lmdb.open(
                str(path / "overlay.lmdb"),
                map_size=_SIZE,
                max_dbs=len(_TABLES),
                max_readers=512,
                subdir=False,
                sync=False,
            )
            self.environment.reader_check()  # a process that was killed while it read holds pages
            self._meta, self._events, self._revisions, self._ids, self._asked = map(self.environment.open_db, _TABLES)
        except lmdb.Error as error:
            raise StateError(
                f"{path}/overlay.lmdb cannot be used: {error}. Where it is damaged delete it, it is made from the log"
            ) from error

    def close(self) -> None:
        self.environment.close()

    def reading(self) -> lmdb.Transaction:
        """A context in which everything read is of one moment."""
        return self.environment.begin(buffers=True)

    # What a request reads, within one transaction.

    def revision(self, transaction: lmdb.Transaction, user: bytes) -> bytes | None:
        """Changes whenever the user's observations do; None where there are none."""
        value = transaction.get(user, db=self._revisions)
        return None if value is None else bytes(value)

    def pending(self, transaction: lmdb.Transaction, user: bytes) -> list[Pending]:
        """The user's observations, in the order in which they came."""
        found, cursor = [], transaction.cursor(db=self._events)
        there = cursor.set_range(user)
        while there and cursor.key()[:DIGEST_BYTES] == user:
            found.append(msgspec.msgpack.decode(cursor.value(), type=Pending))
            there = cursor.next()
        return found

    def knows(self, event_id: str) -> bool:
        with self.reading() as transaction:
            return transaction.get(digest(event_id), db=self._ids) is not None

    def status(self) -> Status:
        with self.reading() as transaction:
            value = transaction.get(_STATUS, db=self._meta)
            return Status() if value is None else msgspec.msgpack.decode(value, type=Status)

    def asked(self) -> dict[bytes, Pending]:
        """Observations of which the events table may have had the id before; :meth:`write` answers."""
        with self.reading() as transaction:
            keys = [bytes(key) for key, _ in transaction.cursor(db=self._asked)]
            found = ((key, transaction.get(key, db=self._events)) for key in keys)
            return {key: msgspec.msgpack.decode(value, type=Pending) for key, value in found if value is not None}

    def n_asked(self) -> int:
        with self.reading() as transaction:
            return transaction.stat(db=self._asked)["entries"]

    def n_pending(self) -> int:
        with self.reading() as transaction:
            return transaction.stat(db=self._events)["entries"]

    # What writes.

    def insert(self, events: Sequence[tuple[Event, bool]]) -> list[bool]:
        """Add events, each with whether it is to be looked up; which of them were new by their ids."""
        new = []
        with self.environment.begin(write=True) as transaction:
            sequence = self._counter(transaction, _SEQUENCE)
            for event, look_up in events:
                identity = digest(event.event_id)
                is_new = transaction.put(identity, _number(int(time.time())), overwrite=False, db=self._ids)
                new.append(is_new)
                if is_new:
                    sequence += 1
                    user, pending = digest(event.user_id), Pending(event, look_up)
                    key = user + _number(sequence)
                    transaction.put(key, msgspec.msgpack.encode(pending), db=self._events)
                    transaction.put(user, _number(sequence), db=self._revisions)
                    if look_up:
                        transaction.put(key, b"", db=self._asked)
            transaction.put(_SEQUENCE, _number(sequence), db=self._meta)
        return new

    def every(self) -> dict[bytes, Pending]:
        """All observations that are here, by key."""
        with self.reading() as transaction:
            cursor = transaction.cursor(db=self._events)
            return {bytes(key): msgspec.msgpack.decode(value, type=Pending) for key, value in cursor}

    def write(self, changed: dict[bytes, Pending]) -> None:
        """What the refresher learnt of observations."""
        with self.environment.begin(write=True) as transaction:
            sequence = self._counter(transaction, _SEQUENCE) + 1  # what users are kept as may be otherwise now
            transaction.put(_SEQUENCE, _number(sequence), db=self._meta)
            for key, pending in changed.items():
                transaction.put(key[:DIGEST_BYTES], _number(sequence), db=self._revisions)
                transaction.put(key, msgspec.msgpack.encode(pending), db=self._events)
                if pending.look_up:
                    transaction.put(key, b"", db=self._asked)
                else:
                    transaction.delete(key, db=self._asked)

    def delete(self, keys: Iterable[bytes]) -> None:
        """Observations that count in their users' rows, or never will; their ids stay known."""
        with self.environment.begin(write=True) as transaction:
            sequence = self._counter(transaction, _SEQUENCE)
            for key in keys:
                sequence += 1
                user = key[:DIGEST_BYTES]
                transaction.delete(key, db=self._events)
                transaction.delete(key, db=self._asked)
                cursor = transaction.cursor(db=self._events)
                if cursor.set_range(user) and cursor.key()[:DIGEST_BYTES] == user:
                    transaction.put(user, _number(sequence), db=self._revisions)
                else:
                    transaction.delete(user, db=self._revisions)
            transaction.put(_SEQUENCE, _number(sequence), db=self._meta)

    def remember(self, event_ids: Iterable[str]) -> None:
        """Ids of observations that are not here, for they are in their users' rows."""
        with self.environment.begin(write=True) as transaction:
            for event_id in event_ids:
                transaction.put(digest(event_id), _number(int(time.time())), db=self._ids)

    def forget_ids(self, before: float) -> int:
        """Ids that came before a time (seconds since 1970) and wait for nothing; observations need not wait for it."""
        waiting = {digest(pending.event.event_id) for pending in self.every().values()}
        with self.reading() as transaction:
            came = ((bytes(key), int.from_bytes(value, "big")) for key, value in transaction.cursor(db=self._ids))
            old = [key for key, moment in came if moment < before and key not in waiting]
        for first in range(0, len(old), _AT_ONCE):
            with self.environment.begin(write=True) as transaction:
                for key in old[first : first + _AT_ONCE]:
                    transaction.delete(key, db=self._ids)
        return len(old)

    def tell(self, status: Status) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(_STATUS, msgspec.msgpack.encode(status), db=self._meta)

    def boot(self) -> str | None:
        """Of which start of the machine this environment is."""
        with self.reading() as transaction:
            value = transaction.get(_BOOT, db=self._meta)
            return None if value is None else str(value, "utf-8")

    def set_boot(self, boot: str) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(_BOOT, boot.encode(), db=self._meta)

    def _counter(self, transaction: lmdb.Transaction, key: bytes) -> int:
        value = transaction.get(key, db=self._meta)
        return 0 if value is None else int.from_bytes(value, "big")


def open_overlay(
    folder: str | Path,
    log_events: Iterable[Event],
    is_confirmed: Callable[[str], bool] = lambda event_id: False,
    anew: bool = False,
) -> Overlay:
    """The overlay of this start of the machine; one of an earlier start is made anew from the log's events.

    To be called by one process, before the workers are there.

    Args:
        is_confirmed: whether an event (id) is known to be in its user's row.
        anew: even so, for there may have been events that it was not told of.
    """
    path, boot = Path(folder) / "overlay.lmdb", boot_id()
    try:
        overlay = Overlay(folder)
        if overlay.boot() == boot and not anew:
            return overlay
        overlay.close()
    except (StateError, lmdb.Error):
        pass  # torn by the machine's end
    for name in (path, path.with_name("overlay.lmdb-lock")):
        name.unlink(missing_ok=True)
    overlay = Overlay(folder)
    events = iter(log_events)
    while part := list(itertools.islice(events, 1000)):
        confirmed = {event.event_id for event in part if is_confirmed(event.event_id)}
        overlay.remember(confirmed)
        overlay.insert([(event, True) for event in part if event.event_id not in confirmed])
    overlay.set_boot(boot)
    return overlay


def is_covered(pending: Pending, model_version: int, record: Any) -> bool:
    """Whether a user's record contains the observation: the rule above."""
    if pending.covered is None or pending.covered[0] != model_version:
        return False
    if record is None:
        return pending.covered[1] == 0
    return cycle_of(record) >= pending.covered[1]


def boot_id() -> str:
    """Changes when the machine starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(round((time.time() - time.monotonic()) / 600))


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")
