"""Events of one hash partition of users, kept as Arrow buffers between passes.

Events are shuffled by user once; a partition then is a few :class:`EventBlock` of whole users. A block numbers its users
and the inputs that *it saw* from 0, so that what it exchanges per pass is as large as what it saw, not as the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from numpy.typing import NDArray

from mtl.gaussian import Array

# Users whose statistics are held at once: every run of them costs one dense sum over all inputs seen.
USERS_AT_ONCE = 65_536

# Roles of events in training; their users' own weights see all of them.
TRAINED, HELD_OUT, CAPPED = 0, 1, 2

ARROW_SCHEMA = pa.schema(
    [
        ("users", pa.binary()),
        ("attributes", pa.binary()),
        ("n_events", pa.binary()),
        ("inputs", pa.binary()),
        ("starts", pa.binary()),
        ("places", pa.binary()),
        ("weights", pa.binary()),
        ("labels", pa.binary()),
        ("precision", pa.binary()),
        ("information", pa.binary()),
        ("extra_starts", pa.binary()),
        ("extra_places", pa.binary()),
        ("extra_weights", pa.binary()),
        ("extra_labels", pa.binary()),
        ("extra_roles", pa.binary()),
    ]
)
_EXTRA = "extra_"
DDL = ", ".join(f"{name} binary" for name in ARROW_SCHEMA.names)


@dataclass(frozen=True)
class ExtraEvents:
    """Events of a block's users that θ is not trained on: one entry an event, with its role."""

    starts: NDArray[Any]
    places: NDArray[Any]
    weights: NDArray[Any]
    labels: NDArray[Any]
    roles: NDArray[Any]

    def matrix(self, values: NDArray, shape: tuple[int, int]) -> sp.csr_matrix:
        """(users, inputs seen) with ``values`` for the entries."""
        return sp.csr_matrix((values, self.places, self.starts), shape)

    def of_rows(self, row: NDArray[np.integer], chosen: NDArray[np.bool_], n_users: int) -> ExtraEvents:
        """The entries that are ``chosen``; row (entries,) is each one's user."""
        counts = np.bincount(row[chosen], minlength=n_users)
        arrays = (self.places, self.weights, self.labels, self.roles)
        return ExtraEvents(np.append(0, np.cumsum(counts)).astype(np.int32), *(values[chosen] for values in arrays))


@dataclass(frozen=True)
class EventBlock:
    """Some users' events: a CSR pattern (users, inputs seen) with weights c and weighted labels c·y.

    Under another loss than the squared one the entries also have working values (:mod:`mtl.losses`), which change from
    pass to pass; without them the weights and labels are what enters the sums.
    """

    attributes: Array  # (users, p), first column 1
    n_events: NDArray[np.int64]  # (users,)
    inputs: NDArray[np.int32]  # catalogue index of each input seen
    starts: NDArray[np.int32]  # (users + 1,)
    places: NDArray[np.int32]  # which input seen, an entry
    weights: Array
    labels: Array
    users: pa.Array | None = None  # ids, (users,); None where a pass does not need them
    precision: Array | None = None  # c·ω of each entry
    information: Array | None = None  # c·ω·z
    extra: ExtraEvents | None = None  # that θ is not trained on

    def __len__(self) -> int:
        return len(self.starts) - 1

    def matrix(self, values: Array) -> sp.csr_matrix:
        """(users, inputs seen) with ``values`` for the entries."""
        return sp.csr_matrix((values, self.places, self.starts), shape=(len(self), len(self.inputs)))

    @cached_property
    def weight_matrix(self) -> sp.csr_matrix:
        return self.matrix(self.weights)

    @cached_property
    def label_matrix(self) -> sp.csr_matrix:
        return self.matrix(self.labels)

    def with_extra(self, *roles: int) -> EventBlock:
        """The block with the events of some roles among those it is trained on."""
        if self.extra is None or not np.isin(self.extra.roles, roles).any():
            return self
        extra = self.extra.matrix(np.arange(len(self.extra.roles)), self.weight_matrix.shape).tocoo()
        added = np.isin(self.extra.roles, roles)
        parts = []
        for matrix, values in ((self.weight_matrix, self.extra.weights), (self.label_matrix, self.extra.labels)):
            own = matrix.tocoo()
            row, column = np.append(own.row, extra.row[added]), np.append(own.col, extra.col[added])
            parts.append(sp.coo_matrix((np.append(own.data, values[added]), (row, column)), matrix.shape).tocsr())
        weights, labels = parts
        return replace(
            self,
            starts=weights.indptr.astype(np.int32),
            places=weights.indices.astype(np.int32),
            weights=weights.data,
            labels=labels.data,
            extra=self.extra.of_rows(extra.row, ~added, len(self)),
        )

    def parts(self, size: int = USERS_AT_ONCE) -> Iterator[slice]:
        """At most ``size`` users at a time."""
        for first in range(0, len(self), size):
            yield slice(first, min(first + size, len(self)))

    def entries(self, users: slice) -> slice:
        """Where the entries of a run of users are."""
        return slice(int(self.starts[users.start]), int(self.starts[users.stop]))


def build(
    user: pa.Array | pa.ChunkedArray,
    input_index: NDArray[np.integer],
    label: Array,
    weight: Array,
    attribute_users: pa.Array | pa.ChunkedArray,
    attributes: Array,
    role: NDArray[np.integer] | None = None,
) -> EventBlock:
    """The block of n events and m users with known attributes.

    Args:
        user: user id of each event, (n,).
        input_index: catalogue index of each event's input, (n,).
        label, weight: y and c of each event, (n,).
        attribute_users: ids of users with attributes, (m,), each once.
        attributes: (m, p); a user without a row gets [1, 0, …, 0], the average.
        role: of each event (n,): TRAINED, HELD_OUT or CAPPED; all are trained on where it is None.
    """
    codes = pa.concat_arrays([*_chunks(user), *_chunks(attribute_users)]).dictionary_encode()
    numbers = codes.indices.to_numpy(zero_copy_only=False)
    n_users = len(codes.dictionary)
    row, described = numbers[: len(label)], numbers[len(label) :]
    inputs, place = np.unique(input_index, return_inverse=True)
    trained = np.ones(len(label), bool) if role is None else role == TRAINED
    pattern, labelled = csr(row[trained], place[trained], label[trained], weight[trained], n_users, len(inputs))
    extra = None
    if role is not None and not trained.all():
        order = np.argsort(row, kind="stable")
        entries: tuple[NDArray[Any], ...] = (place.astype(np.int32), weight, weight * label, role.astype(np.uint8))
        unfinished = ExtraEvents(np.empty(0, np.int32), *(values[order] for values in entries))
        extra = unfinished.of_rows(row[order], ~trained[order], n_users)
    known = np.zeros((n_users, attributes.shape[1]))
    known[:, 0] = 1.0
    known[described] = attributes
    return EventBlock(
        attributes=known,
        n_events=np.bincount(row, minlength=n_users),
        inputs=inputs.astype(np.int32),
        starts=pattern.indptr.astype(np.int32),
        places=pattern.indices.astype(np.int32),
        weights=pattern.data,
        labels=labelled.data,
        users=codes.dictionary,
        extra=extra,
    )


def csr(
    row: NDArray[np.integer], place: NDArray[np.integer], label: Array, weight: Array, n_users: int, n_inputs: int
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Weights c and weighted labels c·y of events as (users, inputs) matrices of one pattern; repeated pairs add."""
    shape = (n_users, n_inputs)
    return tuple(sp.coo_matrix((values, (row, place)), shape=shape).tocsr() for values in (weight, weight * label))


def to_arrow(block: EventBlock) -> pa.RecordBatch:
    """One row of buffers."""
    sink = pa.BufferOutputStream()
    ids = pa.record_batch([block.users], ["user"])
    with pa.ipc.new_stream(sink, ids.schema) as stream:
        stream.write_batch(ids)
    buffers = {
        "users": sink.getvalue().to_pybytes(),
        **{name: buffer(block, name) for name in ARROW_SCHEMA.names if name != "users"},
    }
    return pa.record_batch([pa.array([buffers[name]], pa.binary()) for name in ARROW_SCHEMA.names], schema=ARROW_SCHEMA)


def buffer(block: EventBlock, name: str) -> bytes | None:
    """The array ``name`` of a block as bytes."""
    owner, _, own = name.rpartition("_") if name.startswith(_EXTRA) else ("", "", name)
    values = getattr(block.extra if owner else block, own, None)
    return None if values is None else np.ascontiguousarray(values).tobytes()


def from_arrow(batches: Iterable[pa.RecordBatch]) -> Iterator[EventBlock]:
    """Blocks from rows of buffers, without copying; a batch may leave out ``users``."""
    for batch in batches:
        for i in range(batch.num_rows):
            buffers = {name: batch.column(name)[i].as_buffer() for name in batch.schema.names}
            starts = np.frombuffer(buffers["starts"], np.int32)
            users = None
            if "users" in buffers:
                users = pa.ipc.open_stream(buffers["users"]).read_next_batch().column("user")
            yield EventBlock(
                attributes=np.frombuffer(buffers["attributes"]).reshape(len(starts) - 1, -1),
                n_events=np.frombuffer(buffers["n_events"], np.int64),
                inputs=np.frombuffer(buffers["inputs"], np.int32),
                starts=starts,
                places=np.frombuffer(buffers["places"], np.int32),
                weights=np.frombuffer(buffers["weights"]),
                labels=np.frombuffer(buffers["labels"]),
                users=users,
                **{
                    name: np.frombuffer(buffers[name])
                    for name in ("precision", "information")
                    if buffers[name] is not None
                },
                extra=_extra(buffers),
            )


def _extra(buffers: dict[str, Any]) -> ExtraEvents | None:
    if buffers["extra_roles"] is None:
        return None
    kinds: dict[str, Any] = {
        "starts": np.int32,
        "places": np.int32,
        "weights": np.float64,
        "labels": np.float64,
        "roles": np.uint8,
    }
    return ExtraEvents(*(np.frombuffer(buffers[f"{_EXTRA}{name}"], kind) for name, kind in kinds.items()))


def index_of(ids: pa.Array | pa.ChunkedArray, catalogue: pa.Array) -> NDArray[np.int64]:
    """Place of each id in ``catalogue``, −1 where it is not there."""
    return pc.fill_null(pc.index_in(ids, value_set=catalogue), -1).to_numpy().astype(np.int64)


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
