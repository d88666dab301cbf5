"""What one worker answers, apart from HTTP: a body in, a body out, or a :class:`mtl.serving.api.Problem`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mtl import gaussian
from mtl.config import ServeSettings
from mtl.serving import api, scorer
from mtl.serving.api import Problem
from mtl.serving.observations import Event, Feedback
from mtl.serving.observer import Observer
from mtl.serving.overlay import Overlay
from mtl.serving.records import digest
from mtl.serving.requests import (
    BATCH,
    FEEDBACK,
    OBSERVE,
    PREDICT,
    TOP,
    allow,
    check_event,
    checked_k,
    decode,
    finite,
    flag_of,
    identity_of,
    k_of,
    moment_of,
    text_of,
    too_many,
)
from mtl.serving.scorer import Weights
from mtl.serving.store import Store
from mtl.serving.view import EncodingError, Inputs, View, open_view

log = logging.getLogger("mtl")

MAX_VERSION_AGE = 0.2  # seconds between two looks at what the store shows
_DEADLINE_MS = 30_000.0  # of a request that names none

Rescore = Callable[[str, list[str], list[float], list[float]], Sequence[float]]

_encode = msgspec.json.Encoder().encode


@dataclass
class Service:
    """The answers of one worker over one store."""

    store: Store
    overlay: Overlay
    observer: Observer
    settings: ServeSettings
    rescore: Rescore | None = None
    view: View | None = None
    checked_at: float = field(default=0.0, init=False)  # when store and tables last agreed, seconds since 1970
    staleness: float = field(default=-1.0, init=False)  # seconds since, at the last look
    # Of its own: feature functions that hang must not keep others from a thread.
    _evaluators: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "evaluate"), init=False)

    def look(self) -> None:
        """Take over what the store shows now; called again and again."""
        self.view = open_view(self.store, self.overlay, self.settings.users_cached, self.view)
        self.checked_at = self.overlay.status().checked_at
        self.staleness = round(max(0.0, time.time() - self.checked_at), 3) if self.checked_at else -1.0

    # Predictions.

    def predict(self, body: bytes) -> bytes | Coroutine[Any, Any, bytes]:
        """The answer, or where features are to be computed a coroutine of it."""
        request = decode(PREDICT, body)
        answer = self._at_once(request)
        return self._encoded(request) if answer is None else _encode(answer)

    async def _encoded(self, request: api.PredictRequest) -> bytes:
        return _encode(await self._predict(request))

    async def predict_batch(self, body: bytes) -> bytes:
        request = decode(BATCH, body)
        if len(request.requests) > self.settings.max_batch:
            raise too_many("requests", len(request.requests), self.settings.max_batch, "serve.max_batch")
        ends = time.monotonic() + (request.deadline_ms or _DEADLINE_MS) / 1000
        answers = [self._at_once(one) or await self._predict(one, ends) for one in request.requests]
        return _encode(api.BatchAnswer(answers))

    def _at_once(self, request: api.PredictRequest) -> api.PredictAnswer | None:
        """The answer where all inputs have features."""
        view, given = self.view or self._shown(), request.inputs
        if len(given) > self.settings.max_inputs:
            raise too_many("inputs", len(given), self.settings.max_inputs, "serve.max_inputs")
        rows = view.gather(given)
        if rows is None:
            return None
        user, user_known = self._weights(view, request.user, request.user_attributes)
        return self._answer(view, user, user_known, given, rows)

    async def _predict(self, request: api.PredictRequest, ends: float | None = None) -> api.PredictAnswer:
        """The answer where features of some inputs are to be computed."""
        view = self._shown()
        user, user_known = self._weights(view, request.user, request.user_attributes)
        found, late = await self._evaluate(view, request.inputs, request.deadline_ms, ends)
        answer = self._answer(view, user, user_known, request.inputs, found.rows)
        answer.incomplete_inputs = late
        answer.unknown_inputs = [
            one
            for one, known in zip(request.inputs, found.known, strict=True)
            if not known and not isinstance(one, dict)
        ]
        return answer

    def _answer(
        self, view: View, user: Weights, user_known: bool, given: list[Any], rows: np.ndarray
    ) -> api.PredictAnswer:
        scores, stds = view.score(user, rows)
        return api.PredictAnswer(
            scores=list(map(api.Score, given, scores.tolist(), stds.tolist())),
            model_version=view.version,
            staleness_s=self.staleness,
            user_known=user_known,
        )

    async def _evaluate(
        self, view: View, given: Sequence[Any], deadline_ms: float | None, ends: float | None
    ) -> tuple[Inputs, list[int]]:
        """Features of inputs of which some are to be computed; those that did not come by the deadline (places)."""
        limit = ends or time.monotonic() + (deadline_ms or _DEADLINE_MS) / 1000
        inputs = [str(one) if isinstance(one, int) else one for one in given]
        computing = asyncio.get_running_loop().run_in_executor(self._evaluators, view.rows_of, inputs)
        try:
            return await asyncio.wait_for(computing, max(0.0, limit - time.monotonic())), []
        except asyncio.TimeoutError:
            return view.rows_at_hand(inputs)
        except EncodingError as error:
            raise Problem(422, "bad_attributes", f"the model cannot take these attributes: {error}") from error

    async def top(self, body: bytes) -> bytes:
        return await self._top(decode(TOP, body))

    async def top_by_query(self, query: Mapping[str, str]) -> bytes:
        allow(query, "user", "k", "exclude_seen", "where")
        where = (
            dict(part.split(":", 1) for part in query["where"].split(",") if ":" in part) if "where" in query else {}
        )
        request = api.TopRequest(
            text_of(query, "user"),
            k_of(query, self.settings.max_k),
            exclude_seen=flag_of(query, "exclude_seen"),
            where=dict(where),
        )
        return await self._top(request)

    async def _top(self, request: api.TopRequest) -> bytes:
        checked_k(request.k, self.settings.max_k)
        view = self._shown()
        user, known = self._weights(view, request.user, request.user_attributes)
        work = asyncio.get_running_loop().run_in_executor
        if request.candidates is not None:
            if len(request.candidates) > self.settings.max_inputs:
                raise too_many("candidates", len(request.candidates), self.settings.max_inputs, "serve.max_inputs")
            chosen = await work(None, self._top_of_candidates, view, user, request)
        elif request.where or request.exclude_seen or request.exclude or len(view.rows) > _INLINE:
            chosen = await work(None, self._top_of_all, view, user, request)
        else:
            chosen = self._top_of_all(view, user, request)
        return _encode(
            api.TopAnswer(scores=chosen, model_version=view.version, staleness_s=self.staleness, user_known=known)
        )

    def _top_of_all(self, view: View, user: Weights, request: api.TopRequest) -> list[api.Score]:
        excluded = view.excluded(
            str(request.user) if request.exclude_seen else None, list(map(str, request.exclude)), request.where
        )
        # A few more than k: single precision and E[h] order almost as predictions do.
        rows = view.best(user, request.k + _SLACK, excluded)
        return self._ordered(view, user, request, view.ids(rows), view.rows.take(rows, 0))

    def _top_of_candidates(self, view: View, user: Weights, request: api.TopRequest) -> list[api.Score]:
        assert request.candidates is not None
        drop = set(map(str, request.exclude))
        if request.exclude_seen:
            drop |= set(view.ids(view.seen_rows(str(request.user))))
        wanted = [
            c for c in dict.fromkeys(map(str, request.candidates)) if c not in drop and view.has(c, request.where)
        ]
        return self._ordered(view, user, request, wanted, view.rows_of(wanted).rows) if wanted else []

    def _ordered(
        self, view: View, user: Weights, request: api.TopRequest, ids: list[str], rows: np.ndarray
    ) -> list[api.Score]:
        scores, stds = view.score(user, rows)
        if self.rescore is not None:
            scores = np.asarray(self.rescore(str(request.user), ids, scores.tolist(), stds.tolist()), float)
        order = np.argsort(-scores, kind="stable")[: request.k]
        return [api.Score(ids[i], float(scores[i]), float(stds[i])) for i in order]

    # Learning.

    async def observe(self, body: bytes) -> bytes:
        request = decode(OBSERVE, body)
        view = self._shown()
        check_event(request, view.loss)
        event = Event(
            uuid.uuid4().hex if request.event_id is None else identity_of("event_id", request.event_id),
            identity_of("user", request.user),
            identity_of("input", request.input),
            request.label + 0.0,
            request.weight,
            moment_of(request.event_time),
        )
        try:
            is_new = await self.observer.add(event, look_up=request.event_id is not None)
        except OSError as error:
            raise Problem(503, "not_written", "the observation could not be put on disk", _RETRY) from error
        return _encode(api.ObserveAnswer(event.event_id, not is_new))

    async def feedback(self, body: bytes) -> bytes:
        request = decode(FEEDBACK, body)
        row = Feedback(
            identity_of("decision_id", request.decision_id),
            finite("reward", request.reward),
            None if request.user is None else identity_of("user", request.user),
            None if request.input is None else identity_of("input", request.input),
            moment_of(request.event_time),
        )
        try:
            await self.observer.add(row, look_up=False)
        except OSError as error:
            raise Problem(503, "not_written", "the reward could not be put on disk", _RETRY) from error
        return _encode(api.FeedbackAnswer(row.decision_id))

    # Looking inside.

    async def user(self, identity: str, query: Mapping[str, str]) -> bytes:
        allow(query, "input")
        view, one = self._shown(), query.get("input")
        found = view.weights_of(identity)
        user = found or view.unknown_weights
        d = view.d
        covariance = gaussian.unpack(scorer.covariance_of(user)[None], d)[0]
        deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        offset, features, score, std = None, [None] * d, None, None
        if one is not None:
            rows = view.rows_of([one]).rows
            offset, features = float(rows[0, -1]), rows[0, :d].tolist()
            score, std = (float(values[0]) for values in view.score(user, rows))
        why = [
            api.Contribution(name, float(w), float(s), phi, None if phi is None else float(w) * phi)
            for name, w, s, phi in zip(view.basis, user.mean, deviations, features, strict=True)
        ]
        with self.overlay.reading() as transaction:
            pending = len(self.overlay.pending(transaction, digest(identity)))
        return _encode(
            api.UserAnswer(
                model_version=view.version,
                staleness_s=self.staleness,
                user=identity,
                known=found is not None,
                n_events=user.n_events,
                n_unconfirmed=pending,
                weights=user.mean.tolist(),
                covariance=covariance.tolist(),
                input=one,
                offset=offset,
                why=why,
                score=score,
                std=std,
            )
        )

    async def input(self, identity: str, query: Mapping[str, str]) -> bytes:
        allow(query)
        view = self._shown()
        rows, known = view.rows_of([identity])
        d, row = view.d, rows[0]
        spread = gaussian.unpack(row[None, : gaussian.packed_length(d)], d)[0] - np.outer(row[:d], row[:d])
        with self.store.reading() as transaction:
            attributes = self.store.attributes(transaction, identity)
            n_events, total = self.store.count(transaction, identity)
            has_features = view.row_of(identity, transaction) is not None
        return _encode(
            api.InputAnswer(
                model_version=view.version,
                staleness_s=self.staleness,
                input=identity,
                known=known[0],
                has_features=has_features,
                offset=float(row[-1]),
                offset_std=float(np.sqrt(max(row[-2], 0.0))),
                features=row[:d].tolist(),
                features_std=np.sqrt(np.maximum(np.diag(spread), 0.0)).tolist(),
                attributes=attributes,
                n_events=n_events,
                mean_label=total / n_events if n_events else None,
            )
        )

    async def similar(self, query: Mapping[str, str]) -> bytes:
        allow(query, "input", "k")
        view, one = self._shown(), text_of(query, "input")
        near = await asyncio.get_running_loop().run_in_executor(
            None, view.near_inputs, one, k_of(query, self.settings.max_k)
        )
        if near is None:
            raise Problem(404, "unknown_input", f"input {one!r} has neither features nor attributes")
        return _encode(
            api.SimilarAnswer(
                model_version=view.version,
                staleness_s=self.staleness,
                of=one,
                near=[api.Near(identity, distance) for identity, distance in near],
            )
        )

    async def popular(self, query: Mapping[str, str]) -> bytes:
        allow(query, "k")
        view, k = self._shown(), k_of(query, self.settings.max_k)
        with self.store.reading() as transaction:
            most = self.store.popular(transaction)[:k]
        inputs = [api.PopularInput(one.input, one.n_events, one.mean_label) for one in most]
        return _encode(api.PopularAnswer(model_version=view.version, staleness_s=self.staleness, inputs=inputs))

    async def models(self, query: Mapping[str, str]) -> bytes:
        allow(query)
        view = self._shown()
        with self.store.reading() as transaction:
            models = self.store.model_list(transaction)
        return _encode(api.ModelsAnswer(view.version, models))

    def ready(self) -> api.ReadyAnswer:
        if self.view is None:
            return api.ReadyAnswer(False, None, None, "no model version has been read from the tables yet")
        return api.ReadyAnswer(True, self.view.version, self.staleness)

    # Parts.

    def _shown(self) -> View:
        if self.view is None:
            raise Problem(503, "not_ready", "no model version has been read from the tables yet", _RETRY)
        return self.view

    def _weights(self, view: View, user: str | int, attributes: api.Attributes | None) -> tuple[Weights, bool]:
        found = view.weights_of(user if isinstance(user, str) else str(user))
        if found is not None:
            return found, True
        if attributes:
            try:
                return view.weights_of_described(attributes), False
            except EncodingError as error:
                raise Problem(422, "bad_attributes", f"the model cannot take these attributes: {error}") from error
        return view.unknown_weights, False


_INLINE = 200_000  # inputs of which the best are found without leaving the event loop
_SLACK = 32  # candidates of top beyond k
_RETRY = ((b"retry-after", b"1"),)
