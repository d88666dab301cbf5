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

from mtl.earlier import Evidence
from mtl.effects import Effects, Offsets, part_of, together
from mtl.gaussian import Array

# Users whose statistics are held at once: every run of them costs one dense sum over all inputs seen.
USERS_AT_ONCE = 65_536

# Roles of events in training; their users' own weights see all of them.
TRAINED, HELD_OUT, CAPPED, EARLIER = 0, 1, 2, 3

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
        ("offset", pa.binary()),
        ("contexts", pa.binary()),
        ("precision", pa.binary()),
        ("information", pa.binary()),
        ("earlier_precision", pa.binary()),
        ("earlier_information", pa.binary()),
        ("extra_starts", pa.binary()),
        ("extra_places", pa.binary()),
        ("extra_weights", pa.binary()),
        ("extra_labels", pa.binary()),
        ("extra_offset", pa.binary()),
        ("extra_contexts", pa.binary()),
        ("extra_roles", pa.binary()),
    ]
)
_EXTRA = "extra_"
_OF_USERS = {"attributes", "earlier_precision", "earlier_information"}  # matrices
_OF_ENTRIES = ("places", "weights", "labels", "offset", "contexts")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("inputs", "starts", "places", "contexts"), np.int32),
    "n_events": np.int64,
    "roles": np.uint8,
}
DDL = ", ".join(f"{name} binary" for name in ARROW_SCHEMA.names)


@dataclass(frozen=True)
class ExtraEvents:
    """Events of a block's users that θ is not trained on: one entry an event, with its role."""

    starts: NDArray[Any]
    places: NDArray[Any]
    weights: NDArray[Any]
    labels: NDArray[Any]
    offset: NDArray[Any] | None
    contexts: NDArray[Any] | None
    roles: NDArray[Any]


_NOTHING = np.zeros(0)
_NO_EXTRA = ExtraEvents(np.zeros(1, np.int32), _NOTHING.astype(np.int32), _NOTHING, _NOTHING, None, None, _NOTHING)


@dataclass(frozen=True)
class EventBlock:
    """Some users' events: a CSR pattern (users, inputs seen) with weights c and weighted labels c·y.

    Events of one pair are one entry, unless any event has an offset or contexts (:mod:`mtl.effects`). Under another loss than
    the squared one the entries also have working values (:mod:`mtl.losses`), which change from pass to pass; without them the
    weights and labels are what enters the sums.
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
    offset: Array | None = None  # that the events of the entries came with
    contexts: NDArray[np.int32] | None = None  # codes of their contexts' values, (entries, contexts)
    extra: ExtraEvents | None = None  # that θ is not trained on
    earlier_precision: Array | None = None  # of each user, packed (users, ·): what earlier events said (mtl.earlier)
    earlier_information: Array | None = None  # (users, d)

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

    def offsets(self, effects: Effects) -> Offsets | None:
        """What is known of h of every entry beside user and input; None where it is 0."""
        return together(self.offset, self.contexts, effects)

    def has(self, *roles: int) -> bool:
        """Whether it has events of any of these roles, apart from those that are trained on."""
        return self.extra is not None and bool(np.isin(self.extra.roles, roles).any())

    def with_extra(self, *roles: int) -> EventBlock:
        """The block with the events of some roles among those it is trained on."""
        if self.extra is None or not self.has(*roles):
            return self
        extra, of_extra = self.extra, np.repeat(np.arange(len(self)), np.diff(self.extra.starts))
        added = np.isin(extra.roles, roles)
        row = np.append(np.repeat(np.arange(len(self)), np.diff(self.starts)), of_extra[added])
        starts, order = _in_rows(row, len(self))
        rest, left = _in_rows(of_extra[~added], len(self))

        def both(name: str) -> Any:
            own, its = getattr(self, name), getattr(extra, name)
            # Without entries of its own it has forgotten how many contexts there are.
            return None if own is None else np.concatenate([own.reshape(-1, *its.shape[1:]), its[added]])[order]

        return replace(
            self,
            starts=starts,
            **{name: both(name) for name in _OF_ENTRIES},
            precision=None,
            information=None,
            extra=ExtraEvents(rest, *(_taken(getattr(extra, name), ~added, left) for name in (*_OF_ENTRIES, "roles"))),
        )

    @property
    def earlier(self) -> Evidence | None:
        """What earlier events said of the users; None where θ is trained on all events."""
        if self.earlier_precision is None or self.earlier_information is None:
            return None
        return Evidence(self.earlier_precision, self.earlier_information)

    def of_role(self, role: int) -> EventBlock:
        """The same users with the events of one role alone, which is not TRAINED."""
        extra = self.extra or _NO_EXTRA
        chosen = extra.roles == role
        starts, order = _in_rows(np.repeat(np.arange(len(extra.starts) - 1), np.diff(extra.starts))[chosen], len(self))
        entries = {name: _taken(getattr(extra, name), chosen, order) for name in _OF_ENTRIES}
        return replace(self, starts=starts, **entries, precision=None, information=None, extra=None)

    @property
    def pattern(self) -> sp.csr_matrix:
        """1 where a user has an event of an input, once however many there are."""
        pairs = self.matrix(np.ones(len(self.places))).copy()
        pairs.sum_duplicates()
        pairs.data[:] = 1.0
        return pairs

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
    offset: Array | None = None,
    contexts: NDArray[np.int32] | None = None,
) -> EventBlock:
    """The block of n events and m users with known attributes.

    Args:
        user: user id of each event, (n,).
        input_index: catalogue index of each event's input, (n,).
        label, weight: y and c of each event, (n,).
        attribute_users: ids of users with attributes, (m,), each once.
        attributes: (m, p); a user without a row gets [1, 0, …, 0], the average.
        role: of each event (n,): TRAINED, HELD_OUT, CAPPED or EARLIER; all are trained on where it is None.
        offset: of each event (n,); None where no event has one.
        contexts: codes of each event's values, (n, contexts); None where there are none.
    """
    codes = pa.concat_arrays([*_chunks(user), *_chunks(attribute_users)]).dictionary_encode()
    numbers = codes.indices.to_numpy(zero_copy_only=False)
    n_users = len(codes.dictionary)
    row, described = numbers[: len(label)], numbers[len(label) :]
    inputs, place = np.unique(input_index, return_inverse=True)
    trained = np.ones(len(label), bool) if role is None else role == TRAINED
    of_events: tuple[Any, ...] = (place.astype(np.int32), weight, weight * label, offset, contexts)
    extra = None
    if role is not None and not trained.all():
        starts, order = _in_rows(row[~trained], n_users)
        extra = ExtraEvents(
            starts, *(_taken(values, ~trained, order) for values in (*of_events, role.astype(np.uint8)))
        )
    if offset is None and contexts is None:
        pattern, labelled = csr(row[trained], place[trained], label[trained], weight[trained], n_users, len(inputs))
        starts = pattern.indptr
        of_entries: tuple[Any, ...] = pattern.indices.astype(np.int32), pattern.data, labelled.data, None, None
    else:
        starts, order = _in_rows(row[trained], n_users)
        of_entries = tuple(_taken(values, trained, order) for values in of_events)
    known = np.zeros((n_users, attributes.shape[1]))
    known[:, 0] = 1.0
    known[described] = attributes
    return EventBlock(
        attributes=known,
        n_events=np.bincount(row, minlength=n_users),
        inputs=inputs.astype(np.int32),
        starts=starts.astype(np.int32),
        **dict(zip(_OF_ENTRIES, of_entries, strict=True)),
        users=codes.dictionary,
        extra=extra,
    )


def _in_rows(row: NDArray[np.integer], n_rows: int) -> tuple[NDArray[np.int32], NDArray[np.integer]]:
    """Where each row begins, (rows + 1,), once entries of the rows ``row`` are in the order that comes with it."""
    starts = np.append(0, np.cumsum(np.bincount(row, minlength=n_rows)))
    return starts.astype(np.int32), np.argsort(row, kind="stable")


def _taken(values: NDArray[Any] | None, chosen: NDArray[np.bool_], order: NDArray[np.integer]) -> Any:
    return None if values is None else values[chosen][order]


def csr(
    row: NDArray[np.integer], place: NDArray[np.integer], label: Array, weight: Array, n_users: int, n_inputs: int
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Weights c and weighted labels c·y of events as (users, inputs) matrices of one pattern; repeated pairs add."""
    shape = (n_users, n_inputs)
    return tuple(sp.coo_matrix((values, (row, place)), shape=shape).tocsr() for values in (weight, weight * label))


def entries(
    row: NDArray[np.integer],
    place: NDArray[np.integer],
    label: Array,
    weight: Array,
    n_users: int,
    n_inputs: int,
    offsets: Offsets | None,
) -> tuple[sp.csr_matrix, sp.csr_matrix, Offsets | None]:
    """:func:`csr`, but with an entry an event where these have offsets; and the entries' offsets."""
    if offsets is None:
        return *csr(row, place, label, weight, n_users, n_inputs), None
    starts, order = _in_rows(row, n_users)
    shape, place = (n_users, n_inputs), place[order]
    weights, labels = (sp.csr_matrix((of[order], place, starts), shape) for of in (weight, weight * label))
    return weights, labels, part_of(offsets, order)


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
            arrays: dict[str, Any] = {
                name: np.frombuffer(values, _KINDS.get(name.removeprefix(_EXTRA), np.float64))
                for name, values in buffers.items()
                if values is not None and name != "users"
            }
            n_users = len(arrays["starts"]) - 1
            for name in arrays.keys() & _OF_USERS:
                arrays[name] = arrays[name].reshape(n_users, -1)
            for of in ("", _EXTRA):
                if f"{of}contexts" in arrays:
                    n_entries = len(arrays[f"{of}places"])
                    arrays[f"{of}contexts"] = arrays[f"{of}contexts"].reshape(n_entries, -1 if n_entries else 1)
            if "users" in buffers:
                arrays["users"] = pa.ipc.open_stream(buffers["users"]).read_next_batch().column("user")
            extra = {name.removeprefix(_EXTRA): arrays.pop(name) for name in [*arrays] if name.startswith(_EXTRA)}
            if extra:
                arrays["extra"] = ExtraEvents(**{"offset": None, "contexts": None, **extra})
            yield EventBlock(**arrays)


def index_of(ids: pa.Array | pa.ChunkedArray, catalogue: pa.Array) -> NDArray[np.int64]:
    """Place of each id in ``catalogue``, −1 where it is not there."""
    return pc.fill_null(pc.index_in(ids, value_set=catalogue), -1).to_numpy().astype(np.int64)


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
