"""The events table as a server keeps it: who acted on what, and where the observations landed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pyarrow as pa

from mtl.schema import EVENT_ID, EVENTS, INPUT_ID, LABEL, USER_ID
from mtl.serving.records import digest
from mtl.serving.source import Rewritten, Source
from mtl.serving.store import Store
from mtl.serving.takeover import Takeover

log = logging.getLogger("mtl")

POPULAR = 1000  # inputs kept as the most frequent
_COLUMNS = (EVENT_ID, USER_ID, INPUT_ID, LABEL)


@dataclass
class History:
    """Follows the events table into a store."""

    source: Source
    store: Store
    takeover: Takeover

    def read(self, after: int, through: int) -> bool:
        """Take over the commits beyond ``after``; whether there were any.

        Args:
            through: the last one, known before the observations that wait for theirs are listed.
        """
        if through <= after:
            return False
        waiting, done = self.takeover.not_landed(), after
        try:
            for commit in self.source.commits(EVENTS, after, through):
                if commit.reload:
                    raise Rewritten
                tables = []
                for file in commit.files:
                    rows = self.source.rows(EVENTS, file, _COLUMNS)
                    self.takeover.land(waiting, rows[EVENT_ID].to_pylist(), (commit.version, file.index))
                    tables.append(rows)
                rows = pa.concat_tables(tables) if tables else pa.table({name: [] for name in _COLUMNS})
                self._write(rows, commit.version)
                done = commit.version
        except Rewritten:
            self._read_all(waiting, done, through)
        self.store.write_popular(POPULAR)
        return True

    def _read_all(self, waiting: dict[str, bytes], done: int, through: int) -> None:
        """Forget events, and read the table anew; until that has ended the store says ``done``, so that it is begun again."""
        log.info("serve: events were erased, or their log or files begin later: reading the table")
        self.takeover.ask(waiting)
        self.store.forget_events()
        for batch in self.source.query(EVENTS, f"select {', '.join(_COLUMNS)} from t", through):
            self._write(pa.table(batch), done)
        self.store.write_versions(events=through)

    def _write(self, rows: pa.Table, version: int) -> None:
        users = [digest(user) for user in rows[USER_ID].to_pylist()]
        self.store.write_events(version, users, rows[INPUT_ID].to_pylist(), rows[LABEL].to_pylist())
