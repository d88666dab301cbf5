"""Bytes of what the stores hold of users, and the keys by which they are found."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mtl.gaussian import Array

_HEADER = struct.Struct("<qq")  # cycle, number of events
_PREFIX = struct.Struct(">I")
DIGEST_BYTES = 16


def digest(identity: str) -> bytes:
    """Sixteen bytes that stand for an id: keys of one length, whatever the id's."""
    return hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def prefix(model_version: int) -> bytes:
    """What every key of a model version begins with."""
    return _PREFIX.pack(model_version)


def pack_users(cycle: int, n_events: Iterable[int], users: Array) -> Iterator[bytes]:
    """Records of users from rows [mean | quadratic]."""
    width, data = users.shape[1] * 8, np.ascontiguousarray(users).tobytes()
    for i, n in enumerate(n_events):
        yield _HEADER.pack(cycle, n) + data[i * width : (i + 1) * width]


def pack_user(n_events: int, mean: Array, quadratic: Array) -> bytes:
    """One of these, of no cycle."""
    return _HEADER.pack(0, n_events) + mean.tobytes() + quadratic.tobytes()


def pack_described(cycle: int, mean: Array) -> bytes:
    """A user of whom only attributes are known, by the mean of the weights: the covariance is that of all such users."""
    return _HEADER.pack(cycle, 0) + mean.tobytes()


def unpack_user(record: bytes, d: int) -> tuple[int, Array, Array]:
    """Number of events, mean (d,), and quadratic as :mod:`mtl.serving.scorer` has it, empty where only attributes are known."""
    values = np.frombuffer(record, np.float64, offset=_HEADER.size)
    return _HEADER.unpack_from(record)[1], values[:d], values[d:]


def unpack_users(records: Sequence[bytes | memoryview], d: int) -> tuple[Array, Array]:
    """Means (m, d) and quadratics (m, width − 1) of m records, none of which is of attributes alone."""
    values = np.frombuffer(b"".join(records), np.float64).reshape(len(records), -1)
    first = _HEADER.size // 8
    return values[:, first : first + d], values[:, first + d :]


def is_described_only(record: bytes | memoryview, d: int) -> bool:
    return len(record) == _HEADER.size + 8 * d


def cycle_of(record: bytes | memoryview) -> int:
    return _HEADER.unpack_from(record)[0]
