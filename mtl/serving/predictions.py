"""Scores of inputs that a client names, for one user or for a batch of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
import numpy as np

from mtl.serving import api, scorer
from mtl.serving.requests import BATCH, PREDICT, as_text, decode, too_many
from mtl.serving.scorer import Weights
from mtl.serving.service import Service, unknown
from mtl.serving.view import Found, View

_LONGEST_BATCH_MS = 10_000.0  # of a deadline
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

    def predict(self, body: bytes) -> bytes | Awaitable[bytes]:
        live, request = self.service.shown(), decode(PREDICT, body)
        asked = self._asked(request, live)
        return self._evaluated(request, live) if asked is None else self._alike([asked])[0]

    def asked(self, body: bytes | bytearray) -> Asked | None:
        """A request that can be answered at once; None where features are to be computed.

        Raises:
            Problem: it cannot be answered.
        """
        return self._asked(decode(PREDICT, body), self.service.shown())

    async def predict_batch(self, body: bytes) -> bytes:
        request, settings = decode(BATCH, body), self.service.settings
        if len(request.requests) > settings.max_batch:
            raise too_many("requests", len(request.requests), settings.max_batch, "serve.max_batch")
        # A batch is of one version, which is kept for a while after another is shown.
        live, wanted = self.service.shown(), request.deadline_ms
        ends = self.service.ends(wanted if wanted is None else min(wanted, _LONGEST_BATCH_MS))
        asked = [self._asked(one, live) for one in request.requests]
        at_once = iter(self.together([one for one in asked if one is not None]))
        answers = [
            next(at_once) if one is not None else await self._evaluated(given, live, ends)
            for given, one in zip(request.requests, asked, strict=True)
        ]
        return _encode(_Batch(list(map(msgspec.Raw, answers))))

    def together(self, asked: Sequence[Asked]) -> list[bytes]:
        """Answers to requests, those of one view with as many inputs by the same calls."""
        if len(asked) == 1:
            return self._alike(asked)
        kinds: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, one in enumerate(asked):
            kinds[id(one.view), len(one.inputs)].append(place)
        answers = [b""] * len(asked)
        for (_, n_inputs), places in kinds.items():
            size = max(_ROWS // max(n_inputs, 1), 1)
            for first in range(0, len(places), size):
                part = places[first : first + size]
                for place, answer in zip(part, self._alike([asked[place] for place in part]), strict=True):
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
