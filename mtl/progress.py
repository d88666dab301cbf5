"""Progressive validation: what a micro-batch's events cost when they are predicted by what was known before them.

Test, then train: every event is a test event first, so the loss over a stream is an honest estimate without a held-out
set (Dawid 1984, the prequential principle). By the number of events that the user had before, it is the cold-start curve.
Beside it the same events are predicted as for the average user, from the mean of all users alone, and by a ridge of mean
zero on the user's own events: what the learnt prior mean and the own events are worth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtl import schema
from mtl.arrow import lists, matrix
from mtl.blocks import index_of
from mtl.gaussian import Array
from mtl.model import Model
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.score import PREDICTION, STATE, STD, add_scores
from mtl.users import SharedInputs

SEEN = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # a bin of users by their number of events begins at each
# Events that are predicted of a partition, or of a batch that is added in the job; of more, an even sample.
AT_MOST = 16_384
_Z90 = 1.6448536269514722  # a standard normal variable lies within ± this with probability 0.9


@dataclass(frozen=True)
class Progress:
    """Sums over predicted events, by :data:`SEEN` bin of their users, (bins,) each, but the last two."""

    n: Array
    loss: Array  # squared error, log loss (nats) or Poisson deviance
    absolute: Array  # |label − prediction|, label units
    standardized: Array  # ((label − prediction) / std)²: 1 on average where the model is right about its uncertainty
    covered: Array  # labels within prediction ± 1.64 std: 0.9 of them where labels are Gaussian
    prediction: Array
    label: Array
    average: Array  # loss of the same events as the average user would have them predicted, who has no events
    ridge: Array  # and of users with the events they had, about a prior of mean zero
    phi: Array  # φ of the events' inputs, (d,)
    phi_squares: Array  # φ², (d,)

    @classmethod
    def nothing(cls, d: int) -> Progress:
        return cls.unpack(np.zeros((len(fields(cls)) - 2) * len(SEEN) + 2 * d))

    @classmethod
    def unpack(cls, values: Array) -> Progress:
        n_binned = len(fields(cls)) - 2
        binned, phi = np.split(np.asarray(values), [n_binned * len(SEEN)])
        return cls(*binned.reshape(n_binned, -1), *phi.reshape(2, -1))

    def pack(self) -> Array:
        return np.concatenate(list(vars(self).values()))

    def __add__(self, other: Progress) -> Progress:
        return Progress(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


def measure(table: pa.Table, model: Model, inputs: SharedInputs) -> Progress:
    """The events of ``table`` predicted from its states, as :func:`mtl.users.add_events` gets them.

    At most :data:`AT_MOST` of them, spread evenly over the table.
    """
    is_event = table[INPUT_ID].is_valid()
    place = np.flatnonzero(is_event)
    if len(place) > AT_MOST:
        place = place[np.linspace(0, len(place) - 1, AT_MOST).astype(np.int64)]
    if not len(place):
        return Progress.nothing(model.d)
    events = table.take(place)
    others = table.filter(pc.and_(pc.invert(is_event), pc.is_in(table[USER_ID], pc.unique(events[USER_ID]))))
    scored = _scored(events, others, model, inputs)
    # One user without a state stands for the average one.
    one_user = events.set_column(events.column_names.index(USER_ID), USER_ID, pa.repeat("", len(events)))
    of_average = _scored(one_user, others.slice(0, 0), model, inputs)
    of_ridge = _scored(events, _about_zero(events, others, model), model, inputs)
    states = others.filter(others[schema.A].is_valid())
    place = index_of(scored[USER_ID], states[USER_ID].combine_chunks())
    n_before = np.append(states[schema.N_EVENTS].to_numpy(), 0)[place]  # −1 takes the 0 at the end
    prediction, average, ridge = (
        np.clip(table[PREDICTION].to_numpy(), *model.prediction_range) for table in (scored, of_average, of_ridge)
    )
    phi = inputs.current.phi[index_of(scored[INPUT_ID], inputs.ids)]
    label, std = scored[LABEL].to_numpy(), scored[STD].to_numpy()
    if model.loss == "logistic":
        std = np.sqrt(prediction * (1 - prediction))  # of what is clipped, too
    bins = np.searchsorted(SEEN, n_before, side="right") - 1
    distance = np.abs(label - prediction)

    def by_bin(values: Array) -> Array:
        return np.bincount(bins, values, len(SEEN)).astype(float)

    loss = model.loss
    return Progress(
        n=by_bin(np.ones(len(label))),
        loss=by_bin(cost(loss, prediction, label)),
        absolute=by_bin(distance),
        standardized=by_bin((distance / std) ** 2),
        covered=by_bin((distance <= _Z90 * std).astype(float)),
        prediction=by_bin(prediction),
        label=by_bin(label),
        average=by_bin(cost(loss, average, label)),
        ridge=by_bin(cost(loss, ridge, label)),
        phi=phi.sum(0),
        phi_squares=(phi**2).sum(0),
    )


def _scored(events: pa.Table, others: pa.Table, model: Model, inputs: SharedInputs) -> pa.Table:
    """The events with predictions, from these states and prior means of their users."""
    together = pa.concat_tables([events, others], promote_options="default")
    together = together.rename_columns([STATE.get(name, name) for name in together.column_names])
    return add_scores(together, model, SharedInputs(inputs.ids, inputs.current))


def _about_zero(events: pa.Table, others: pa.Table, model: Model) -> pa.Table:
    """The same states about prior means of zero in what is learnt of users, for users without one too."""
    learnt = model.form.users.learnt
    unknown = model.prior_mean_of_unknown.copy()
    unknown[learnt] = 0.0
    users = pc.unique(events[USER_ID])
    columns = {USER_ID: users, schema.PRIOR_MEAN: lists(np.tile(unknown, (len(users), 1)))}
    if len(others):
        mean = matrix(others[schema.PRIOR_MEAN], model.d).copy()
        mean[:, learnt] = 0.0
        others = others.set_column(others.column_names.index(schema.PRIOR_MEAN), schema.PRIOR_MEAN, lists(mean))
    # Of a user's rows without a state the last one has the last word.
    return pa.concat_tables([pa.table(columns), others], promote_options="default")


def cost(loss: str, prediction: Array, label: Array) -> Array:
    """What is minimized, of each event, (n,): squared error, log loss (nats), Poisson deviance."""
    if loss == "logistic":
        return -np.log(np.where(label > 0, prediction, 1 - prediction))
    if loss == "poisson":
        ratio = np.where(label > 0, label, 1.0) / prediction
        return 2 * (np.where(label > 0, label * np.log(ratio), 0.0) - label + prediction)
    return (label - prediction) ** 2


def row_of(progress: Progress) -> dict[str, Any]:
    """The columns of the progress table that are measured: totals, and by bin what the cold-start curve needs."""
    return {
        schema.VALIDATED: int(progress.n.sum()),
        **{name: float(getattr(progress, name).sum()) for name in MEASURED},
        schema.SEEN_N: progress.n.tolist(),
        schema.SEEN_LOSS: progress.loss.tolist(),
        schema.SEEN_AVERAGE: progress.average.tolist(),
        schema.SEEN_RIDGE: progress.ridge.tolist(),
        schema.PHI_SUM: progress.phi.tolist(),
        schema.PHI_SQUARES: progress.phi_squares.tolist(),
    }


MEASURED = (
    schema.LOSS,
    schema.ABSOLUTE,
    schema.STANDARDIZED,
    schema.COVERED,
    schema.PREDICTION_SUM,
    schema.LABEL_SUM,
)
