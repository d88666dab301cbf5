"""Scores of inputs that a client names, for one user or for a batch of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
import numpy as np

from mtl.serving import api, scorer
from mtl.serving.requests import BATCH, PREDICT, as_text, decode, too_many
from mtl.serving.scorer import Weights
from mtl.serving.service import Service, unknown
from mtl.serving.together import Together
from mtl.serving.view import Found, View

_LONGEST_BATCH_MS = 10_000.0  # of a deadline
_BUSY = 16  # requests in the worker: with fewer each is answered on the spot, which is sooner
_FEW = 4  # requests of one turn: fewer are sooner scored one by one
_ROWS = 1024  # of features that are gathered at once: the processor's cache, and who else waits meanwhile

_encode = msgspec.json.Encoder().encode


class Asked(msgspec.Struct, gc=False):
    """A request whose inputs all have features."""

    view: View
    inputs: list[Any]  # as they were given
    places: bytes  # of their features: View.places
    user: str | Weights  # by id, or what is believed where the request says more of the user, or of its context
    user_known: bool


class _Batch(msgspec.Struct):
    """:class:`mtl.serving.api.BatchAnswer` of answers that are encoded."""

    answers: list[msgspec.Raw]


class Predictions:
    """Over the service of one worker."""

    def __init__(self, service: Service):
        self.service = service
        self.together = Together(self._scored)

    def predict(self, body: bytes) -> bytes | Awaitable[bytes]:
        request, live = decode(PREDICT, body), self.service.shown()
        asked = self._asked(request, live)
        if asked is None:
            return self._evaluated(request, live)
        return self._alone(asked) if self.service.n_inside() < _BUSY else self._ask(asked)

    async def predict_batch(self, body: bytes) -> bytes:
        request, settings = decode(BATCH, body), self.service.settings
        if len(request.requests) > settings.max_batch:
            raise too_many("requests", len(request.requests), settings.max_batch, "serve.max_batch")
        # A batch is of one version, which is kept for a while after another is shown.
        live, wanted = self.service.shown(), request.deadline_ms
        ends = self.service.ends(wanted if wanted is None else min(wanted, _LONGEST_BATCH_MS))
        asked = [self._asked(one, live) for one in request.requests]
        at_once = [None if one is None else self._ask(one) for one in asked]
        answers = [
            msgspec.Raw(await (answer or self._evaluated(one, live, ends)))
            for one, answer in zip(request.requests, at_once, strict=True)
        ]
        return _encode(_Batch(answers))

    def _ask(self, asked: Asked) -> Awaitable[bytes]:
        """The answer, together with those to others of the same view with as many inputs."""
        return self.together.ask((id(asked.view), len(asked.places)), asked)

    def _asked(self, request: api.PredictRequest, live: View) -> Asked | None:
        """The request as it can be answered at once; None where features are to be computed."""
        view, given = self.service.view_for(request, live), request.inputs
        self.service.check_number("inputs", given)
        places = view.places(given)
        if places is None:
            return None
        if request.user_attributes or self.service.is_moved(view, request):
            return Asked(view, given, places, *self.service.weights(view, request))
        return Asked(view, given, places, str(request.user), True)

    def _alone(self, asked: Asked) -> bytes:
        view, user = asked.view, asked.user
        known = user if isinstance(user, Weights) else view.weights_of(user)
        rows = view.rows.take(np.frombuffer(asked.places, np.int64), 0)
        scores, stds = view.score(known or view.unknown_weights, rows)
        is_known = asked.user_known and known is not None
        return _encode(self._answer(view, is_known, asked.inputs, scores.tolist(), stds.tolist()))

    def _scored(self, asked: Sequence[Asked]) -> list[bytes]:
        """Answers to requests of one view with as many inputs each."""
        size = max(_ROWS // max(len(asked[0].inputs), 1), 1)
        answers = []
        for first in range(0, len(asked), size):
            part = asked[first : first + size]
            answers += [self._alone(one) for one in part] if len(part) < _FEW else self._alike(part)
        return answers

    def _alike(self, asked: Sequence[Asked]) -> list[bytes]:
        view = asked[0].view
        users, known = view.weights_of_several([one.user for one in asked])
        places = np.frombuffer(b"".join([one.places for one in asked]), np.int64)
        scores, stds = view.score(users, view.rows.take(places.reshape(len(asked), -1), 0))
        return [
            _encode(self._answer(view, one.user_known and is_known, one.inputs, score, std))
            for one, is_known, score, std in zip(asked, known, scores.tolist(), stds.tolist(), strict=True)
        ]

    async def _evaluated(self, request: api.PredictRequest, live: View, ends: float | None = None) -> bytes:
        """The answer where features of some inputs are to be computed."""
        service = self.service
        view = service.view_for(request, live)
        user, user_known = service.weights(view, request)
        own = service.ends(request.deadline_ms)
        ends = own if ends is None else min(ends, own)
        inputs = as_text(request.inputs)
        try:
            found = await service.in_time(view.believe, inputs, user, ends, service.coarseness)
        except asyncio.TimeoutError:
            at_hand = view.rows_at_hand(inputs)
            found = Found(*scorer.belief(at_hand.rows, user), at_hand.known, at_hand.incomplete)
        scores, stds = view.respond(found.mean, found.variance)
        answer = self._answer(view, user_known, request.inputs, scores.tolist(), stds.tolist())
        if found.bound is not None:
            for one, bound in zip(answer.scores, found.bound.tolist(), strict=True):
                one.bound = bound
        answer.incomplete_inputs = found.incomplete
        answer.unknown_inputs = unknown(request.inputs, found.known)
        return _encode(answer)

    def _answer(
        self, view: View, user_known: bool, given: list[Any], scores: list[float], stds: list[float]
    ) -> api.PredictAnswer:
        return api.PredictAnswer(
            scores=list(map(api.Score, given, scores, stds)),
            model_version=view.version,
            staleness_s=self.service.staleness,
            user_known=user_known,
        )
