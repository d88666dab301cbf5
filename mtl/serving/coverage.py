"""Which events a commit of the users table contains, by what the update stream wrote down.

The stream of a model version applies the commits of the events table in order, some files of a commit perhaps in one batch
and the others in the next. Its last batch in commit U of users is U's own transaction marker; the ledger row of this batch,
written before, has the place in the events table up to which it went. What it set aside on the way is in the waiting
table, by event id, and counts when the release that took it is in U.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mtl.schema import (
    APPLICATION_ID,
    BATCH_ID,
    EVENT_ID,
    LEDGER,
    MODEL_VERSION,
    OFFSETS,
    QUERY,
    RELEASED,
    USERS,
    WAITING,
)
from mtl.serving.source import Source

_UPDATE = "update"
_IDS_AT_ONCE = 1000


@dataclass(frozen=True)
class Coverage:
    """Of commit U of users, for one model version."""

    model_version: int
    place: tuple[int, int]  # the first place in the events table (commit, file) that is not contained
    release: int  # the last release that is; −1 where there was none

    def contains(self, landed: tuple[int, int], released: int | None = None, was_set_aside: bool = False) -> bool:
        """Whether an event at a place of the events table is in users.

        Args:
            released: where the stream had set the event aside, the release that took it; None: none yet.
        """
        if was_set_aside:
            return released is not None and released <= self.release
        return landed < self.place


def coverage(source: Source, model_version: int, events_version: int, users_commit: int) -> Coverage:
    """What commit ``users_commit`` of users has of the model version.

    Args:
        events_version: commit of the events table that the version was trained through.
    """
    released = source.transaction(USERS, f"release-v{model_version}", users_commit)
    release = -1 if released is None else released
    rows = source.query(
        LEDGER,
        f"select {APPLICATION_ID}, {BATCH_ID}, {OFFSETS} from t "
        f"where {QUERY} = '{_UPDATE}' and {APPLICATION_ID} like '{_UPDATE}-v{model_version}-%'",
    )
    batches = {
        (row[APPLICATION_ID], row[BATCH_ID]): row[OFFSETS]
        for part in rows
        for row in part.to_pylist()
        if row[OFFSETS] is not None
    }
    place = (events_version + 1, -1)
    for application in {name for name, _ in batches}:
        last = source.transaction(USERS, application, users_commit)
        if last is not None and (application, last) in batches:
            place = max(place, _after(batches[application, last]))
    return Coverage(model_version, place, release)


def set_aside(source: Source, model_version: int, events: Collection[str]) -> dict[str, int | None]:
    """Those of ``events`` (ids) that the stream set aside, with the release that took each, None where none has."""
    if source.version(WAITING) is None:
        return {}
    found = {}
    for part in _parts(sorted(events)):
        rows = source.query(
            WAITING,
            f"select {EVENT_ID}, {RELEASED} from t where {MODEL_VERSION} = {model_version} "
            f"and {EVENT_ID} in ({_quoted(part)})",
        )
        for batch in rows:
            found.update({row[EVENT_ID]: row[RELEASED] for row in batch.to_pylist()})
    return found


def known_before(source: Source, table: str, version: int, events: Collection[str]) -> set[str]:
    """Those of ``events`` (ids) that the events table has as of a commit."""
    found = set()
    for part in _parts(sorted(events)):
        sql = f"select {EVENT_ID} from t where {EVENT_ID} in ({_quoted(part)})"
        for batch in source.query(table, sql, version):
            found.update(batch.column(0).to_pylist())
    return found


def _after(offsets: str) -> tuple[int, int]:
    """The place behind Spark's offset: file ``index`` of a commit is the last that was taken, −1 none of it."""
    offset = json.loads(offsets)
    return offset["reservoirVersion"], offset["index"] + 1 if offset["index"] >= 0 else -1


def _quoted(ids: Sequence[str]) -> str:
    return ", ".join("'" + identity.replace("'", "''") + "'" for identity in ids)


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(ids), _IDS_AT_ONCE):
        yield ids[first : first + _IDS_AT_ONCE]
