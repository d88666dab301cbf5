"""What one worker answers, apart from HTTP: a body in, a body out, or a :class:`mtl.serving.api.Problem`."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lmdb
import msgspec

from mtl.config import ServeSettings
from mtl.effects import of_one
from mtl.serving import api, choices, ranking, scorer
from mtl.serving.admission import Admission
from mtl.serving.api import Problem
from mtl.serving.bandit import is_reward
from mtl.serving.contest import Contest, Rival
from mtl.serving.evaluator import EncodingError
from mtl.serving.observations import Choice, Event, Feedback
from mtl.serving.observer import Observer
from mtl.serving.overlay import Overlay
from mtl.serving.ranking import Ranked, Rescore
from mtl.serving.requests import (
    CHOOSE,
    FEEDBACK,
    OBSERVE,
    TOP,
    as_text,
    checked_k,
    context_of,
    decode,
    event_of,
    feedback_of,
    identity_of,
    offset_of,
    too_many,
    top_of,
)
from mtl.serving.scorer import Weights
from mtl.serving.store import Store
from mtl.serving.view import InTime, View, open_view

log = logging.getLogger("mtl")

MAX_VERSION_AGE = 0.2  # seconds between two looks at what the store shows
_LONGEST_MS = 60_000.0  # of a deadline
_RESERVE = 0.002  # seconds of a deadline for what comes after the evaluation
_EVALUATORS = 32  # threads, which wait for functions and run none
_RESCORERS = 4  # threads, which may hang
_MOST_RESCORING = 64  # requests
_TELL_SECONDS = 10.0  # between two lines of the same

Result = TypeVar("Result")

_encode = msgspec.json.Encoder().encode


@dataclass
class Service:
    """The answers of one worker over one store."""

    store: Store
    overlay: Overlay
    observer: Observer
    settings: ServeSettings
    rescore: Rescore | None = None
    contest: Contest | None = None  # None: the live version answers everything
    view: View | None = None
    checked_at: float = field(default=0.0, init=False)  # when store and tables last agreed, seconds since 1970
    staleness: float = field(default=-1.0, init=False)  # seconds since, at the last look
    _told_at: float = field(default=-math.inf, init=False)  # of serve.rescore
    _rescoring: int = field(default=0, init=False)
    admission: Admission | None = field(default=None, init=False)  # None: no objective
    # Of its own: who waits for feature functions must not keep others from a thread.
    _evaluators: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_EVALUATORS, "evaluate"), init=False
    )
    _rescorers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_RESCORERS, "rescore"), init=False
    )

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.objective_ms:
            coarser = len(settings.coarseness) if settings.classes != "exact" else 0
            self.admission = Admission(settings.objective_ms, settings.deadline_ms, coarser)

    def look(self) -> None:
        """Take over what the store shows now; called again and again."""
        self.view = self._next_view(self.store, self.overlay, self.view)
        if self.contest is not None:
            self.contest.look(self._next_view)
        shown = [self.overlay, *(rival.overlay for rival in self._rivals() if rival.view is not None)]
        self.checked_at = min(overlay.status().checked_at for overlay in shown)
        self.staleness = round(max(0.0, time.time() - self.checked_at), 3) if self.checked_at else -1.0

    def n_pending(self) -> int:
        """Observations that are not in their users' rows, of the live version and of its rivals, together."""
        return self.overlay.n_pending() + sum(
            rival.overlay.n_pending() for rival in self._rivals() if not rival.is_over
        )

    def _rivals(self) -> Sequence[Rival]:
        return self.contest.rivals if self.contest is not None else ()

    def _next_view(self, store: Store, overlay: Overlay, before: View | None) -> View | None:
        view = open_view(store, overlay, self.settings, before)
        if view is not None and (before is None or before.evaluator is not view.evaluator):
            # A thread that nobody waits for: functions may be slow, or hang.
            threading.Thread(target=_study, args=(view,), name="study", daemon=True).start()
        return view

    # Deadlines.

    @property
    def coarseness(self) -> int:
        """Place of the classes in force: 0 the exact ones."""
        if self.admission is not None:
            return self.admission.rung.coarseness
        return int(self.settings.classes != "exact")

    def ends(self, deadline_ms: float | None = None) -> float:
        """When a request's time is over, on the clock of ``time.monotonic``."""
        wanted = self.settings.deadline_ms[0] if deadline_ms is None else min(deadline_ms, _LONGEST_MS)
        if self.admission is not None:
            wanted = min(wanted, self.admission.rung.deadline_ms)
        return time.monotonic() + wanted / 1000

    async def in_time(
        self, work: Callable[..., Result], inputs: list[Any], user: Weights, ends: float, *more: Any
    ) -> Result:
        """The result of work in a thread.

        Raises:
            TimeoutError: of asyncio; it is not there by the deadline.
        """
        loop = asyncio.get_running_loop()
        doing = loop.run_in_executor(self._evaluators, work, inputs, user, ends - _RESERVE, *more)
        try:
            return await asyncio.wait_for(doing, max(0.0, ends - time.monotonic()))
        except EncodingError as error:
            raise Problem(422, "bad_attributes", f"the model cannot take these attributes: {error}") from error

    async def rows_in_time(
        self, view: View, inputs: list[Any], user: Weights, ends: float, coarseness: int = 0
    ) -> InTime:
        """Features by a deadline; where nothing comes by then those at hand."""
        rows = view.gather(inputs)
        if rows is not None:
            return InTime(rows, [True] * len(inputs), [])
        try:
            return await self.in_time(view.rows_by, inputs, user, ends, coarseness)
        except asyncio.TimeoutError:
            return view.rows_at_hand(inputs)

    # The best inputs.

    async def top(self, body: bytes) -> bytes:
        return await self._top(decode(TOP, body))

    async def top_by_query(self, query: Mapping[str, str]) -> bytes:
        return await self._top(top_of(query, self.settings.max_k))

    async def _top(self, request: api.TopRequest) -> bytes:
        checked_k(request.k, self.settings.max_k)
        view, ends = self.view_for(request, self.shown()), self.ends()
        user, known = self.weights(view, request)
        work, incomplete = asyncio.get_running_loop().run_in_executor, list[str]()
        if request.candidates is not None:
            self.check_number("candidates", request.candidates)
            ids = await work(None, ranking.wanted, view, request, request.candidates)
            found = await self.rows_in_time(view, ids, user, ends)
            ranked = await work(None, ranking.scored, view, user, ids, found.rows)
            incomplete = [ids[place] for place in found.incomplete]
        elif ranking.is_quick(view, request):
            ranked = ranking.best_of_all(view, user, request)
        else:
            ranked = await work(None, ranking.best_of_all, view, user, request)
        rescored = await self._rescored(ranked, str(request.user), ends)
        return _encode(
            api.TopAnswer(
                scores=(rescored or ranked).best(request.k),
                rescored=rescored is not None,
                model_version=view.version,
                staleness_s=self.staleness,
                user_known=known,
                incomplete_inputs=incomplete,
            )
        )

    async def _rescored(self, ranked: Ranked, user: str, ends: float) -> Ranked | None:
        """With the scores of ``serve.rescore``, where there is one; None where that fails, or has not answered in time."""
        if self.rescore is None:
            return ranked
        if self._rescoring >= _MOST_RESCORING:
            self._tell("serve: serve.rescore hangs, or is too slow for so many requests")
            return None
        doing = asyncio.get_running_loop().run_in_executor(self._rescorers, ranked.rescored, self.rescore, user)
        self._rescoring += 1
        doing.add_done_callback(self._end_rescoring)
        await asyncio.wait([doing], timeout=max(0.0, ends - _RESERVE - time.monotonic()))
        if not doing.done():
            self._tell("serve: serve.rescore has not answered in time")
            return None
        if (error := doing.exception()) is not None:
            self._tell(f"serve: serve.rescore failed: {type(error).__name__}: {error}")
            return None
        return doing.result()

    def _end_rescoring(self, done: asyncio.Future[Ranked]) -> None:
        self._rescoring -= 1
        if not done.cancelled():
            done.exception()  # looked at, or asyncio would tell of it

    def _tell(self, what: str) -> None:
        """Log it, now and then."""
        if time.monotonic() > self._told_at + _TELL_SECONDS:
            log.error(what)
            self._told_at = time.monotonic()

    # Exploring.

    async def choose(self, body: bytes) -> bytes:
        """Draw one input, and answer when the decision is on disk."""
        request = decode(CHOOSE, body)
        given, who = request.inputs, identity_of("user", request.user)
        if not given:
            raise Problem(422, "no_inputs", "inputs is empty: there is nothing to choose from")
        self.check_number("inputs", given)
        inputs = as_text(given)
        if len({*map(choices.name_of, inputs)}) < len(inputs):
            raise Problem(
                422, "repeated_inputs", "an input is there twice: its propensity would be that of one of the two"
            )
        view = self.shown()
        version_propensity, versions = 1.0, [view.version]
        if self.contest is not None:
            view, version_propensity, versions = self.contest.draw(view, who)
        user, user_known = self.weights(view, request)
        ends = self.ends(request.deadline_ms)
        found = await self.rows_in_time(view, inputs, user, ends, self.coarseness)
        policy = request.explore or self.settings.explore
        drawn = await asyncio.get_running_loop().run_in_executor(
            None, choices.choose, found.rows, user, policy, self.settings
        )
        score, std = (float(values[0]) for values in view.score(user, found.rows[[drawn.place]]))
        chosen = inputs[drawn.place]
        row = choices.logged(drawn, who, chosen, view.version, version_propensity, versions, score, len(inputs))
        await self._log(row, "the decision")
        return _encode(
            api.ChooseAnswer(
                input=given[drawn.place],
                place=drawn.place,
                propensity=drawn.propensity,
                decision_id=row.decision_id,
                explore=policy,
                score=score,
                std=std,
                model_version=view.version,
                staleness_s=self.staleness,
                user_known=user_known,
                unknown_inputs=unknown(given, found.known),
                incomplete_inputs=found.incomplete,
                version_propensity=version_propensity,
            )
        )

    # Learning.

    async def observe(self, body: bytes) -> bytes:
        request = decode(OBSERVE, body)
        view = self.shown()
        event = event_of(request, view.loss, self._contexts())
        is_new = await self._log(event, "the observation", look_up=request.event_id is not None)
        return _encode(api.ObserveAnswer(event.event_id, not is_new))

    async def feedback(self, body: bytes) -> bytes:
        row = feedback_of(decode(FEEDBACK, body))
        if self.contest is not None and not is_reward(row.reward):
            raise Problem(
                422, "bad_reward", f"reward {row.reward}: one in [0, 1] is wanted where versions compete (serve.rivals)"
            )
        await self._log(row, "the reward")
        return _encode(api.FeedbackAnswer(row.decision_id))

    def ready(self) -> api.ReadyAnswer:
        if self.view is None:
            return api.ReadyAnswer(False, None, None, _NOTHING_YET)
        return api.ReadyAnswer(True, self.view.version, self.staleness)

    # Parts.

    async def _log(self, row: Event | Feedback | Choice, what: str, look_up: bool = False) -> bool:
        """Whether a row is new, once it is on disk and every worker sees it."""
        try:
            return await self.observer.add(row, look_up)
        except (OSError, lmdb.Error) as error:
            raise Problem(503, "not_written", f"{what} could not be put on disk", _RETRY) from error

    def shown(self) -> View:
        if self.view is None:
            raise Problem(503, "not_ready", _NOTHING_YET, _RETRY)
        return self.view

    def view_for(self, about: api.About, live: View) -> View:
        """Of the version that answers where nothing is decided."""
        return live if self.contest is None else self.contest.assigned(live, identity_of("user", about.user))

    def check_number(self, what: str, inputs: Sequence[Any]) -> None:
        if len(inputs) > self.settings.max_inputs:
            raise too_many(what, len(inputs), self.settings.max_inputs, "serve.max_inputs")

    def _contexts(self) -> list[str]:
        """Contexts that any of the competing versions has."""
        views = [self.shown(), *(rival.view for rival in self._rivals() if rival.view is not None)]
        return sorted({name for view in views for name in view.model.contexts})

    def is_moved(self, view: View, about: api.About) -> bool:
        """Whether there is more in h of the request than user and input."""
        return bool(about.offset or about.context or view.model.artefact.effects)

    def weights(self, view: View, about: api.About) -> tuple[Weights, bool]:
        """The user's weights, with what else is in h of the request; and whether the user is known."""
        user, attributes = about.user, about.user_attributes
        try:
            found = view.weights_of(user if isinstance(user, str) else str(user), attributes)
            is_known = found is not None
            if found is None:
                found = view.weights_of_described(attributes) if attributes else view.unknown_weights
        except EncodingError as error:
            raise Problem(422, "bad_attributes", f"the model cannot take these attributes: {error}") from error
        if self.is_moved(view, about):
            given = context_of(about.context, self._contexts())
            context = {name: given[name] for name in given if name in view.model.contexts}
            found = scorer.moved(
                found, *of_one(offset_of(about.offset, view.loss), context, view.model.artefact.effects)
            )
        return found, is_known


def unknown(given: Sequence[Any], known: Sequence[bool]) -> list[Any]:
    """Ids of inputs of which nothing is known."""
    return [one for one, is_known in zip(given, known, strict=True) if not is_known and not isinstance(one, dict)]


def _study(view: View) -> None:
    try:
        view.evaluator.study(view.sample())
    except Exception:
        log.exception("serve: inputs could not be studied: answers are not coarse, and deadlines know the less")


_RETRY = ((b"retry-after", b"1"),)
_NOTHING_YET = "no model version has been read from the tables yet"
