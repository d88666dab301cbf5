"""Predictions with their uncertainty for many (user, input) pairs at once.

The belief about h of a pair (:func:`mtl.working.belief`) gives the prediction E[σ(h)] and the standard deviation of a label
about it (:mod:`mtl.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl import blocks, features, gaussian, schema
from mtl.arrow import fill
from mtl.blocks import index_of
from mtl.contexts import columns_of, offsets_of, without_columns
from mtl.effects import part_of
from mtl.features import Features
from mtl.gaussian import Array
from mtl.losses import LOSSES
from mtl.model import Model
from mtl.schema import INPUT_ID, USER_ID
from mtl.sharing import share
from mtl.tables import Tables
from mtl.users import SharedInputs, fill_prior_means, prior_means
from mtl.working import added, belief

PREDICTION = "prediction"
STD = "std"

# A user's state travels among the rows, under names that no row's own column has.
STATE = {name: f"_mtl_{name}" for name in (schema.A, schema.B, schema.PRIOR_MEAN)}
_ROWS_AT_ONCE = 16_384  # rows whose packed moments are gathered at once


def score(tables: Tables, model: Model, rows: DataFrame) -> DataFrame:
    """:func:`score_rows` with what the tables hold for the model's version."""
    users = tables.of_version(schema.USERS, model.version)
    inputs, user_attributes = tables.read(schema.INPUTS), tables.read(schema.USER_ATTRIBUTES)
    return score_rows(model, tables.of_version(schema.FEATURES, model.version), users, inputs, user_attributes, rows)


def score_rows(
    model: Model,
    shared: DataFrame,
    users: DataFrame,
    input_attributes: DataFrame | None,
    user_attributes: DataFrame | None,
    rows: DataFrame,
) -> DataFrame:
    """``rows`` with ``prediction`` and ``std``, the standard deviation of a label about it, both in label units.

    A user without a row in users has the prior, its mean by the user's attributes where there are any. An input without
    features has those that the oracle gives its attributes; without attributes either, those of an empty attribute row.

    Args:
        shared, users: the model version's rows of the features and the users table.
        input_attributes, user_attributes: input_id or user_id and attributes; None where there are none.
        rows: user_id and input_id, neither null, and any other columns, of which ``offset`` is a known part of h and
            ``context`` has the values of contexts. Read twice: persist what is dear.

    Returns:
        The columns of ``rows`` in their order, then the two; in no particular order of rows.
    """
    wanted = rows.select(USER_ID).distinct()
    known = users.join(wanted, USER_ID, "left_semi")
    states = known.select(USER_ID, *STATE).withColumnsRenamed(STATE)
    if user_attributes is not None and len(user_attributes.columns) > 1:
        unknown = wanted.join(known, USER_ID, "left_anti")
        described = prior_means(user_attributes.join(unknown, USER_ID, "left_semi"), model)
        states = states.unionByName(described.withColumnsRenamed(STATE), allowMissingColumns=True)
    inputs = inputs_of(model, shared, input_attributes, rows.select(INPUT_ID).distinct())
    broadcast = share(rows.sparkSession, (model, inputs))
    if model.contexts:
        rows = rows.select("*", *columns_of(rows, model.contexts))
    scored = T.StructType([*rows.schema.fields, *(T.StructField(name, T.DoubleType()) for name in (PREDICTION, STD))])
    together = rows.unionByName(states, allowMissingColumns=True)
    return without_columns(together.repartition(USER_ID).mapInArrow(_score_in_arrow(broadcast), scored), model.contexts)


def inputs_of(model: Model, shared: DataFrame, attributes: DataFrame | None, wanted: DataFrame) -> SharedInputs:
    """Features of the inputs ``wanted`` (input_id, distinct), and one more row, without an id, for an unknown input."""
    rows = wanted.join(shared, INPUT_ID, "left").toArrow()
    is_known = rows[schema.PHI].is_valid()
    known, missing = rows.filter(is_known), rows.filter(pc.invert(is_known))[INPUT_ID]
    described = pd.DataFrame(columns=[INPUT_ID], dtype=object)
    if len(missing) and attributes is not None:
        ids = wanted.sparkSession.createDataFrame(pa.table({INPUT_ID: missing}))
        described = attributes.join(F.broadcast(ids), INPUT_ID, "left_semi").toArrow().to_pandas()
    ids = pa.concat_arrays([known[INPUT_ID].combine_chunks(), pa.array(described[INPUT_ID], pa.string())])
    parts = [features.from_rows(known, model.d)]
    # Oracles and encodings need not take an empty frame.
    frames = ([described.drop(columns=INPUT_ID)] if len(described) else []) + [pd.DataFrame(index=[0])]
    parts += map(model.features_of_new, frames)
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return SharedInputs(ids, Features(*map(np.concatenate, columns)))


def add_scores(table: pa.Table, model: Model, inputs: SharedInputs) -> pa.Table:
    """Rows and states of some users, told apart by their nulls → the rows with prediction and std.

    Args:
        table: the rows' columns, null where a row is a state; a, b and prior_mean (under the names of ``STATE``) of
            states; prior_mean alone of users that are described by attributes.
        inputs: as :func:`inputs_of` has them; an input that is not among them is unknown.
    """
    is_row = table[INPUT_ID].is_valid().to_numpy()
    codes = table[USER_ID].combine_chunks().dictionary_encode()
    row, n_users = codes.indices.to_numpy(), len(codes.dictionary)
    a, b, prior_mean = states_of(table, row, n_users, model)

    rows = table.filter(pa.array(is_row)).drop_columns(list(STATE.values()))
    place = index_of(rows[INPUT_ID], inputs.ids)
    place[place < 0] = len(inputs.ids)
    w, second = _moments(a, b, prior_mean, model)
    prediction, std = np.empty(len(place)), np.empty(len(place))
    loss, offsets = LOSSES[model.loss], offsets_of(rows, model.artefact.effects)
    for first in range(0, len(place), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        user = row[is_row][part]
        of_h = belief(w[user], second[user], inputs.features.take(place[part]))
        of_h = added(of_h, part_of(offsets, part))
        prediction[part], std[part] = loss.response(*of_h), loss.deviation(*of_h, model.noise)
    return rows.append_column(PREDICTION, pa.array(prediction)).append_column(STD, pa.array(std))


def states_of(table: pa.Table, row: np.ndarray, n_users: int, model: Model) -> tuple[Array, Array, Array]:
    """a, b and prior means of the partition's users; without a state 0, 0 and what is known of them."""
    d = model.d
    a, b = np.zeros((n_users, gaussian.packed_length(d))), np.zeros((n_users, d))
    prior_mean = np.tile(model.prior_mean_of_unknown, (n_users, 1))
    fill(a, row, table[STATE[schema.A]])
    fill(b, row, table[STATE[schema.B]])
    fill_prior_means(prior_mean, row, table[STATE[schema.PRIOR_MEAN]], table[STATE[schema.A]].is_valid().to_numpy())
    return a, b, prior_mean


def _moments(a: Array, b: Array, prior_mean: Array, model: Model) -> tuple[Array, Array]:
    """Users' posterior means w, (n, d), and V + wwᵀ, packed.

    A user's are the same to the last bit whoever else is there, or no prediction could be rebuilt alone (mtl.explain).
    """
    w, second = np.empty_like(b), np.empty_like(a)
    for first in range(0, len(b), blocks.USERS_AT_ONCE):
        part = slice(first, first + blocks.USERS_AT_ONCE)
        n = len(b[part])
        # A few matrices would take another route, which rounds in another way.
        more = ((0, max(0, gaussian.FEW + 1 - n)), (0, 0))
        users = model.user_posteriors(*(np.pad(values[part], more) for values in (a, b, prior_mean)))
        mean = users.mean[:n]
        w[part], second[part] = mean, users.covariance[:n] + gaussian.outer(mean)
    return w, second


def _score_in_arrow(shared: Any) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        filled = [batch for batch in batches if batch.num_rows]
        if filled:
            yield from add_scores(pa.Table.from_batches(filled), *shared.value).combine_chunks().to_batches()

    return partition
