"""Users' rows in memory, found by user and replaced by newer ones: what a batch of few events needs of the users table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mtl import gaussian, schema
from mtl.arrow import lists, matrix
from mtl.blocks import index_of
from mtl.decay import micros, timestamps
from mtl.schema import N_EVENTS, REFERENCE_TIME, USER_ID
from mtl.users import WRITTEN

_ID_BYTES = 32  # of a user's id, about


class KeptUsers:
    """Rows of :data:`mtl.users.WRITTEN`, one a user, found by user.

    Args:
        rows: of all users there are.
        d: length of a user's weights.
    """

    def __init__(self, rows: pa.Table, d: int):
        self._widths = {schema.A: gaussian.packed_length(d), schema.B: d, schema.W: d, schema.PRIOR_MEAN: d}
        self._ids = pa.array([], pa.string())
        self._vectors = {name: np.empty((0, width)) for name, width in self._widths.items()}
        self._n_events = np.empty(0, np.int64)
        self._reference = np.empty(0, np.int64)  # microseconds
        self.put(rows)

    @staticmethod
    def bytes_of(n: int, d: int) -> int:
        """Memory that ``n`` users take, about."""
        return n * (8 * (gaussian.packed_length(d) + 3 * d + 2) + _ID_BYTES)

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, users: pa.Array | None = None) -> pa.Table:
        """Those of these users that have one, each once; None: of all users."""
        if users is None:
            place = np.arange(len(self))
        else:
            place = self._places(users.unique())
            place = place[place >= 0]
        columns = {
            USER_ID: self._ids.take(pa.array(place)),
            **{name: lists(values[place]) for name, values in self._vectors.items()},
            N_EVENTS: pa.array(self._n_events[place]),
            REFERENCE_TIME: timestamps(self._reference[place]),
        }
        return pa.table(columns).select(WRITTEN)

    def without(self, users: pa.Array) -> pa.Array:
        """Those of these users that have none, each once."""
        users = users.unique()
        return users.filter(pa.array(self._places(users) < 0))

    def _places(self, users: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Where the rows of users are, each named once; −1 where they have none."""
        # The other way round all ids would have to be hashed.
        found = index_of(self._ids, users)
        place = np.full(len(users), -1)
        place[found[found >= 0]] = np.flatnonzero(found >= 0)
        return place

    def put(self, rows: pa.Table) -> None:
        """Have these, one a user, in the place of those of the same users."""
        ids = rows[USER_ID]
        place = self._places(ids)
        new = place < 0
        place[new] = len(self) + np.arange(new.sum())
        self._ids = pa.concat_arrays([self._ids, *ids.filter(pa.array(new)).chunks])
        for name, values in self._vectors.items():
            self._vectors[name] = _with(values, place, matrix(rows[name], self._widths[name]), len(self))
        self._n_events = _with(self._n_events, place, rows[N_EVENTS].to_numpy(), len(self))
        self._reference = _with(self._reference, place, micros(rows[REFERENCE_TIME]), len(self))


def _with(values: np.ndarray, place: np.ndarray, these: np.ndarray, n: int) -> np.ndarray:
    """``values[place] = these``, where ``n`` have a place; it grows by more than it has to, so seldom."""
    if len(values) < n:
        room = np.empty((n // 8 + n - len(values), *values.shape[1:]), values.dtype)
        values = np.concatenate([values, room])
    values[place] = these
    return values
