"""What a worker answers from: one model version, the features of its inputs, and users with what was observed of them.

A view is of one version throughout; :func:`open_view` makes the next one when the store shows another. Features of the inputs
of a request are gathered here and scored (:meth:`View.gather`, :meth:`View.score`); those of inputs that have none are evaluated
by the :class:`mtl.serving.evaluator.Evaluator`, and what is believed of them then is :meth:`View.believe`'s to say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import lmdb
import numpy as np

from mtl import blocks, gaussian
from mtl.config import ServeSettings
from mtl.effects import Offsets, of_one
from mtl.errors import InputError
from mtl.features import Features
from mtl.forms import partly_given
from mtl.gaussian import Array
from mtl.losses import LOSSES, Loss
from mtl.model import Model, model_of
from mtl.prior import Prior
from mtl.serving import scorer
from mtl.serving.evaluator import Beliefs, EncodingError, Evaluator, frame_of
from mtl.serving.overlay import Overlay, Pending, is_covered
from mtl.serving.records import cycle_of, digest, is_described_only, pack_user, prefix, unpack_user, unpack_users
from mtl.serving.scorer import Several, Weights
from mtl.serving.store import Live, Store, read_features
from mtl.working import settle

Attributes = Mapping[str, Any]

_SAMPLE = 2000  # inputs from which it is told what inputs are like
_INDEX_LIMIT = 1_000_000  # ids of inputs whose row is remembered
_UNKNOWN_SECONDS = 1.0  # that a version which is new here is waited for


class Inputs(NamedTuple):
    """Features of the inputs of one request."""

    rows: Array  # (n, width)
    known: list[bool]  # whether each is an input with features or attributes


class InTime(NamedTuple):
    """Features of the inputs of one request as far as time allowed."""

    rows: Array  # (n, width)
    known: list[bool]
    incomplete: list[int]  # places of inputs of which not all functions were reached


class Found(NamedTuple):
    """What is believed of h of the inputs of one request."""

    mean: Array  # (n,)
    variance: Array
    known: list[bool]
    incomplete: list[int]  # places of inputs of which not all functions were reached
    bound: Array | None = None  # (n,), in units of predictions; None: nothing is coarse


@dataclass
class View:
    """One model version as the store shows it."""

    live: Live
    model: Model
    store: Store
    overlay: Overlay
    evaluator: Evaluator = field(repr=False)
    users_cached: int
    rows: Array = field(repr=False)  # features of all inputs, (n, width)
    top: Array = field(repr=False)  # (d, n)
    _index: dict[str | int, bytes] = field(default_factory=dict, repr=False)  # int64, as NumPy reads it
    # Bits: mtl.serving.ranking.
    lacking: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict, repr=False)
    _observed: dict[str, tuple[Any, Weights]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.d, self.version = self.model.d, self.model.version
        self.loss: Loss = LOSSES[self.model.loss]
        self._prefix, self.generation = prefix(self.version), prefix(self.live.generation)

    # Inputs.

    def places(self, inputs: Sequence[Any]) -> bytes | None:
        """Rows with the features of inputs, by their ids, as bytes of int64; None where one of them has none yet."""
        index = self._index
        try:
            return b"".join(map(index.__getitem__, inputs))
        except (KeyError, TypeError):  # one that was not asked for before, or attributes
            pass
        found = []
        with self.store.reading() as transaction:
            for given in inputs:
                place = None if isinstance(given, dict) else self._place_of(given, transaction)
                if place is None:
                    return None
                found.append(place)
        return b"".join(found)

    def gather(self, inputs: Sequence[Any]) -> Array | None:
        """Features of inputs by their ids, (n, width); None where one of them has none yet."""
        places = self.places(inputs)
        return None if places is None else self.rows.take(np.frombuffer(places, np.int64), 0)

    def rows_of(self, inputs: Sequence[str | Attributes]) -> Inputs:
        """Features of inputs, given by ids or by attributes, computed where there are none, however long it takes.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        found, described = self.at_hand(inputs)
        if described:
            found.rows[list(described)] = self.evaluator.complete(list(described.values()))
        return found

    def at_hand(self, inputs: Sequence[str | Attributes]) -> tuple[Inputs, dict[int, Attributes]]:
        """Rows, those to be computed left open, and the attributes by place to compute them from."""
        rows, known = np.empty((len(inputs), scorer.width(self.d))), [True] * len(inputs)
        described: dict[int, Attributes] = {}
        with self.store.reading() as transaction:
            for i, given in enumerate(inputs):
                if not isinstance(given, str):
                    described[i] = given
                elif (row := self.row_of(given, transaction)) is not None:
                    rows[i] = self.rows[row]
                elif (attributes := self.store.attributes(transaction, given)) is not None:
                    described[i] = attributes
                else:
                    rows[i], known[i] = self.unknown_input, False
        return Inputs(rows, known), described

    def row_of(self, identity: str, transaction: lmdb.Transaction) -> int | None:
        """Where an input's features are; None where it has none."""
        place = self._place_of(identity, transaction)
        return None if place is None else int.from_bytes(place, sys.byteorder)

    def _place_of(self, identity: str | int, transaction: lmdb.Transaction) -> bytes | None:
        place = self._index.get(identity)
        if place is None:
            row = self.store.input_row(transaction, self.generation, digest(str(identity)))
            if row is None or row >= len(self.rows):
                return None
            if len(self._index) >= _INDEX_LIMIT:
                self._index.clear()
            place = self._index[identity] = row.to_bytes(8, sys.byteorder)
        return place

    def sample(self) -> list[Attributes]:
        """Attributes of some of the inputs."""
        ids = self.ids(_spread(len(self.rows)))
        with self.store.reading() as transaction:
            found = [self.store.attributes(transaction, one) for one in ids]
        return [attributes for attributes in found if attributes]

    @property
    def unknown_input(self) -> Array:
        """Features of an input of which nothing is known, (width,)."""
        return self.evaluator.unknown

    # Users.

    def weights_of(self, user: str, attributes: Attributes | None = None) -> Weights | None:
        """What is believed of a user now, observations included; None where nothing is known of the user.

        Args:
            attributes: of a user of whom the tables know nothing: what the observations are added to.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        key = digest(user)
        # In this order: see mtl.serving.overlay.
        with self.overlay.reading() as observed, self.store.reading() as stored:
            revision = self.overlay.revision(observed, key)
            record = self.store.user(stored, self._prefix, key)
            if revision is not None:
                before = self.weights_of_described(attributes) if attributes and record is None else None
                return self._with_observations(user, key, revision, record, observed, before)
            return None if record is None else self._weights_in(record)

    def weights_of_several(self, users: Sequence[str | Weights]) -> tuple[Several, list[bool]]:
        """The same of m users at once, and of whom anything is known; what is known already stays as it is."""
        records: list[bytes | memoryview] = []
        is_known, offsets = [True] * len(users), [0.0] * len(users)
        with self.overlay.reading() as observed, self.store.reading() as stored:
            for i, user in enumerate(users):
                if isinstance(user, str):
                    key = digest(user)
                    record = self.store.user(stored, self._prefix, key)
                    has_all = self.overlay.revision(observed, key) is None  # that was observed
                    if has_all and record is not None and not is_described_only(record, self.d):
                        records.append(record)
                        continue
                    found = self.weights_of(user)
                    is_known[i] = found is not None
                    user = found or self.unknown_weights
                offsets[i] = user.offset
                records.append(pack_user(user.n_events, user.mean, user.quadratic))
            mean, quadratic = unpack_users(records, self.d)
        return Several(mean, quadratic, np.array(offsets)[:, None] if any(offsets) else None), is_known

    def _weights_in(self, record: memoryview) -> Weights:
        # The store's pages are its own again when the transaction ends.
        n_events, mean, quadratic = unpack_user(bytes(record), self.d)
        return Weights(mean, quadratic, n_events) if len(quadratic) else self._without_events(mean)

    def _with_observations(
        self,
        user: str,
        key: bytes,
        revision: bytes,
        record: Any,
        observed: lmdb.Transaction,
        described: Weights | None,
    ) -> Weights:
        """The user's row and what was observed since, kept until either changes; or that beside what a request describes."""
        state = (revision, None if record is None else cycle_of(record))
        kept = self._observed.get(user)
        if kept is not None and kept[0] == state and described is None:
            return kept[1]
        before = described or (self.unknown_weights if record is None else self._weights_in(record))
        pending = [p for p in self.overlay.pending(observed, key) if not is_covered(p, self.version, record)]
        weights = self._after(before, pending) if pending else before
        # Else one waits for its input, which may come any time.
        if described is None and weights.n_events == before.n_events + len(pending):
            if len(self._observed) >= self.users_cached:
                self._observed.clear()
            self._observed[user] = state, weights
        return weights

    def weights_of_described(self, attributes: Attributes) -> Weights:
        """What is believed of a user of whom only attributes are known.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        return self._without_events(self._mean_of_new(attributes))

    @cached_property
    def unknown_weights(self) -> Weights:
        return self._without_events(self._mean_of_new({}))

    @cached_property
    def prior_covariance(self) -> Array:
        """Of a user without events, packed."""
        nothing = np.zeros((1, gaussian.packed_length(self.d))), np.zeros((1, self.d))
        return self.model.user_posteriors(*nothing, np.zeros((1, self.d))).covariance

    def _without_events(self, mean: Array) -> Weights:
        return Weights(mean, scorer.quadratics(mean[None], self.prior_covariance)[0], 0)

    def _mean_of_new(self, attributes: Attributes) -> Array:
        """The mean of the weights (d,) of a user without events."""
        try:
            return self.model.weights_without_events(self.model.prior_mean_of_new(frame_of([attributes])))[0]
        except (InputError, TypeError, ValueError) as error:
            raise EncodingError(str(error)) from error

    def _after(self, before: Weights, pending: Sequence[Pending]) -> Weights:
        """The posterior after more events: what was believed before them is the prior."""
        features, events = self._with_features(pending)
        if not events:
            return before
        d, n = self.d, len(events)
        given = self.model.form.users
        covariance = gaussian.unpack(scorer.covariance_of(before)[None], d)[0][np.ix_(given.learnt, given.learnt)]
        prior = partly_given(Prior(np.empty((0, 0)), covariance, np.empty((0, 0))), given)
        posteriors = partial(prior.conditional, mean=before.mean[None], noise=self.model.noise)
        label, weight = (np.array([getattr(e.event, name) for e in events]) for name in ("label", "weight"))
        weights, labels = blocks.csr(np.zeros(n, np.int64), np.arange(n), label, weight, 1, n)
        nothing = np.zeros((1, gaussian.packed_length(d))), np.zeros((1, d))
        effects = self.model.artefact.effects
        rest = np.array([of_one(e.event.offset, e.event.context, effects) for e in events])
        after = posteriors(*settle(weights, labels, features, posteriors, self.loss, nothing, Offsets(*rest.T)))
        quadratic = scorer.quadratics(after.mean, after.covariance)[0]
        return Weights(after.mean[0], quadratic, before.n_events + n)

    def _with_features(self, pending: Sequence[Pending]) -> tuple[Features, list[Pending]]:
        """The observations of inputs whose features are at hand. The others wait: for features to be evaluated from
        attributes, which a request for the user must not wait for; or, as in the update stream, for attributes."""
        found, described = self.at_hand([p.event.input_id for p in pending])
        known, places = np.array(found.known), list(described)
        if places:
            found.rows[places], known[places] = self.evaluator.observed(list(described.values()))
        return scorer.features_of(found.rows[known], self.d), [
            p for p, is_known in zip(pending, known, strict=True) if is_known
        ]

    # Scores.

    def score(self, user: Weights | Several, rows: Array) -> tuple[Array, Array]:
        """Prediction and standard deviation of a label for every row of features, (n,) each; of m users (m, n)."""
        return scorer.score(rows, user, self.loss, self.model.noise)

    def respond(self, mean: Array, variance: Array) -> tuple[Array, Array]:
        """Prediction and standard deviation of a label by what is believed of h, (n,) each."""
        return self.loss.response(mean, variance), self.loss.deviation(mean, variance, self.model.noise)

    def believe(self, inputs: Sequence[str | Attributes], user: Weights, deadline: float, coarseness: int) -> Found:
        """What is believed by a deadline, on the clock of ``time.monotonic``.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        found, described = self.at_hand(inputs)
        places = np.array(list(described), np.int64)
        found.rows[places] = 0.0
        mean, variance = scorer.belief(found.rows, user)
        if not described:
            return Found(mean, variance, found.known, [])
        of = self.evaluator.beliefs(list(described.values()), user, deadline, coarseness)
        mean[places], variance[places] = of.mean, of.variance
        bound = None
        if of.members is not None:
            bound = np.zeros(len(inputs))
            bound[places] = np.where(of.complete, self._furthest(of), np.inf)
        return Found(mean, variance, found.known, places[~of.complete].tolist(), bound)

    def _furthest(self, of: Beliefs) -> Array:
        """How far the prediction of a measured member of each input's class can be from the input's, (n,)."""
        assert of.members is not None
        score = self.loss.response(of.mean, of.variance)
        h, spread = of.members
        unknown = np.isinf(h[1])  # where any mean is possible the variance does not matter
        corners = [self.loss.response(m, np.where(unknown, of.variance, v)) for m in h for v in spread]
        return np.max(np.abs(np.array(corners) - score), axis=0)

    def rows_by(self, inputs: Sequence[str | Attributes], user: Weights, deadline: float, coarseness: int) -> InTime:
        """Features by a deadline, in the order of what they are worth for a user.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        found, described = self.at_hand(inputs)
        if not described:
            return InTime(*found, [])
        places = np.array(list(described), np.int64)
        of = self.evaluator.rows(list(described.values()), user, deadline, coarseness)
        found.rows[places] = of.rows
        return InTime(*found, places[~of.complete].tolist())

    def rows_at_hand(self, inputs: Sequence[str | Attributes]) -> InTime:
        """Features where none can be computed."""
        found, described = self.at_hand(inputs)
        places = np.array(list(described), np.int64)
        found.rows[places], complete = self.evaluator.at_hand(list(described.values()))
        return InTime(*found, places[~complete].tolist())

    def best(self, user: Weights, k: int, excluded: np.ndarray | None = None) -> np.ndarray:
        """Rows of the inputs of the k largest E[h], the best first; ``excluded`` (rows) left out."""
        scores = scorer.linear_scores(self.top, user)
        if excluded is not None:
            scores[excluded] = -np.inf
        return scorer.largest(scores, k)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        with self.store.reading() as transaction:
            return self.store.input_ids(transaction, self.generation, rows)

    @property
    def basis(self) -> list[str]:
        """A name for each entry of w: the intercept, learnt functions, and attributes with their encoded columns."""
        form = self.model.form
        learnt = [f"f{i + 1}" for i in range(form.k)]
        inputs = [f"input_attribute_{column}" for column in form.input_columns]
        return ["intercept", *learnt, *inputs, *(f"user_attribute_{column}" for column in form.user_columns)]


def open_view(store: Store, overlay: Overlay, settings: ServeSettings, before: View | None = None) -> View | None:
    """The view that the store shows now: ``before`` itself where it still is; None where there is none yet."""
    with store.reading() as transaction:
        live = store.live(transaction)
        if live is None:
            return None
        if before is not None and before.live == live:
            return before
        row = store.model_row(transaction, live.model_version)
    rows, top = read_features(store.folder, live, scorer.width(live.d))
    if before is not None and before.version == live.model_version:
        evaluator = before.evaluator
    else:
        assert row is not None
        evaluator = Evaluator(model_of(row), settings, rows[_spread(len(rows))])
        evaluator.evaluate_unknown(_UNKNOWN_SECONDS)
    view = View(live, evaluator.model, store, overlay, evaluator, settings.users_cached, rows, top)
    view.unknown_weights  # noqa: B018  what the first request would wait for
    return view


def _spread(n: int) -> np.ndarray:
    """Places of a sample of n rows."""
    return np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64)) if n else np.empty(0, np.int64)
