"""The durable log of observations: segments of JSON lines, which jobs/ingest.py reads as a source.

A worker appends to a segment of its own, whose name begins with a dot: ingest passes over it. When it is old or large
enough, and everything in it is in the overlay, it is *sealed* by a rename and never changes again. A segment whose worker
died (nobody holds its lock) is recovered by the next that starts: a torn last line was never acknowledged and is cut off, and
lines that are no JSON, which a machine that lost power may leave, are put into a file ``.damaged-…`` beside it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mtl.errors import StateError

log = logging.getLogger("mtl")

_OPEN, _SEALED, _ENDING = ".open-", "observed-", ".jsonl"


class Event(msgspec.Struct, frozen=True):
    """One line of the log, in the columns of the events table."""

    event_id: str
    user_id: str
    input_id: str
    label: float
    weight: float
    event_time: str  # ISO 8601, UTC
    offset: float | None = None
    context: dict[str, str] = {}  # columns of the line, beside the others


class Rewarded(msgspec.Struct, frozen=True):
    """What competing versions are told of a reward."""

    decision_id: str
    reward: float


class Feedback(Rewarded, frozen=True):
    """The reward of a decision, a line of the log of feedback."""

    user_id: str | None
    input_id: str | None
    event_time: str


class Decided(msgspec.Struct, frozen=True):
    """What competing versions are told of a decision."""

    decision_id: str
    model_version: int
    version_propensity: float  # the chance that this version had to decide; that of the input is given it
    versions: list[int]  # that might have had to


class Choice(Decided, frozen=True):
    """A decision, a line of the log of decisions."""

    user_id: str
    input_id: str  # of one given by attributes, their digest
    propensity: float
    policy: str
    greedy: float  # chance of it under the policy that takes the best mean
    uniform: float  # and under that which takes any
    candidates: int
    predicted_label: float
    event_time: str


_encode = msgspec.json.Encoder().encode
_columns = msgspec.json.Decoder(dict[str, Any]).decode


def _line(row: msgspec.Struct) -> bytes:
    if not isinstance(row, Event):
        return _encode(row)
    columns = msgspec.to_builtins(row)
    context = columns.pop("context")
    return _encode(columns | context)


def _decode(line: bytes) -> Event:
    columns = _columns(line)
    context = {name: columns.pop(name) for name in [*columns] if name not in Event.__struct_fields__}
    return msgspec.convert({**columns, "context": context}, Event)


@dataclass
class ObservationLog:
    """Segments in one folder; one writer an instance."""

    folder: Path
    _file: int | None = field(default=None, init=False)  # descriptor of the open segment
    _path: Path = field(init=False)
    _opened_at: float = field(default=0.0, init=False)
    size: int = field(default=0, init=False)  # bytes of the open segment that are on disk

    def append(self, rows: Sequence[msgspec.Struct]) -> None:
        """Write rows, a line each, and wait until they are on disk.

        Raises:
            OSError: they may not be; what was written of them is cut off where that can be done.
        """
        if self._file is None:
            self._file = self._open()
        lines = b"".join(_line(row) + b"\n" for row in rows)
        try:
            _write(self._file, lines)
            os.fsync(self._file)
        except OSError:
            self._abandon()
            raise
        self.size += len(lines)

    def age(self) -> float:
        """Seconds since the open segment was begun; 0 where there is none."""
        return time.monotonic() - self._opened_at if self._file is not None else 0.0

    def seal(self) -> None:
        """Hand the open segment over to ingest; all its events must be in the overlay.

        Raises:
            OSError: it cannot be now, and is still open; or it is, and a crash of the machine may undo that; or it was
                deleted, and the next row begins another.
        """
        if self._file is None:
            return
        try:
            if self.size:
                _rename(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except FileNotFoundError:
            self._close()
            raise
        self._close()
        _sync_folder(self.folder)

    def _open(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._path = self.folder / f"{_OPEN}{uuid.uuid4().hex}{_ENDING}"
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                _sync_folder(self.folder)
            except OSError:
                os.close(file)
                self._path.unlink(missing_ok=True)
                raise
            if self._path.exists():  # a recovery may have found it before it was locked
                break
            os.close(file)
        self._opened_at, self.size = time.monotonic(), 0
        return file

    def _abandon(self) -> None:
        """After a failed write nothing is known of the file's end but the size that was synced."""
        assert self._file is not None
        try:
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
            self.seal()
        except OSError:
            self._close()  # left to be recovered

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self.size = None, 0


def recover(folder: Path, keep: Callable[[list[bytes]], object]) -> int:
    """Seal the segments whose workers died, after ``keep`` has taken their lines; how many there were."""
    found = 0
    for path in sorted(folder.glob(f"{_OPEN}*{_ENDING}")):
        with suppress(FileNotFoundError), open(path, "r+b") as file:
            found += _recover_one(path, file, keep)
    return found


def _recover_one(path: Path, file: BinaryIO, keep: Callable[[list[bytes]], object]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its worker lives
    if not path.exists():
        return False  # another process has just sealed it
    text = file.read()
    whole = text.rfind(b"\n") + 1
    file.truncate(whole)
    os.fsync(file.fileno())
    lines = text[:whole].split(b"\n")[:-1]
    if damaged := [line for line in lines if not _is_row(line)]:
        lines = [line for line in lines if _is_row(line)]
        aside = path.with_name(f".damaged-{path.name.removeprefix(_OPEN).removesuffix(_ENDING)}")
        log.error("serve: %d lines of a worker that died are damaged: they are in %s", len(damaged), aside)
        _put(aside, damaged)
        _put(path, lines)
    if lines:
        keep(lines)
        _rename(path)
        _sync_folder(path.parent)
    else:
        path.unlink()
    return True


def _is_row(line: bytes) -> bool:
    try:
        return bool(_columns(line))
    except msgspec.DecodeError:
        return False


def _put(path: Path, lines: Sequence[bytes]) -> None:
    """A file of these lines in the place of what was there, on disk before it returns."""
    beside = path.with_name(f".new-{path.name}")
    with open(beside, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def sealed(folder: Path) -> list[Path]:
    """The segments that are ingest's, the oldest first."""
    return sorted(folder.glob(f"{_SEALED}*{_ENDING}"))


def parse(lines: Iterable[bytes]) -> list[Event]:
    return [_decode(line) for line in lines]


def read(paths: Iterable[Path]) -> Iterator[Event]:
    """Events of sealed segments.

    Raises:
        StateError: a line of one is damaged.
    """
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _decode(line)
                except msgspec.DecodeError as error:
                    raise StateError(
                        f"{path}: line {number} is damaged ({error}): ingest the file, which puts that line into quarantine, "
                        "then move it elsewhere"
                    ) from None


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _rename(path: Path) -> None:
    name = path.name.removeprefix(_OPEN).removesuffix(_ENDING)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path.rename(path.with_name(f"{_SEALED}{stamp}-{name}{_ENDING}"))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
