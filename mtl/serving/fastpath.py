"""Predictions of one turn of the event loop past the application: no route, no task, no message of ASGI a request.

Together these cost more than a prediction. What cannot be answered at once and with 200 is passed on: a wrong token, a mistake in
the request, features that are to be computed. Only a refusal by the load controller is answered here too, for it must be cheap.
"""

from __future__ import annotations

import logging
import time

from mtl.serving.http import allowed, error_body, overloaded
from mtl.serving.metrics import Metrics
from mtl.serving.predictions import Asked, Predictions
from mtl.serving.service import Service
from mtl.serving.turn import Came

_SMALL = 16 * 1024  # bytes of a body

log = logging.getLogger("mtl")


class FastPath:
    """Over the service of one worker."""

    def __init__(self, service: Service, metrics: Metrics):
        self._predictions, self._admission = Predictions(service), service.admission
        self._observe = metrics.of("predict")
        self._largest = min(_SMALL, service.settings.max_body_kb * 1024)
        self._token = service.settings.token.get_secret_value()

    def __call__(self, came: list[Came]) -> None:
        """Answer requests, or pass them on."""
        entered: list[Came] = []
        asked: list[Asked] = []
        for one in came:
            request = self._asked(one)
            if request is None:
                one.pass_on()
            elif self._enters(one):
                entered.append(one)
                asked.append(request)
        try:
            answers = self._predictions.together(asked)
        except Exception:  # one's own fault is not to be the others'
            log.exception("serve: requests that came at once are answered one by one")
            for one in entered:
                self._leave(one)
                one.pass_on()
            return
        for one, answer in zip(entered, answers, strict=True):
            one.answer(answer)
            self._observe(200, self._leave(one))

    def _asked(self, came: Came) -> Asked | None:
        if len(came.body) > self._largest or not allowed(came.headers, self._token):
            return None
        try:
            return self._predictions.asked(came.body)
        except Exception:  # the application comes upon it again, and says so
            return None

    def _enters(self, came: Came) -> bool:
        admission = self._admission
        if admission is None or admission.enter():
            return True
        problem = overloaded(admission)
        came.answer(error_body(problem), problem.status, problem.headers)
        self._observe(problem.status, time.perf_counter() - came.at)
        return False

    def _leave(self, came: Came) -> float:
        """Seconds since it came."""
        elapsed = time.perf_counter() - came.at
        if self._admission is not None:
            self._admission.leave(elapsed)
        return elapsed
