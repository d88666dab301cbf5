"""The events table as a server keeps it: who acted on what, and where the observations landed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mtl.schema import EVENT_ID, EVENTS, INPUT_ID, LABEL, USER_ID
from mtl.serving.records import DIGEST_BYTES, digest
from mtl.serving.source import Commit, Rewritten, Source
from mtl.serving.store import Acts, Store
from mtl.serving.takeover import Takeover

log = logging.getLogger("mtl")

POPULAR = 1000  # inputs kept as the most frequent
_COLUMNS = (EVENT_ID, USER_ID, INPUT_ID, LABEL)
_ROWS_AT_ONCE = 500_000  # of events


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
        waiting = self.takeover.not_landed()
        try:
            for commit in self.source.commits(EVENTS, after, through):
                if commit.reload:
                    raise Rewritten
                self.store.write_events(commit.version, self._added(commit, waiting))
        except Rewritten:
            log.info("serve: events were erased, or their log or files begin later: reading the table")
            self.takeover.ask(waiting)
            self.store.write_events(through, self._all(through), anew=True)
        self.store.write_popular(POPULAR)
        return True

    def _added(self, commit: Commit, waiting: dict[str, bytes]) -> Iterator[Acts]:
        for file in commit.files:
            rows = self.source.rows(EVENTS, file, _COLUMNS)
            self.takeover.land(waiting, rows[EVENT_ID].to_pylist(), (commit.version, file.index))
            yield from _acts(rows)

    def _all(self, version: int) -> Iterator[Acts]:
        some = list[pa.RecordBatch]()  # they are of some thousand rows
        for batch in self.source.query(EVENTS, f"select {USER_ID}, {INPUT_ID}, {LABEL} from t", version):
            some.append(batch)
            if sum(one.num_rows for one in some) >= _ROWS_AT_ONCE:
                yield from _acts(pa.Table.from_batches(some))
                some.clear()
        if some:
            yield from _acts(pa.Table.from_batches(some))


def _acts(rows: pa.Table) -> Iterator[Acts]:
    for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
        part = rows.slice(first, _ROWS_AT_ONCE)
        users, inputs = _digests(part[USER_ID]), _digests(part[INPUT_ID])
        order = np.argsort(users.view(">u8")[::2], kind="stable")  # their first halves tell nearly all of them apart
        totals = part.group_by(INPUT_ID).aggregate([(LABEL, "count"), (LABEL, "sum")])
        yield Acts(
            list(zip(users[order].tolist(), inputs[order].tolist(), strict=True)),
            list(zip(*(column.to_pylist() for column in totals.columns), strict=True)),
        )


def _digests(ids: pa.ChunkedArray) -> np.ndarray:
    """(n,) of bytes."""
    of = ids.combine_chunks().dictionary_encode()
    distinct = b"".join(map(digest, of.dictionary.to_pylist()))
    return np.frombuffer(distinct, f"V{DIGEST_BYTES}")[of.indices.to_numpy()]
