"""Model versions that compete in one server: which of them answers, and what their decisions earned.

Beside the live version there are *rivals*, each with a copy of the tables, observations and a refresher of its own: what a
server of that version would have. An observation is put into the observations of all, and so counts once in each.

A rival competes while the update job follows it, as a candidate newer than the live version or as that itself. One that was
refused, retired or overtaken is not answered from, nor told of observations: nobody would take them off its hands.

Rewards are summed in one small LMDB environment that all workers share: those over propensities apart for every set of
competing versions, for what a version earned against others says nothing of a newcomer. The truth are the logs of decisions and
rewards: from them it is made anew whenever the server starts.
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lmdb
import msgspec
import numpy as np

from mtl import schema
from mtl.config import ServeSettings
from mtl.errors import StateError
from mtl.serving import bandit
from mtl.serving.api import Competitor
from mtl.serving.bandit import Decision, FixedSplit, Rewards, VersionPolicy, is_reward
from mtl.serving.observations import Decided, Rewarded
from mtl.serving.overlay import Overlay
from mtl.serving.records import digest
from mtl.serving.store import Store
from mtl.serving.view import View

log = logging.getLogger("mtl")

_SIZE = 8 << 30  # of address space
_TABLES = (b"decisions-0", b"decisions-1", b"sums")  # when one of decisions is full the other one is emptied
_CURRENT = b"current"  # which of them is written to
REMEMBERED = 5_000_000  # decisions
_AT_ONCE = 10_000  # rows of the logs a transaction

Row = TypeVar("Row", Decided, Rewarded)
NextView = Callable[[Store, Overlay, View | None], View | None]  # (store, observations, the view before) → the view


class Record:
    """Rewards of all versions, and decisions whose reward is not known yet.

    Passed over are rewards of a decision but the first, and of decisions that were followed by :data:`REMEMBERED` others
    without a reward, or more.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = lmdb.open(str(folder), map_size=_SIZE, max_dbs=len(_TABLES), max_readers=512, sync=False)
        self.environment.reader_check()  # a process that was killed while it read holds pages
        *self._decisions, self._sums = map(self.environment.open_db, _TABLES)

    def close(self) -> None:
        self.environment.close()

    def add(self, rows: Sequence[Decided | Rewarded]) -> None:
        """Decisions, and rewards of decisions."""
        with self.environment.begin(write=True) as transaction:
            for row in rows:
                if isinstance(row, Decided):
                    told = msgspec.msgpack.encode((row.model_version, row.version_propensity, row.versions))
                    transaction.put(digest(row.decision_id), told, db=self._with_room(transaction))
                else:
                    self._reward(transaction, row)

    def _reward(self, transaction: lmdb.Transaction, row: Rewarded) -> None:
        found = (transaction.pop(digest(row.decision_id), db=decisions) for decisions in self._decisions)
        told = next((value for value in found if value is not None), None)
        if told is None or not is_reward(row.reward):  # of one that is rewarded already; of before versions competed
            return
        version, propensity, versions = msgspec.msgpack.decode(told, type=tuple[int, float, list[int]])
        if version not in versions:
            return
        sums = self._rewards(transaction, versions)
        sums += Rewards.one(len(versions), Decision(versions.index(version), propensity), row.reward)
        for at, one in enumerate(versions):
            earned = msgspec.msgpack.encode((float(sums.n[at]), float(sums.total[at])))
            transaction.put(_key(one), earned, db=self._sums)
            transaction.put(_key(one, versions), msgspec.msgpack.encode(float(sums.weighted[at])), db=self._sums)

    def _with_room(self, transaction: lmdb.Transaction) -> Any:
        """Where the next decision goes."""
        current = transaction.get(_CURRENT, db=self._sums) == b"1"
        if transaction.stat(self._decisions[current])["entries"] >= REMEMBERED:
            current = not current
            transaction.drop(self._decisions[current], delete=False)
            transaction.put(_CURRENT, b"1" if current else b"0", db=self._sums)
        return self._decisions[current]

    def rewards(self, versions: Sequence[int]) -> Rewards:
        """What the versions' decisions earned, of those whose reward is known."""
        with self.environment.begin() as transaction:
            return self._rewards(transaction, versions)

    def _rewards(self, transaction: lmdb.Transaction, versions: Sequence[int]) -> Rewards:
        def told(key: bytes, nothing: Any) -> Any:
            value = transaction.get(key, db=self._sums)
            return nothing if value is None else msgspec.msgpack.decode(value)

        n, total = np.array([told(_key(one), (0.0, 0.0)) for one in versions]).T
        return Rewards(n, total, np.array([told(_key(one, versions), 0.0) for one in versions]))


def make_record(folder: Path, decisions: Path, feedback: Path) -> None:
    """The record anew from the logs; to be called by one process, before the workers are there. Rewards are all in memory.

    Raises:
        StateError: a line of a log is damaged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    record, rewards = Record(folder), dict[str, Rewarded]()
    for told in _parts(feedback, Rewarded):
        for reward in told:
            rewards.setdefault(reward.decision_id, reward)
    for choices in _parts(decisions, Decided):
        record.add([row for one in choices for row in (one, rewards.pop(one.decision_id, None)) if row is not None])
    record.close()


def _parts(log: Path, kind: type[Row]) -> Iterator[list[Row]]:
    """Rows of all segments of a log, the open ones of workers that died included, which are the newest.

    Raises:
        StateError: a line is damaged.
    """
    decode, part = msgspec.json.Decoder(kind).decode, list[Row]()
    for path in sorted(log.glob("*.jsonl"), key=lambda path: (path.name.startswith("."), path.name)):
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never acknowledged
        for number, line in enumerate(lines, 1):
            try:
                part.append(decode(line))
            except msgspec.DecodeError as error:
                raise StateError(f"{path}: line {number} is damaged ({error}): move the file elsewhere") from None
            if len(part) == _AT_ONCE:
                yield part
                part = []
    if part:
        yield part


@dataclass
class Rival:
    """One worker's sight of a version beside the live one."""

    store: Store
    overlay: Overlay
    version: int
    view: View | None = None  # None: not read from the tables yet, or over
    is_over: bool = False  # no stream follows it

    def look(self, next_view: NextView) -> None:
        """Take over what its store shows now."""
        with self.store.reading() as transaction:
            models = self.store.model_list(transaction)
        was_over, self.is_over = self.is_over, bool(models) and not _is_followed(self.version, models)
        if self.is_over != was_over:
            log.info("serve: version %d %s", self.version, "competes no more" if self.is_over else "competes again")
        self.view = None if self.is_over else next_view(self.store, self.overlay, self.view)


class Drawn(NamedTuple):
    """Who answers, and the chance that it had."""

    view: View
    propensity: float
    versions: list[int]  # that might have been drawn


@dataclass
class Contest(ABC):
    """Says which version answers; one a worker."""

    rivals: Sequence[Rival]
    record: Record

    @abstractmethod
    def draw(self, live: View, user: str) -> Drawn:
        """A version for a decision."""

    def assigned(self, live: View, user: str) -> View:
        """The version that answers a user where no decision is made."""
        return live

    def look(self, next_view: NextView) -> None:
        """Take over what the rivals' stores show now."""
        for rival in self.rivals:
            rival.look(next_view)

    def competitors(self, live: View) -> dict[int, View]:
        """The live version, in place 0, and the rivals that can answer, in theirs."""
        shown = {place: rival.view for place, rival in enumerate(self.rivals, 1) if rival.view is not None}
        return {0: live, **{place: view for place, view in shown.items() if view.version != live.version}}

    def competing(self, live: View) -> list[Competitor]:
        """How they stand."""
        versions = [view.version for view in self.competitors(live).values()]
        rewards = self.record.rewards(versions)
        sums = zip(versions, rewards.n.tolist(), rewards.total.tolist(), strict=True)
        return [Competitor(version, int(n), total / n if n else None) for version, n, total in sums]


@dataclass
class ByRewards(Contest):
    """Draws a version anew for every decision."""

    policy: VersionPolicy

    def draw(self, live: View, user: str) -> Drawn:
        views = list(self.competitors(live).values())
        versions = [view.version for view in views]
        if len(views) == 1:
            return Drawn(live, 1.0, versions)
        rewards = self.record.rewards(versions)
        place, propensity = self.policy.choose(rewards, np.random.default_rng())  # not safe to share between threads
        return Drawn(views[place], propensity, versions)


@dataclass
class ByUser(Contest):
    """Gives every user one version, for decisions and all else.

    Args:
        shares: of the live version and of each rival.
    """

    shares: Sequence[float]

    def draw(self, live: View, user: str) -> Drawn:
        competitors = self.competitors(live)
        views = list(competitors.values())
        place, propensity = FixedSplit([self.shares[place] for place in competitors]).choose(user)
        return Drawn(views[place], propensity, [view.version for view in views])

    def assigned(self, live: View, user: str) -> View:
        return self.draw(live, user).view


def contest_of(settings: ServeSettings, rivals: Sequence[Rival], record: Record) -> Contest:
    """By its name in serve.contest."""
    if settings.contest == "split":
        return ByUser(rivals, record, settings.contest_shares or [1.0] * (1 + len(rivals)))
    return ByRewards(rivals, record, bandit.Exp3() if settings.contest == "exp3" else bandit.ThompsonVersions())


def _is_followed(version: int, models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the update job has a stream of the version."""
    status = {row[schema.MODEL_VERSION]: row[schema.STATUS] for row in models}
    live = max((one for one, its in status.items() if its == schema.LIVE), default=0)
    return version == live or (status.get(version) == schema.CANDIDATE and version > live)


def _key(version: int, among: Sequence[int] = ()) -> bytes:
    return b"".join(one.to_bytes(8, "big") for one in (version, *sorted(among)))
