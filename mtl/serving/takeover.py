"""How users' rows take over from observations: which event is where, and which of them the users contain.

The rule is that of :mod:`mtl.serving.overlay`; this is the refresher's part in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from mtl.model import Model
from mtl.schema import EVENT_ID, EVENTS
from mtl.serving.coverage import Coverage, coverage, known_before, set_aside
from mtl.serving.overlay import Overlay, is_covered
from mtl.serving.records import DIGEST_BYTES, prefix
from mtl.serving.source import Expired, Source
from mtl.serving.store import Store

log = logging.getLogger("mtl")

GRACE_SECONDS = 15.0  # after a switch, until no worker reads the version before
NOWHERE = (-1, -1)  # where an id is that the events table had before it was observed here


@dataclass
class Takeover:
    """The refresher's dealings with the overlay."""

    source: Source
    store: Store
    overlay: Overlay
    _answered: tuple[int, int] | None = None  # commits of users and events at the last question of what users contain
    _look_up_after: float = 0.0  # a look through all event ids is dear: at most a twentieth of the time
    _is_marked: bool = True  # whether there may be marks to act on

    def not_landed(self) -> dict[str, bytes]:
        """Keys of the observations that were not met in the events table yet, by event id.

        To be asked after the commit is known up to which the events table is read: ingest gets an observation after it
        is here, so what is in those commits is among them.
        """
        if not self.overlay.n_pending():
            return {}
        return {p.event.event_id: key for key, p in self.overlay.every().items() if p.landed is None}

    def land(self, waiting: dict[str, bytes], events: Collection[str], place: tuple[int, int]) -> None:
        """Note that those of ``waiting`` that are among ``events`` (ids) are at a place of the events table."""
        if not (mine := waiting.keys() & set(events) if waiting else None):
            return
        every, landed = self.overlay.every(), {}
        for event in mine:
            pending = every[waiting[event]]
            pending.landed, pending.look_up = place, False
            landed[waiting[event]] = pending
        self.overlay.write(landed)

    def ask(self, waiting: dict[str, bytes]) -> None:
        """Have those of ``waiting`` looked up that did not land: the commits that would tell where are not read one by one."""
        every = self.overlay.every()
        asked = {key: every[key] for key in waiting.values() if every[key].landed is None}
        for pending in asked.values():
            pending.look_up = True
        self.overlay.write(asked)

    def asks(self, users: int, events: int) -> bool:
        """Whether observations may be in users of whom that is not known yet, at these commits of users and events."""
        if users < 0 or not self.overlay.n_pending():
            return False
        if self._answered == (users, events) and not (self.overlay.n_asked() and time.time() > self._look_up_after):
            return False
        self._answered = (users, events)
        return True

    def forget(self) -> None:
        """After a cycle that was not ended: ask again."""
        self._answered, self._is_marked = None, True

    def coverage(self, model: Model, users: int, events: int) -> Coverage | None:
        """What commit ``users`` of the users table contains; None where no observation asks for it."""
        if users < 0 or not self.overlay.n_pending():
            return None
        covered = coverage(self.source, model.version, model.events_version, users)
        self._look_up(covered, events)
        return covered

    def _look_up(self, covered: Coverage, through: int) -> None:
        """Ids that the events table may have had before they were observed here."""
        if through < 0 or time.time() < self._look_up_after or not (asked := self.overlay.asked()):
            return
        began = time.time()
        ids = {pending.event.event_id for pending in asked.values()}
        known = known_before(self.source, EVENTS, through, ids)
        places = self._places(known, covered.place[0], through) if known else {}
        for pending in asked.values():
            pending.look_up = False
            if pending.event.event_id in known:
                pending.landed = places.get(pending.event.event_id, NOWHERE)
        self.overlay.write(asked)
        self._look_up_after = time.time() + 20 * (time.time() - began)

    def _places(self, events: set[str], first: int, through: int) -> dict[str, tuple[int, int]]:
        """Where those of ``events`` are that came with the commits from ``first`` on, as far as these are still there."""
        places = {}
        with suppress(Expired):
            for commit in self.source.commits(EVENTS, first - 1, through):
                for file in commit.files:
                    with suppress(Expired):
                        for event in self.source.rows(EVENTS, file, [EVENT_ID])[EVENT_ID].to_pylist():
                            if event in events:
                                places[event] = (commit.version, file.index)
        return places

    def mark(self, covered: Coverage, cycle: int, changed: set[bytes] | None) -> None:
        """Mark the observations that the users contain.

        Args:
            cycle: with which the rows of users are about to be written.
            changed: digests of the users that are; None: all. A user that is not has a row that contains the event already.
        """
        landed = {key: pending for key, pending in self.overlay.every().items() if pending.landed is not None}
        ids = {pending.event.event_id for pending in landed.values()}
        aside = set_aside(self.source, covered.model_version, ids) if ids else {}
        marked, version = {}, covered.model_version
        with self.store.reading() as transaction:
            for key, pending in landed.items():
                event, user = pending.event.event_id, key[:DIGEST_BYTES]
                assert pending.landed is not None
                if is_covered(pending, version, self.store.user(transaction, prefix(version), user)):
                    continue  # with a later cycle it would count again until that cycle's row is there
                if covered.contains(pending.landed, aside.get(event), event in aside):
                    is_written = (changed is None or user in changed) and pending.landed != NOWHERE
                    pending.covered = (version, cycle if is_written else 0)
                    marked[key] = pending
        if marked:
            self._is_marked = True
            self.overlay.write(marked)

    def delete_covered(self) -> None:
        """Observations whose user's row in the store contains them, or whose user was erased with them."""
        if not self._is_marked or not self.overlay.n_pending():
            return
        pending, done = self.overlay.every(), []
        with self.store.reading() as transaction:
            live = self.store.live(transaction)
            if live is None or time.time() - live.switched_at < GRACE_SECONDS:
                return
            for key, observation in pending.items():
                if observation.covered is not None and observation.covered[0] == live.model_version:
                    record = self.store.user(transaction, prefix(live.model_version), key[:DIGEST_BYTES])
                    if record is None or is_covered(observation, live.model_version, record):
                        done.append(key)
        if done:
            self.store.confirm((pending[key].event.event_id for key in done), time.time())
            self.overlay.delete(done)
            log.info("serve: %d observations are in their users' rows", len(done))
        self._is_marked = False
