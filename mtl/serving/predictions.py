"""Scores of inputs that a client names, for one user or for a batch of them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
import numpy as np

from mtl.serving import api, scorer
from mtl.serving.api import Problem
from mtl.serving.requests import BATCH, PREDICT, as_text, decode, too_many
from mtl.serving.scorer import Weights
from mtl.serving.service import Service, unknown
from mtl.serving.turn import Came
from mtl.serving.view import Found, View

_LONGEST_BATCH_MS = 10_000.0  # of a deadline
_ROWS = 1024  # of features that are gathered at once: the processor's cache, and who else waits meanwhile

log = logging.getLogger("mtl")

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

    def predict(self, body: bytes, came: Came | None = None) -> bytes | Awaitable[bytes]:
        """The answer to a request; where it came with others, those get theirs too."""
        live = self.service.shown()
        if came is not None and came.body == body:  # not the last part of one
            if came.answer is None:
                self._answer_all(came.turn.take(came), live)
            if came.answer is not None:
                return came.answer
        request = decode(PREDICT, body)
        asked = self._asked(request, live)
        return self._evaluated(request, live) if asked is None else self._alone(asked)

    async def predict_batch(self, body: bytes) -> bytes:
        request, settings = decode(BATCH, body), self.service.settings
        if len(request.requests) > settings.max_batch:
            raise too_many("requests", len(request.requests), settings.max_batch, "serve.max_batch")
        # A batch is of one version, which is kept for a while after another is shown.
        live, wanted = self.service.shown(), request.deadline_ms
        ends = self.service.ends(wanted if wanted is None else min(wanted, _LONGEST_BATCH_MS))
        at_once = self._together([self._asked(one, live) for one in request.requests])
        answers = [
            msgspec.Raw(answer or await self._evaluated(one, live, ends))
            for one, answer in zip(request.requests, at_once, strict=True)
        ]
        return _encode(_Batch(answers))

    def _answer_all(self, came: Sequence[Came], live: View) -> None:
        """Answers to those of some requests that can be answered at once."""
        if len(came) < 2:
            return
        try:
            answers = self._together([self._asked_by(one, live) for one in came])
        except Exception:  # one's own fault is not to be the others'
            log.exception("serve: requests that came at once are answered one by one")
            return
        for one, answer in zip(came, answers, strict=True):
            one.answer = answer

    def _asked_by(self, came: Came, live: View) -> Asked | None:
        try:
            return self._asked(decode(PREDICT, came.body), live)
        except Problem:  # to be told when it is this one's turn
            return None

    def _together(self, asked: Sequence[Asked | None]) -> list[bytes | None]:
        """Answers to requests, those of one view with as many inputs by the same calls."""
        kinds = defaultdict[tuple[int, int], list[tuple[int, Asked]]](list)
        for place, one in enumerate(asked):
            if one is not None:
                kinds[id(one.view), len(one.places)].append((place, one))
        answers: list[bytes | None] = [None] * len(asked)
        for alike in kinds.values():
            for (place, _), answer in zip(alike, self._scored([one for _, one in alike]), strict=True):
                answers[place] = answer
        return answers

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
        answers = list[bytes]()
        for first in range(0, len(asked), size):
            part = asked[first : first + size]
            answers += self._alike(part) if len(part) > 1 else map(self._alone, part)
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
