"""Per-user state: events added to the users they belong to, one vectorized call for all users of a hash partition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from mtl import blocks, decay, gaussian, schema
from mtl.arrow import fill, lists, matrix
from mtl.contexts import columns_of, offsets_of
from mtl.effects import part_of
from mtl.errors import InputError
from mtl.features import Features
from mtl.gaussian import Array
from mtl.layout import SCHEMAS
from mtl.losses import LOSSES
from mtl.model import Model
from mtl.schema import EVENT_TIME, INPUT_ID, LABEL, OFFSET, REFERENCE_TIME, USER_ID, WEIGHT
from mtl.sharing import share
from mtl.working import settle

_STATE = (schema.A, schema.B, schema.PRIOR_MEAN, schema.N_EVENTS)
TURN = "turn"
TRAINING = 0  # the turn of the events that a retraining gave the users at once
MEASURED, MEASURED_OF = "measured", "measured_of"
WRITTEN = (USER_ID, schema.A, schema.B, schema.W, schema.PRIOR_MEAN, schema.N_EVENTS, REFERENCE_TIME)


@dataclass(frozen=True)
class SharedInputs:
    """What the workers need of the inputs: ids and features, in the same order."""

    ids: pa.Array
    features: Features = field(repr=False)  # what users' sums are made of
    arrived: np.ndarray | None = field(
        default=None, repr=False
    )  # which training had no event of, (n,); None: of all it had
    learnt: Features | None = field(default=None, repr=False)  # what predictions are made of, see mtl.arrivals

    @property
    def current(self) -> Features:
        """Features to predict with."""
        return self.features if self.learnt is None else self.learnt


Measure = Callable[[pa.Table, Model, SharedInputs], Iterable[tuple[pa.Array, Array]]]


def updated_users(
    events: DataFrame,
    states: DataFrame,
    described: DataFrame | None,
    model: Model,
    inputs: SharedInputs,
    partitions: int,
    measure: Measure | None = None,
    of_all: bool = False,
) -> DataFrame:
    """The users of ``events`` with these events added: one row a user, columns :data:`WRITTEN`.

    Args:
        events: user_id, input_id, label, weight, event_time where the model forgets, context where it has contexts, and
            offset where any has one; every input among ``inputs``.
            With a column ``turn`` they are added turn by turn, first those of training: it matters under another loss
            than the squared one.
        states: rows of the users table (of the model's version) of those users that have one.
        described: of :func:`prior_means`, for users without a row; None where no user has attributes.
        partitions: hash partitions of users.
        measure: something to measure of each partition before its events are added: (a table as :func:`add_events`
            gets it, model, inputs) → pairs of n ids and numbers (n, m), which come as more rows, without a user, in the
            columns ``measured_of`` and ``measured``.
        of_all: the rows of states without events come as well, as they are.
    """
    of_states = WRITTEN if of_all else (USER_ID, *_STATE, *([REFERENCE_TIME] if model.half_life_days else []))
    rows = needed_of(events, model).unionByName(states.select(*of_states), allowMissingColumns=True)
    if described is not None:
        rows = rows.unionByName(described, allowMissingColumns=True)
    update = _update_in_arrow(share(events.sparkSession, (model, inputs)), measure, of_all)
    kinds = {column.name: column.dataType.simpleString() for column in SCHEMAS[schema.USERS]}
    columns = [f"{name} {kinds[name]}" for name in WRITTEN] + [
        f"{MEASURED_OF} string",
        f"{MEASURED} array<double>",
    ] * bool(measure)
    return rows.repartition(partitions, USER_ID).mapInArrow(update, ", ".join(columns))


def needed_of(events: DataFrame, model: Model) -> DataFrame:
    """The columns of events that :func:`add_events` takes."""
    optional = [name for name in (TURN, OFFSET) if name in events.columns]
    time = [EVENT_TIME] if model.half_life_days else []
    return events.select(USER_ID, INPUT_ID, LABEL, WEIGHT, *time, *optional, *columns_of(events, model.contexts))


def prior_means(users: DataFrame, model: Model) -> DataFrame:
    """(user_id, prior_mean) of rows of the user attributes table, in Arrow batches on the workers."""
    return _described(users, model, schema.PRIOR_MEAN, prior_mean_rows)


def weights_without_events(users: DataFrame, model: Model) -> DataFrame:
    """(user_id, w) of rows of the user attributes table, of users without events."""

    def rows(table: pa.Table, model: Model) -> pa.Table:
        found = prior_mean_rows(table, model)
        weights = model.weights_without_events(matrix(found[schema.PRIOR_MEAN], model.d))
        return found.select([USER_ID]).append_column(schema.W, lists(weights))

    return _described(users, model, schema.W, rows)


def _described(users: DataFrame, model: Model, name: str, rows: Callable[[pa.Table, Model], pa.Table]) -> DataFrame:
    """(user_id, ``name``, an array of numbers), made in Arrow batches on the workers."""
    shared = share(users.sparkSession, model)

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from rows(pa.Table.from_batches([batch]), shared.value).to_batches()

    return users.mapInArrow(partition, f"{USER_ID} string, {name} array<double>")


def prior_mean_rows(users: pa.Table, model: Model) -> pa.Table:
    """:func:`prior_means` of rows that are here."""
    if not len(users):  # encodings need not take an empty frame
        return pa.table({USER_ID: users[USER_ID], schema.PRIOR_MEAN: lists(np.empty((0, model.d)))})
    means = model.prior_mean_of_new(users.drop_columns([USER_ID]).to_pandas())
    return pa.table({USER_ID: users[USER_ID], schema.PRIOR_MEAN: lists(means)})


def add_events(table: pa.Table, model: Model, inputs: SharedInputs, default_mean: Array) -> pa.RecordBatch:
    """Events, states and prior means of some users, told apart by their nulls → their new rows.

    Args:
        table: columns user_id; input_id, label, weight of events, and what :func:`mtl.contexts.offsets_of` takes; a, b,
            n_events, prior_mean of states; prior_mean alone of described users. Where the model forgets also event_time of
            events and reference_time of states.
        default_mean: prior mean of a user of whom nothing is known, (d,).

    Raises:
        InputError: the model forgets, and an event has no time.
    """
    d = model.d
    codes = table[USER_ID].combine_chunks().dictionary_encode()
    users, row = codes.dictionary, codes.indices.to_numpy()
    is_event, is_state = (table[name].is_valid().to_numpy() for name in (INPUT_ID, schema.A))

    a = np.zeros((len(users), gaussian.packed_length(d)))
    b, n_events = np.zeros((len(users), d)), np.zeros(len(users), np.int64)
    prior_mean = np.tile(default_mean, (len(users), 1))
    reference = np.full(len(users), decay.NEVER)
    fill_prior_means(prior_mean, row, table[schema.PRIOR_MEAN], is_state)
    fill(a, row, table[schema.A])
    fill(b, row, table[schema.B])
    n_events[row[is_state]] = table[schema.N_EVENTS].filter(pa.array(is_state)).to_numpy()
    if model.half_life_days:
        reference[row[is_state]] = decay.micros(table[REFERENCE_TIME].filter(pa.array(is_state)))

    events = table.drop_columns([schema.A, schema.B, schema.PRIOR_MEAN]).filter(pa.array(is_event))
    place = blocks.index_of(events[INPUT_ID], inputs.ids)
    if (place < 0).any():
        unknown = pc.filter(events[INPUT_ID], pa.array(place < 0))[0]
        raise ValueError(f"input {unknown} has no features of model version {model.version}")
    turn = events[TURN].to_numpy() if TURN in events.column_names else np.ones(len(events), np.int64)
    time = _times(events, model) if model.half_life_days else None
    offsets = offsets_of(events, model.artefact.effects)
    loss = LOSSES[model.loss]
    for now in np.unique(turn):
        chosen = turn == now
        mine, label, weight = row[is_event][chosen], events[LABEL].to_numpy()[chosen], events[WEIGHT].to_numpy()[chosen]
        if time is not None:
            reference, of_sums, of_events = decay.age(mine, time[chosen], reference, model.half_life_days)
            a, b, weight = a * of_sums[:, None], b * of_sums[:, None], weight * of_events
        members = np.flatnonzero(np.bincount(mine, minlength=len(users)))
        mine = np.searchsorted(members, mine) if len(members) < len(users) else mine
        pairs = mine, place[chosen], label, weight, len(members), len(inputs.ids)
        weights, labels, rest = blocks.entries(*pairs, part_of(offsets, chosen))
        for first in range(0, len(members), blocks.USERS_AT_ONCE):
            part = slice(first, first + blocks.USERS_AT_ONCE)
            of = members[part] if len(members) < len(users) else part
            posteriors = partial(model.user_posteriors, prior_mean=prior_mean[of])
            before = None if now == TRAINING else (a[of], b[of])
            within = slice(weights.indptr[part.start], weights.indptr[min(part.stop, len(members))])
            told = weights[part], labels[part], inputs.features
            a[of], b[of] = settle(*told, posteriors, loss, before, part_of(rest, within))
    new = np.bincount(row[is_event], minlength=len(users))
    n_events += new
    if not new.all():
        touched = np.flatnonzero(new)
        users = users.take(pa.array(touched))
        a, b, prior_mean = a[touched], b[touched], prior_mean[touched]
        n_events, reference = n_events[touched], reference[touched]
    vectors = (lists(values) for values in (a, b, model.user_weights(a, b, prior_mean), prior_mean))
    return pa.record_batch([users, *vectors, pa.array(n_events), decay.timestamps(reference)], list(WRITTEN))


def fill_prior_means(into: Array, row: np.ndarray, column: pa.ChunkedArray, is_state: np.ndarray) -> None:
    """:func:`mtl.arrow.fill`, but where a user has a state its own prior mean has the last word, in whatever order rows come."""
    for wanted in (~is_state, is_state):
        fill(into, np.where(wanted, row, -1), column)


def _times(events: pa.Table, model: Model) -> np.ndarray:
    """In microseconds, (events,)."""
    if events[EVENT_TIME].null_count:
        user = events.filter(events[EVENT_TIME].is_null())[USER_ID][0]
        raise InputError(
            f"an event of user {user} has no event_time, and model version {model.version} forgets by age: train a version that "
            "does not, with model.half_life_days = 0"
        )
    return decay.micros(events[EVENT_TIME])


def _update_in_arrow(
    shared: Any, measure: Measure | None, of_all: bool
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = [batch for batch in batches if batch.num_rows]
        if rows:
            model, inputs = shared.value
            yield from updated_rows(pa.Table.from_batches(rows), model, inputs, measure, of_all)

    return partition


def updated_rows(
    table: pa.Table, model: Model, inputs: SharedInputs, measure: Measure | None = None, of_all: bool = False
) -> Iterator[pa.RecordBatch]:
    """What :func:`updated_users` gives, of a table as :func:`add_events` gets it, which holds all there is of its users."""
    users = add_events(table, model, inputs, model.prior_mean_of_unknown)
    written = [users, *(_without_events(table) if of_all else ())]
    if measure is None:
        yield from written
        return
    names = [*WRITTEN, MEASURED_OF, MEASURED]
    for ids, numbers in measure(table, model, inputs):
        none = [pa.nulls(len(ids), column.type) for column in users.columns]
        yield pa.record_batch([*none, ids, lists(numbers)], names)
    for rows in written:
        none = [pa.nulls(len(rows), kind) for kind in (pa.string(), pa.list_(pa.float64()))]
        yield pa.record_batch([*rows.columns, *none], names)


def _without_events(table: pa.Table) -> list[pa.RecordBatch]:
    """The rows of states that no event is of."""
    with_events = pc.is_in(table[USER_ID], table[USER_ID].filter(table[INPUT_ID].is_valid()))
    return table.filter(pc.and_not(table[schema.A].is_valid(), with_events)).select(WRITTEN).to_batches()
