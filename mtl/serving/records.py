"""Bytes of what the stores hold: users' sums as packed rows of float64, the rest as MessagePack."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mtl import gaussian
from mtl.gaussian import Array

_HEADER = struct.Struct("<qq")  # cycle, number of events
_PREFIX = struct.Struct(">I")
DIGEST_BYTES = 16


class UserRow(NamedTuple):
    """One user's sums as the tables had them."""

    cycle: int  # of the refresher, when it wrote the row
    n_events: int
    a: Array  # packed (d(d+1)/2,)
    b: Array  # (d,)
    prior_mean: Array  # (d,)


def digest(identity: str) -> bytes:
    """Sixteen bytes that stand for an id: keys of one length, whatever the id's."""
    return hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def prefix(model_version: int) -> bytes:
    """What every key of a model version begins with."""
    return _PREFIX.pack(model_version)


def pack_user(cycle: int, n_events: int, a: Array, b: Array, prior_mean: Array) -> bytes:
    return _HEADER.pack(cycle, n_events) + np.concatenate([a, b, prior_mean]).tobytes()


def pack_users(cycle: int, n_events: Iterable[int], sums: Array) -> Iterator[bytes]:
    """Records of users from rows [a | b | prior_mean]."""
    width, data = sums.shape[1] * 8, np.ascontiguousarray(sums).tobytes()
    for i, n in enumerate(n_events):
        yield _HEADER.pack(cycle, n) + data[i * width : (i + 1) * width]


def pack_described(cycle: int, prior_mean: Array) -> bytes:
    """A user of whom only attributes are known."""
    return _HEADER.pack(cycle, 0) + prior_mean.tobytes()


def unpack_user(record: bytes | memoryview, d: int) -> UserRow:
    cycle, n_events = _HEADER.unpack_from(record)
    values = np.frombuffer(record, np.float64, offset=_HEADER.size)
    length = gaussian.packed_length(d)
    if len(values) == d:
        return UserRow(cycle, n_events, np.zeros(length), np.zeros(d), values)
    return UserRow(cycle, n_events, values[:length], values[length : length + d], values[length + d :])


def is_described_only(record: bytes | memoryview, d: int) -> bool:
    return len(record) == _HEADER.size + 8 * d


def cycle_of(record: bytes | memoryview) -> int:
    return _HEADER.unpack_from(record)[0]
