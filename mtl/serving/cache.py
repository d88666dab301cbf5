"""Caches shared by all users, bounded by bytes: features by equivalence class, predictions by user and class.

The feature cache is a :class:`RowCache` of rows as :mod:`mtl.serving.scorer` multiplies them, by the key of a class
(:mod:`mtl.serving.classes`). Only complete features belong there, not those of a deadline (:mod:`mtl.serving.anytime`). An update
of w_u changes no feature: nothing in it is ever invalidated by one. A prediction's key holds the version of the user's
state, so that an update leaves its old predictions to age out.

Rows of one width lie in one matrix, so that a request's hits are one gather. Least recently used rows go first; they go a
64th of the capacity at a time, which finds them with one partition instead of with a linked list touched at every hit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mtl.errors import ConfigError
from mtl.gaussian import Array

_ENTRY_BYTES = 160  # of a row beside its numbers and its key: dictionary, list and time (measured, CPython 3.11)
_SMALLEST_KEY = 33  # bytes of the smallest key that is worth counting with
_PART = 64  # the share of the rows that is evicted at once is one in so many


@dataclass(frozen=True)
class Counts:
    """What a cache did since it was made, and what it holds."""

    hits: int
    misses: int
    evictions: int
    rows: int
    bytes: int


class RowCache:
    """Rows of ``width`` numbers by key, the least recently used going first; safe to share between threads."""

    def __init__(self, width: int, max_bytes: int) -> None:
        """An empty cache.

        Args:
            max_bytes: of rows, keys and bookkeeping together.

        Raises:
            ConfigError: not even one row fits.
        """
        self._row_bytes = 8 * width + _ENTRY_BYTES
        capacity = max_bytes // (self._row_bytes + _SMALLEST_KEY)
        if capacity < 1:
            raise ConfigError(f"a cache of {max_bytes} bytes holds no row of {self._row_bytes} bytes: give it more")
        self._max_bytes = max_bytes
        self._rows = np.empty((capacity, width))  # pages that are never written take no memory
        self._used = np.zeros(capacity, np.int64)  # when, in requests
        self._keys: list[Hashable] = [None] * capacity
        self._place: dict[Hashable, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._clock = self._hits = self._misses = self._evictions = self._bytes = 0
        self._lock = threading.Lock()

    def get(self, keys: Sequence[Hashable]) -> tuple[Array, np.ndarray]:
        """The rows of those keys that are held, in their order, and which those are, (n,) bool."""
        with self._lock:
            places = np.fromiter((self._place.get(key, -1) for key in keys), np.intp, len(keys))
            held = places >= 0
            found = places[held]
            self._clock += 1
            self._used[found] = self._clock
            self._hits += len(found)
            self._misses += len(keys) - len(found)
            return self._rows[found], held

    def put(self, keys: Sequence[Hashable], rows: Array) -> None:
        """Keep rows (n, width); a key that is held already gets the new row."""
        with self._lock:
            self._clock += 1
            for key, row in zip(keys, rows, strict=True):
                place = self._place.get(key)
                if place is None:
                    place = self._room_for(key)
                    if place is None:
                        continue
                self._rows[place] = row
                self._used[place] = self._clock

    def counts(self) -> Counts:
        with self._lock:
            return Counts(self._hits, self._misses, self._evictions, len(self._place), self._bytes)

    def _room_for(self, key: Hashable) -> int | None:
        """A place for a new key; None where it is too large for the whole cache."""
        size = self._row_bytes + _size(key)
        if size > self._max_bytes:
            return None
        while not self._free or self._bytes + size > self._max_bytes:
            self._evict()
        place = self._free.pop()
        self._place[key], self._keys[place] = place, key
        self._bytes += size
        return place

    def _evict(self) -> None:
        n = max(1, len(self._place) // _PART)
        taken = np.fromiter(self._place.values(), np.intp, len(self._place))
        for place in taken[np.argpartition(self._used[taken], n - 1)[:n]].tolist():
            key = self._keys[place]
            del self._place[key]
            self._keys[place] = None
            self._free.append(place)
            self._bytes -= self._row_bytes + _size(key)
        self._evictions += n


class PredictionCache:
    """(mean, variance) of h by user, version of the user's state and class."""

    def __init__(self, max_bytes: int) -> None:
        self._cache = RowCache(2, max_bytes)

    def get(self, user: str, state: int, classes: Sequence[Hashable]) -> tuple[Array, np.ndarray]:
        """(mean, variance) of those that are held, (·, 2), and which those are, (n,) bool."""
        return self._cache.get([(user, state, name) for name in classes])

    def put(self, user: str, state: int, classes: Sequence[Hashable], mean: Array, variance: Array) -> None:
        self._cache.put([(user, state, name) for name in classes], np.column_stack([mean, variance]))

    def counts(self) -> Counts:
        return self._cache.counts()


def _size(key: Hashable) -> int:
    """Bytes of a key; of one that is made of parts, with them."""
    return sys.getsizeof(key) + (sum(map(sys.getsizeof, key)) if isinstance(key, tuple) else 0)
