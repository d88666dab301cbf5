"""Inputs that training had no event of, learnt online: the same sums as a user's, on the input's side.

They came after it, or it knew their attributes alone. Such an input x begins as what the oracle makes of these,
c_x = (o, f_1 … f_k) ~ N(g(z), R). Its events are evidence of the form that training's half-step for inputs has (design,
section 3): A_x = Σ c E[w̃w̃ᵀ] and b_x = Σ c y E[w̃], with each user as known before the event. Everyone's predictions use the
posterior of c_x at once.

Users' own sums go on counting with the input as it began, for a sum must not change under the events that it already has:
users equal a from-scratch pass as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from mtl import alternation, blocks, features, gaussian, schema
from mtl.alternation import Extended
from mtl.arrow import lists, matrix
from mtl.contexts import offsets_of
from mtl.features import Features
from mtl.gaussian import Array
from mtl.losses import LOSSES, Loss
from mtl.model import Model
from mtl.schema import INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.score import STATE, states_of
from mtl.users import SharedInputs
from mtl.working import added, beliefs, left, like


def shared_inputs(rows: pa.Table, model: Model) -> SharedInputs:
    """All of the features table's rows of a version: what users' sums are made of, and what predictions are."""
    ids, current = rows[INPUT_ID].combine_chunks(), features.from_rows(rows, model.d)
    arrived = rows[schema.N_EVENTS].is_valid().to_numpy()
    learnt = np.flatnonzero(pc.fill_null(rows[schema.N_EVENTS], 0).to_numpy() > 0)
    if not len(learnt):
        return SharedInputs(ids, current, arrived)
    as_it_came = model.features_about(_oracle_mean(rows.take(learnt), model))
    return SharedInputs(ids, current.replaced(learnt, as_it_came), arrived, current)


def evidence(table: pa.Table, model: Model, inputs: SharedInputs) -> tuple[pa.Array, Array]:
    """What the events of a partition say of the inputs that training had no event of.

    Args:
        table: events and states of their users before them, as :func:`mtl.users.add_events` gets them.

    Returns:
        Input ids, and a row each of A_x (packed d(d+1)/2), b_x (d) and the number of events: sums, which add.
    """
    width = gaussian.packed_length(model.d) + model.d + 1
    is_event = table[INPUT_ID].is_valid()
    events = table.filter(is_event)
    place = blocks.index_of(events[INPUT_ID], inputs.ids)
    mine = np.zeros(len(events), bool) if inputs.arrived is None else inputs.arrived[place] & (place >= 0)
    if not mine.any():
        return pa.array([], pa.string()), np.empty((0, width))
    events, place = events.filter(pa.array(mine)), place[mine]
    others = table.filter(pc.and_(pc.invert(is_event), pc.is_in(table[USER_ID], pc.unique(events[USER_ID]))))
    together = pa.concat_tables([events, others])
    together = together.rename_columns([STATE.get(name, name) for name in together.column_names])
    codes = together[USER_ID].combine_chunks().dictionary_encode()
    row, n_users = codes.indices.to_numpy(), len(codes.dictionary)
    users = model.user_posteriors(*states_of(together, row, n_users, model))

    which, column = np.unique(place, return_inverse=True)
    label, weight = events[LABEL].to_numpy(), events[WEIGHT].to_numpy()
    pairs = row[: len(events)], column, label, weight, n_users, len(which)
    weights, labels, offsets = blocks.entries(*pairs, offsets_of(events, model.artefact.effects))
    loss = LOSSES[model.loss]
    if not loss.is_quadratic:
        believed = added(beliefs(weights, users, inputs.current.take(which)), offsets)
        if not loss.is_bounded:
            believed = believed[0] + _towards(weights, labels, believed, loss), believed[1]
        precision, information = loss.working(*believed, weights.data, labels.data)
        weights, labels = like(weights, precision), like(weights, information)
    labels = left(weights, labels, offsets)
    a, b = alternation.input_evidence(alternation.input_sums(weights, labels, Extended.of(users)), model.mu)
    return inputs.ids.take(pa.array(which)), np.column_stack([a, b, np.bincount(column, minlength=len(which))])


def _towards(weights: sp.csr_matrix, labels: sp.csr_matrix, believed: tuple[Array, Array], loss: Loss) -> Array:
    """How far to move every entry's mean, so that Newton's one step begins near where an input's events say: (entries,).

    All of an input's by log((1 + Σ cy) / (1 + Σ c·rate)). From a mean that is units too small the step, which is taken once
    and for all, would end at many times the rate that was seen.
    """
    n = weights.shape[1]
    rate, _ = loss.working(*believed, weights.data, labels.data)
    told, expected = (np.bincount(weights.indices, values, n) for values in (labels.data, rate))
    return np.log((1 + told) / (1 + expected))[weights.indices]


def learn(rows: pa.Table, evidence: Array, model: Model) -> pa.Table:
    """Rows of the features table with what events said of their inputs.

    Args:
        rows: of inputs that training had no event of.
        evidence: of each, as :func:`evidence` has it, (n, ·).
    """
    d = model.d
    a, b, n = np.split(evidence, [gaussian.packed_length(d), gaussian.packed_length(d) + d], axis=1)
    a = a + matrix(rows[schema.A], a.shape[1])
    b = b + matrix(rows[schema.B], d)
    oracle = _oracle_mean(rows, model)
    inputs = model.artefact.inputs.conditional(a, b, oracle, model.noise)
    learnt = Features.of(inputs.mean, inputs.covariance, model.mu)
    counts = rows[schema.N_EVENTS].to_numpy() + n[:, 0].astype(np.int64)
    changed = features.columns_of(learnt) | {
        schema.RESIDUAL: lists(inputs.mean - oracle),
        schema.A: lists(a),
        schema.B: lists(b),
        schema.N_EVENTS: pa.array(counts),
    }
    return _with(rows, changed)


def unlearnt(rows: pa.Table, model: Model) -> pa.Table:
    """Rows of the features table as they began: what events said of their inputs is forgotten."""
    n, d = len(rows), model.d
    began = features.columns_of(model.features_about(_oracle_mean(rows, model))) | {
        schema.RESIDUAL: lists(np.zeros((n, d))),
        schema.A: lists(np.zeros((n, gaussian.packed_length(d)))),
        schema.B: lists(np.zeros((n, d))),
        schema.N_EVENTS: pa.array(np.zeros(n, np.int64)),
    }
    return _with(rows, began)


def renewed(inputs: SharedInputs, rows: pa.Table, model: Model) -> SharedInputs:
    """``inputs`` with the predictions of these rows; sums of users go on as they were."""
    place = blocks.index_of(rows[INPUT_ID], inputs.ids)
    return replace(inputs, learnt=inputs.current.replaced(place, features.from_rows(rows, model.d)))


def _with(rows: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows


def _oracle_mean(rows: pa.Table, model: Model) -> Array:
    """g(z): (o − μ, f_1 … f_k) less what was learnt, (n, d)."""
    mean = matrix(rows[schema.PHI], model.d).copy()
    mean[:, 0] = rows[schema.OFFSET].to_numpy() - model.mu
    return mean - features.residuals(rows, model.d)
