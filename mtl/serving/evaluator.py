"""Features of inputs that are given by attributes: from the cache, by the model's functions, or as far as time allowed.

One evaluator belongs to one model version and lives as long. A request's inputs have keys: of their attributes as they came,
or of a class of encoded attributes where the answer may be coarse (:mod:`mtl.serving.classes`). What the caches do not hold is
evaluated once a key, in lanes (:mod:`mtl.serving.executor`), and functions that were not reached are replaced by their
conditional mean (:mod:`mtl.serving.anytime`). Only complete features enter a cache.

Inputs that were observed before they have features are evaluated apart, in full and by no deadline, in a lane of their own
(:meth:`Evaluator.observed`).

What the population of inputs is like, and how far apart the members of a class are, is *studied* from inputs that are known
already, in a thread of its own after the start. Until then nothing is coarse, and the population is that of stored features.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mtl import gaussian
from mtl.config import ServeSettings
from mtl.errors import InputError
from mtl.features import Features
from mtl.gaussian import Array
from mtl.model import Model
from mtl.serving import classes, scorer
from mtl.serving.anytime import Population, Step, order
from mtl.serving.cache import Counts, PredictionCache, RowCache
from mtl.serving.classes import ClassFunction, Extents
from mtl.serving.executor import Lane, LaneCounts, evaluate
from mtl.serving.functions import plan_of
from mtl.serving.scorer import Weights

log = logging.getLogger("mtl")

Attributes = Mapping[str, Any]

_PLENTY = 5.0  # times the expected cost: with that much time all is reached in any order, and none need be made
_STUDY_SECONDS = 10.0  # that a study takes at most, but for one part of it
_STUDY_PART = 200  # inputs that are evaluated at once
_ENCODE = (Step("encode", ()),)
_OBSERVED_BYTES = 16 << 20  # of features of inputs that were observed
_HUNG_SECONDS = 10.0  # of an evaluation that nobody waits for
_ASK_AGAIN_SECONDS = 60.0  # for an input whose evaluation failed, or is still on its way
_MOST_ASKED = 100_000  # inputs of which it is remembered when they were asked for


class EncodingError(ValueError):
    """Attributes that the model cannot take; the message says why."""


class Evaluated(NamedTuple):
    """Features of n inputs."""

    rows: Array  # (n, width)
    complete: np.ndarray  # (n,) bool: whether all functions were reached
    keys: list[bytes] | None  # of their classes; None where they could not be told in time


class Members(NamedTuple):
    """Between what h of the measured members of n inputs' classes lies, (n,) each; infinite where none was measured."""

    mean: tuple[Array, Array]
    variance: tuple[Array, Array]


class Beliefs(NamedTuple):
    """h of n inputs for one user."""

    mean: Array  # (n,)
    variance: Array
    complete: np.ndarray  # (n,) bool
    members: Members | None  # None: nothing is coarse


@dataclass(frozen=True)
class Studied:
    """What was learnt of the inputs there are."""

    population: Population
    classes: tuple[ClassFunction, ...]  # by coarseness − 1
    extents: tuple[Extents, ...]  # of each
    one: Array  # features of any input that was evaluated in full, (1, width)

    def members(self, coarseness: int, keys: Sequence[bytes], user: Weights) -> Members:
        extents, d = self.extents[coarseness - 1], len(user.mean)
        covariance = gaussian.unpack(scorer.covariance_of(user)[None], d)[0]
        phi = self.one[0, :d]
        common = scorer.belief(self.one, user)[1] - phi @ covariance @ phi  # of the variance, to all inputs
        least, most = extents.range(keys, user.mean)
        low, high = extents.spread(keys, covariance)
        return Members((least + user.offset, most + user.offset), (np.maximum(common + low, 0.0), common + high))


class Evaluator:
    """The functions of one model version and what is remembered of them; safe to share between threads."""

    def __init__(self, model: Model, settings: ServeSettings, stored: Array | None = None):
        """
        Args:
            stored: features of known inputs (n, width), from which the population is guessed before it is studied.
        """
        self.model, self.settings = model, settings
        self.plan = plan_of(model)
        self.lanes = [Lane(step.name, of) for step, of in zip(self.plan.steps, self.plan.functions, strict=True)]
        self.encoding = [Lane("encode", lambda attributes, needed: _tried(model, attributes))]
        features, predictions = (int(mb * 2**20) for mb in (settings.feature_cache_mb, settings.prediction_cache_mb))
        self.features = RowCache(scorer.width(model.d), features) if features else None
        self.predictions = PredictionCache(predictions) if predictions else None
        # Apart from the features' cache: an observation that counted goes on to.
        self._observed = observed = RowCache(scorer.width(model.d), _OBSERVED_BYTES)
        self._apart = Lane(
            "observed", lambda one, needed: _evaluate_into(observed, model, *one), hung_after=_HUNG_SECONDS
        )
        self._asked: dict[bytes, float] = {}  # when each observed input may be asked for again
        self.studied: Studied | None = None
        self._guess = _guessed(model, self.plan.m, stored)
        self._unknown: Array | None = None
        # Lanes' threads know nothing of the evaluator, and so end with it.
        weakref.finalize(self, _close, [*self.lanes, *self.encoding, self._apart])

    # What a request asks.

    def beliefs(self, attributes: Sequence[Attributes], user: Weights, deadline: float, coarseness: int) -> Beliefs:
        """What is believed of h by the deadline (on the clock of ``time.monotonic``).

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        n, cache, studied = len(attributes), self.predictions, self.studied
        coarseness = coarseness if studied else 0
        encoded, keys = self._keys(attributes, deadline, coarseness)
        mean, variance, complete = np.empty(n), np.empty(n), np.ones(n, bool)
        todo = np.ones(n, bool)
        state = hash((user.mean.tobytes(), user.quadratic.tobytes(), user.offset))
        if cache is not None and keys is not None:
            found, held = cache.get("", state, keys)
            mean[held], variance[held] = found.T
            todo = ~held
        if todo.any():
            places = np.flatnonzero(todo).tolist()
            of = [keys[i] for i in places] if keys is not None else None
            some = self._rows(
                [attributes[i] for i in places], None if encoded is None else encoded[places], of, user, deadline
            )
            mean[places], variance[places] = scorer.belief(some.rows, user)
            complete[places] = some.complete
            if cache is not None and keys is not None and some.complete.any():
                good = [place for place, is_complete in zip(places, some.complete, strict=True) if is_complete]
                cache.put("", state, [keys[i] for i in good], mean[good], variance[good])
        members = None
        if studied is not None and coarseness and keys is not None:
            members = studied.members(coarseness, keys, user)
        return Beliefs(mean, variance, complete, members)

    def rows(self, attributes: Sequence[Attributes], user: Weights, deadline: float, coarseness: int = 0) -> Evaluated:
        """Features by the deadline.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        encoded, keys = self._keys(attributes, deadline, coarseness if self.studied else 0)
        return self._rows(attributes, encoded, keys, user, deadline)

    def complete(self, attributes: Sequence[Attributes]) -> Array:
        """Features (n, width), however long it takes.

        Raises:
            EncodingError: attributes that the model's encodings cannot take.
        """
        keys = [classes.of_attributes(one) for one in attributes]
        rows, held = self._cached(keys)
        missing = np.flatnonzero(~held).tolist()
        if missing:
            rows[missing] = _whole(self.model, [attributes[i] for i in missing])
            self._keep([keys[i] for i in missing], rows[missing])
        return rows

    def at_hand(self, attributes: Sequence[Attributes]) -> tuple[Array, np.ndarray]:
        """Features (n, width) where nothing can be evaluated, and which of them are complete all the same, (n,) bool."""
        rows, held = self._cached([classes.of_attributes(one) for one in attributes])
        rows[~held] = self.unreached(1)
        return rows, held

    def observed(self, attributes: Sequence[Attributes]) -> tuple[Array, np.ndarray]:
        """Features of inputs that were observed, (n, width), and which are at hand, (n,) bool.

        It evaluates none here: those that are not at hand are queued, each once, to be there at a later time.
        """
        keys = [classes.of_attributes(one) for one in attributes]
        rows, held = self._cached(keys)
        kept, is_kept = self._observed.get(keys)
        rows[is_kept] = kept
        new = np.flatnonzero(held & ~is_kept).tolist()
        self._observed.put([keys[i] for i in new], rows[new])
        held |= is_kept
        for i in np.flatnonzero(~held).tolist():
            self._ask(keys[i], attributes[i])
        return rows, held

    def _ask(self, key: bytes, attributes: Attributes) -> None:
        now = time.monotonic()
        if now >= self._asked.get(key, now) and self._apart.queue((key, attributes)):
            if len(self._asked) >= _MOST_ASKED:
                self._asked.clear()
            self._asked[key] = now + _ASK_AGAIN_SECONDS

    @property
    def unknown(self) -> Array:
        """Features of an input of which nothing is known, (width,): those of the average one until they are evaluated, and where
        they cannot be."""
        return self.unreached(1)[0] if self._unknown is None else self._unknown

    def evaluate_unknown(self, seconds: float) -> None:
        """Evaluate the features of an input of which nothing is known; wait so long for functions that may be slow, or hang."""
        thread = threading.Thread(target=self._evaluate_unknown, name="unknown", daemon=True)
        thread.start()
        thread.join(seconds)

    def _evaluate_unknown(self) -> None:
        try:
            self._unknown = _whole(self.model, [{}])[0]
        except Exception as error:
            log.warning("serve: inputs without features are taken for the average one, for %s", error)

    def unreached(self, n: int) -> Array:
        """Features of inputs of which nothing was evaluated, (n, width)."""
        return scorer.feature_rows(self._population.of(n).features(self.model.mu))

    # How it is done.

    def _keys(
        self, attributes: Sequence[Attributes], deadline: float, coarseness: int
    ) -> tuple[Array | None, list[bytes] | None]:
        """Encodings where keys need them, and keys where they could be told in time."""
        if not coarseness or self.studied is None:
            return None, [classes.of_attributes(one) for one in attributes]
        encoded = self._encoded_by(attributes, deadline)
        return encoded, None if encoded is None else self.studied.classes[coarseness - 1](encoded)

    def _rows(
        self,
        attributes: Sequence[Attributes],
        encoded: Array | None,
        keys: list[bytes] | None,
        user: Weights,
        deadline: float,
    ) -> Evaluated:
        n = len(attributes)
        if keys is None:
            return Evaluated(self.unreached(n), np.zeros(n, bool), None)
        rows, held = self._cached(keys)
        # One of each key is evaluated, and stands for the others.
        first = {keys[i]: i for i in reversed(np.flatnonzero(~held).tolist())}
        if not first:
            return Evaluated(rows, held, keys)
        places = list(first.values())
        encoded = self._encoded_by([attributes[i] for i in places], deadline) if encoded is None else encoded[places]
        if encoded is None:
            new, is_complete = self.unreached(len(places)), False
        else:
            new, is_complete = self._evaluated(encoded, user, deadline)
        if is_complete:
            self._keep(list(first), new)
        at = {key: i for i, key in enumerate(first)}
        missing = np.flatnonzero(~held).tolist()
        rows[missing] = new[[at[keys[i]] for i in missing]]
        return Evaluated(rows, held | is_complete, keys)

    def _evaluated(self, encoded: Array, user: Weights, deadline: float) -> tuple[Array, bool]:
        """Features of encoded attributes as far as time allows, and whether that was all of them."""
        n, steps, lanes, d = len(encoded), self.plan.steps, self.lanes, self.model.d
        costs = [lane.seconds for lane in lanes]
        start = self._population.of(n)
        places = list(range(len(steps)))
        if _PLENTY * sum(costs) > deadline - time.monotonic():
            places, _ = order(steps, costs, start, user.mean)
        found = evaluate(steps, lanes, places, encoded, deadline)
        reached = [place for place in places if place in found]
        revealed = [i for place in reached for i in steps[place].reveals]
        values = np.column_stack([np.zeros((n, 0)), *(np.reshape(found[place], (n, -1)) for place in reached)])
        if set(range(d)) <= set(revealed):
            whole = self.model.features_about(values[:, [revealed.index(i) for i in range(d)]])
            return scorer.feature_rows(whole), True
        return scorer.feature_rows(start.given(revealed, values).features(self.model.mu)), False

    def _encoded_by(self, attributes: Sequence[Attributes], deadline: float) -> Array | None:
        found = evaluate(_ENCODE, self.encoding, (0,), attributes, deadline).get(0)
        if isinstance(found, EncodingError):
            raise found
        return found

    def _cached(self, keys: list[bytes]) -> tuple[Array, np.ndarray]:
        """Rows (n, width), open where they are not held, and which are."""
        rows, held = np.empty((len(keys), scorer.width(self.model.d))), np.zeros(len(keys), bool)
        if self.features is not None:
            found, held = self.features.get(keys)
            rows[held] = found
        return rows, held

    def _keep(self, keys: list[bytes], rows: Array) -> None:
        if self.features is not None:
            self.features.put(keys, rows)

    @property
    def _population(self) -> Population:
        return self.studied.population if self.studied else self._guess

    # What it learns of the inputs there are.

    def study(self, sample: Sequence[Attributes]) -> None:
        """Evaluate inputs that are known, in full, for what the deadline and the bounds need to know."""
        ends, encoded, values = time.monotonic() + _STUDY_SECONDS, list[Array](), list[Array]()
        for first in range(0, len(sample), _STUDY_PART):
            encoded.append(_encoded(self.model, sample[first : first + _STUDY_PART]))
            values.append(self.plan.values(encoded[-1]))
            if time.monotonic() > ends:
                break
        if not encoded:
            return
        z, g = np.concatenate(encoded), np.concatenate(values)
        functions = _class_functions(self.settings, z)
        features = self.model.features_about(g[:, : self.model.d])
        scale = self._size_of_weights()
        extents = tuple(Extents.measure(of(z), features, scale) for of in functions)
        population = Population.fit(g, self.model.artefact.inputs.covariance)
        self.studied = Studied(population, functions, extents, scorer.feature_rows(features.take(np.array([0]))))

    def _size_of_weights(self) -> Array:
        """Root mean square of a user's weights by the prior; 1 for the offset's, (d,)."""
        users = self.model.artefact.users
        size = np.sqrt(self.model.prior_mean_of_unknown**2 + np.diag(users.covariance))
        size[0] = 1.0
        return np.maximum(size, 1e-6)

    # What it tells.

    def counts(self) -> tuple[Counts | None, Counts | None]:
        """Of the feature cache and the prediction cache."""
        return tuple(cache.counts() if cache is not None else None for cache in (self.features, self.predictions))  # type: ignore[return-value]

    def lane_counts(self) -> list[LaneCounts]:
        return [lane.counts() for lane in (*self.encoding, *self.lanes, self._apart)]


def frame_of(attributes: Sequence[Attributes]) -> pd.DataFrame:
    """Attribute rows as the encodings take them."""
    if not any(attributes):
        return pd.DataFrame(index=range(len(attributes)))
    return pd.DataFrame([{k: _as_stored(v) for k, v in row.items()} for row in attributes])


def _as_stored(value: Any) -> Any:
    """A value as the tables hold it: booleans as text, whole numbers as numbers."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return float(value) if isinstance(value, int) else value


def _encoded(model: Model, attributes: Sequence[Attributes]) -> Array:
    try:
        return model.encoded_inputs(frame_of(attributes))
    except (InputError, TypeError, ValueError) as error:
        raise EncodingError(str(error)) from error


def _whole(model: Model, attributes: Sequence[Attributes]) -> Array:
    """Features (n, width), however long it takes."""
    return scorer.feature_rows(model.features_about(model.artefact.inputs.mean(_encoded(model, attributes))))


def _evaluate_into(cache: RowCache, model: Model, key: bytes, attributes: Attributes) -> None:
    cache.put([key], _whole(model, [attributes]))


def _tried(model: Model, attributes: Sequence[Attributes]) -> Array | EncodingError:
    """What is wrong with a client's attributes is a result: the function did not fail."""
    try:
        return _encoded(model, attributes)
    except EncodingError as error:
        return error


def _class_functions(settings: ServeSettings, encoded: Array) -> tuple[ClassFunction, ...]:
    """The coarse ones, the finest first."""
    made: dict[str, Callable[[float], ClassFunction]] = {
        "rounded": classes.Rounded,
        "hashed": lambda size: classes.Hashed.draw(encoded.shape[1], size),
        "clustered": lambda size: classes.Clustered.fit(encoded, int(size)),
    }
    return tuple(made[settings.classes](size) for size in settings.coarseness) if settings.classes in made else ()


def _guessed(model: Model, m: int, stored: Array | None) -> Population:
    """The population by features of known inputs; what stages say is left out."""
    d = model.d
    values = np.zeros((2, m))
    if stored is not None and len(stored):
        values = np.zeros((len(stored), m))
        values[:, :d] = classes.vectors(_features(stored, d))
        values[:, 0] -= model.mu
    return Population.fit(values, model.artefact.inputs.covariance)


def _features(rows: Array, d: int) -> Features:
    return scorer.features_of(np.asarray(rows), d)


def _close(lanes: list[Lane]) -> None:
    for lane in lanes:
        lane.close()
