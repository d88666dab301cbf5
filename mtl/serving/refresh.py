"""The store kept like the tables: only what changed is read, and what is shown changes at once.

One cycle reads the tables' latest commits, users first: every event that these users contain is then in the events table as
far as it is read afterwards. See :mod:`mtl.serving.overlay` for how a user's new row takes over from its observations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace

from mtl import gaussian, schema
from mtl.arrow import matrix
from mtl.errors import StateError
from mtl.features import from_rows
from mtl.model import Model, model_of
from mtl.schema import EVENTS, FEATURES, INPUT_ID, INPUTS, MODELS, USER_ATTRIBUTES, USER_ID, USERS
from mtl.serving import scorer
from mtl.serving.coverage import Coverage
from mtl.serving.history import History
from mtl.serving.overlay import Overlay, Status
from mtl.serving.records import cycle_of, digest, is_described_only, pack_described, pack_users
from mtl.serving.source import Rewritten, Source
from mtl.serving.store import Live, Store, new_feature_files, prefix, rewrite_features, write_features
from mtl.serving.takeover import GRACE_SECONDS, Takeover

log = logging.getLogger("mtl")

_CYCLE = "cycle"
_LOADED = (MODELS, USERS, FEATURES, USER_ATTRIBUTES)  # tables that a version is loaded from
_USER_COLUMNS = (USER_ID, schema.A, schema.B, schema.PRIOR_MEAN, schema.N_EVENTS)
_TOLD = (
    schema.MODEL_VERSION,
    schema.STATUS,
    schema.LOSS,
    schema.K,
    schema.N_EVENTS,
    schema.EVENTS_VERSION,
    schema.NOISE,
    schema.CREATED_AT,
    schema.PROMOTED_AT,
)
_ROWS_AT_ONCE = 20_000
_IDENTIFY_SECONDS = 60.0  # between two looks whether the tables are still those that are copied


@dataclass
class Refresher:
    """Keeps one store; one an overlay.

    Args:
        version: the model version that is followed; None: the live one, whichever that is.
    """

    source: Source
    store: Store
    overlay: Overlay
    version: int | None = None
    takeover: Takeover = field(init=False)
    history: History = field(init=False)
    _model: Model | None = None
    _commits: dict[str, int] = field(default_factory=dict)  # of the cycle in hand
    _identified_at: float = -np.inf

    def __post_init__(self) -> None:
        self.takeover = Takeover(self.source, self.store, self.overlay)
        self.history = History(self.source, self.store, self.takeover)

    def refresh(self) -> bool:
        """One cycle; whether anything that is shown changed.

        Raises:
            UNREADABLE of :mod:`mtl.serving.source`: the tables cannot be read; what is shown stays.
        """
        started = time.time()
        try:
            changed = self._cycle()
        except BaseException:
            self.takeover.forget()
            raise
        self.overlay.tell(Status(checked_at=started))
        return changed

    def _cycle(self) -> bool:
        self._commits = {
            table: version
            for table in (MODELS, USERS, FEATURES, INPUTS, USER_ATTRIBUTES, EVENTS)
            if (version := self.source.version(table)) is not None
        }
        with self.store.reading() as transaction:
            live, before = self.store.live(transaction), self.store.versions(transaction)
        self._check(before)
        changed = False
        if live is not None:
            changed |= self.history.read(before.get(EVENTS, -1), self._commits.get(EVENTS, -1))
        changed |= self._read_attributes(before)
        row = self._live_row(before)
        if row is not None and (live is None or row[schema.MODEL_VERSION] != live.model_version):
            if live is None:  # what came before all of this may be in these users
                self.takeover.ask(self.takeover.not_landed())
            self._load(row, before)
            if live is None:
                self.history.read(before.get(EVENTS, -1), self._commits.get(EVENTS, -1))
            changed = True
        elif live is not None:
            changed |= self._follow(live, before)
        self.takeover.delete_covered()
        return changed

    def _check(self, before: dict[str, int]) -> None:
        """Refuse tables that were made anew, or are older than what was read: their numbers of commits mean something else."""
        are_others = any(self._commits.get(table, -1) < before.get(table, -1) for table in (MODELS, EVENTS))
        if not are_others and MODELS in self._commits and time.monotonic() > self._identified_at + _IDENTIFY_SECONDS:
            known, identity = self.store.identity(), self.source.identity(MODELS)
            if known is None:
                self.store.write_identity(identity)
            are_others = known not in (None, identity)
            self._identified_at = -np.inf if are_others else time.monotonic()
        if are_others:
            raise StateError(
                f"the tables under {self.source.root} are gone or were made anew; this server goes on with what it has. "
                f"For the new ones stop it and name another serve.store; the logs in {self.store.folder} are only there"
            )

    # The version that is shown, which the store calls live.

    def _live_row(self, before: dict[str, int]) -> dict[str, Any] | None:
        """The row of the models table, if that table changed.

        Raises:
            StateError: there is no such version as is to be followed.
        """
        if MODELS not in self._commits or self._commits[MODELS] == before.get(MODELS):
            return None
        columns = ", ".join(_TOLD)
        rows = [
            row
            for part in self.source.query(MODELS, f"select {columns} from t", self._commits[MODELS])
            for row in part.to_pylist()
        ]
        self.store.write_model_list([_portable(row) for row in rows])
        which = f"{schema.MODEL_VERSION} = {self.version}" if self.version else f"{schema.STATUS} = '{schema.LIVE}'"
        sql = f"select * from t where {which}"
        for batch in self.source.query(MODELS, sql, self._commits[MODELS]):
            for row in batch.to_pylist():
                return row
        if self.version:
            raise StateError(f"there is no model version {self.version} (serve.rivals)")
        return None

    def _load(self, row: dict[str, Any], before: dict[str, int]) -> None:
        """Everything of another version beside what is shown, then the switch."""
        model, cycle = model_of(row), self._begin_cycle(before)
        version = model.version
        log.info("serve: loading model version %d", version)
        self.store.write_model(version, _portable(row))
        live = self._load_features(model)
        self._load_users(model, cycle)
        if (covered := self.takeover.coverage(model, self._commits[USERS], self._commits.get(EVENTS, -1))) is not None:
            self.takeover.mark(covered, cycle, None)
        commits = {name: self._commits[name] for name in _LOADED if name in self._commits}
        self.store.write_live(replace(live, switched_at=time.time()), **commits)
        self._model = model
        log.info("serve: model version %d is shown, %d inputs", version, live.n_inputs)

    def _load_features(self, model: Model) -> Live:
        n = 0
        features, top = new_feature_files(model.version)
        sql = f"select * from t where {schema.MODEL_VERSION} = {model.version}"
        count = f"select count(*) from t where {schema.MODEL_VERSION} = {model.version}"
        total = next(self.source.query(FEATURES, count, self._commits[FEATURES])).column(0)[0].as_py()
        live = Live(
            model.version, model.d, self.store.new_generation(), features, top, 0, int(total * 1.25) + 1024, 0.0
        )
        for batch in self.source.query(FEATURES, sql, self._commits[FEATURES]):
            n = self._append_features(live, n, pa.table(batch))
        return replace(live, n_inputs=n)

    def _append_features(self, live: Live, first: int, rows: pa.Table) -> int:
        """Put rows of the features table behind the first ones; how many there are then."""
        if not rows.num_rows:
            return first
        packed = scorer.feature_rows(from_rows(rows, live.d))
        write_features(self.store.folder, live, first, packed, scorer.top_columns(packed, live.d))
        self.store.write_input_ids(live.generation, first, rows[INPUT_ID].to_pylist())
        return first + rows.num_rows

    def _load_users(self, model: Model, cycle: int) -> None:
        columns = ", ".join(f'"{name}"' for name in _USER_COLUMNS)
        sql = f"select {columns} from t where {schema.MODEL_VERSION} = {model.version}"
        batches = self.source.query(USERS, sql, self._commits[USERS])
        records = (record for batch in batches for record in _user_records(pa.table(batch), model, cycle))
        self.store.write_users(model.version, records)
        if USER_ATTRIBUTES in self._commits:
            for batch in self.source.query(USER_ATTRIBUTES, "select * from t", self._commits[USER_ATTRIBUTES]):
                self._describe_users(model, pa.table(batch), cycle, whole=True)
        self.store.delete_users_before(model.version, cycle)

    def _describe_users(self, model: Model, attributes: pa.Table, cycle: int, whole: bool = False) -> None:
        """Weights of users of whom there is no event; in a ``whole`` reading, of whom no row was met in this cycle."""
        for first in range(0, attributes.num_rows, _ROWS_AT_ONCE):
            rows = attributes.slice(first, _ROWS_AT_ONCE)
            users = [digest(user) for user in rows[USER_ID].to_pylist()]
            with self.store.reading() as transaction:
                records = [self.store.user(transaction, prefix(model.version), user) for user in users]
                place = [
                    i
                    for i, record in enumerate(records)
                    if record is None or is_described_only(record, model.d) or (whole and cycle_of(record) != cycle)
                ]
            if place:
                frame = rows.take(pa.array(place)).drop_columns([USER_ID]).to_pandas()
                means = model.weights_without_events(model.prior_mean_of_new(frame))
                described = zip((users[i] for i in place), means, strict=True)
                self.store.write_users(model.version, ((user, pack_described(cycle, mean)) for user, mean in described))

    # What changed in it.

    def _follow(self, live: Live, before: dict[str, int]) -> bool:
        """Bring the version that is shown up to the tables."""
        commits = self._commits
        moved = {table: commits.get(table, -1) for table in (USERS, FEATURES, MODELS, USER_ATTRIBUTES)}
        moved = {table: commit for table, commit in moved.items() if commit != before.get(table, -1)}
        users, events = commits.get(USERS, -1), commits.get(EVENTS, -1)
        asks = self.takeover.asks(users, events)
        if not moved and not asks:
            return False
        model, changed = self._model_of(live), False
        if FEATURES in moved:
            changed |= self._follow_features(live, before.get(FEATURES, -1))
        covered = self.takeover.coverage(model, users, events) if asks or USERS in moved else None
        if USERS in moved:
            changed |= self._follow_users(model, before, covered)
        elif covered is not None:
            self.takeover.mark(covered, 0, set())
        if USER_ATTRIBUTES in moved:
            self._follow_user_attributes(model, before, covered)
        if moved:
            self.store.write_versions(**moved)
        self._clean()
        return changed

    def _follow_features(self, live: Live, after: int) -> bool:
        try:
            added = [
                self.source.rows(FEATURES, file)
                for file in self.source.added(FEATURES, after, self._commits[FEATURES], live.model_version)
            ]
        except Rewritten:
            log.info("serve: the features table was rewritten: reading it anew")
            added = None
        last = _last_with(rows[INPUT_ID].to_pylist() for rows in added or ())
        new = [
            self._without_known(live, _only_last(rows, INPUT_ID, last, number))
            for number, rows in enumerate(added or ())
        ]
        n = live.n_inputs + sum(rows.num_rows for rows in new)
        if added is None or n > live.capacity:
            self.store.write_live(replace(self._load_features(self._model_of(live)), switched_at=time.time()))
            return True
        first = live.n_inputs
        for rows in new:
            first = self._append_features(live, first, rows)
        if n > live.n_inputs:
            self.store.write_live(replace(live, n_inputs=n))
        return bool(added)

    def _without_known(self, live: Live, rows: pa.Table) -> pa.Table:
        """The rows of inputs that the store does not have; those that it has it has anew (:mod:`mtl.arrivals`).

        They are written where they are, and seen at once: a reader may for an instant have one row half old, half new.
        """
        with self.store.reading() as transaction:
            generation = prefix(live.generation)
            places = [self.store.input_row(transaction, generation, digest(i)) for i in rows[INPUT_ID].to_pylist()]
        known = np.array([place is not None and place < live.n_inputs for place in places], bool)
        if known.any():
            packed = scorer.feature_rows(from_rows(rows.filter(pa.array(known)), live.d))
            at = np.array([place for place, is_known in zip(places, known, strict=True) if is_known])
            rewrite_features(self.store.folder, live, at, packed, scorer.top_columns(packed, live.d))
        return rows.filter(pa.array(~known))

    def _follow_users(self, model: Model, before: dict[str, int], covered: Coverage | None) -> bool:
        try:
            return self._follow_files_of_users(model, before, covered)
        except Rewritten:
            self._reload_users(model, before, covered)
            return True

    def _follow_files_of_users(self, model: Model, before: dict[str, int], covered: Coverage | None) -> bool:
        files = list(self.source.added(USERS, before.get(USERS, -1), self._commits[USERS], model.version))
        if not files:
            if covered is not None:
                self.takeover.mark(covered, 0, set())
            return False
        last = _last_with(self.source.rows(USERS, file, [USER_ID])[USER_ID].to_pylist() for file in files)
        cycle = self._begin_cycle(before)
        if covered is not None:
            self.takeover.mark(covered, cycle, {digest(user) for user in last})
        for number, file in enumerate(files):
            rows = _only_last(self.source.rows(USERS, file, _USER_COLUMNS), USER_ID, last, number)
            self.store.write_users(model.version, _user_records(rows, model, cycle))
        return True

    def _reload_users(self, model: Model, before: dict[str, int], covered: Coverage | None) -> None:
        log.info("serve: users were rewritten or erased: reading all of them anew")
        cycle = self._begin_cycle(before)
        if covered is not None:
            self.takeover.mark(covered, cycle, None)
        self._load_users(model, cycle)

    def _follow_user_attributes(self, model: Model, before: dict[str, int], covered: Coverage | None) -> None:
        cycle, after = before.get(_CYCLE, 0), before.get(USER_ATTRIBUTES, -1)
        try:
            for file in self.source.added(USER_ATTRIBUTES, after, self._commits[USER_ATTRIBUTES], None):
                self._describe_users(model, self.source.rows(USER_ATTRIBUTES, file), cycle)
        except Rewritten:  # users of attributes alone may be gone
            self._reload_users(model, before, covered)

    def _read_attributes(self, before: dict[str, int]) -> bool:
        """Attributes of inputs, for those that have no features yet and for showing."""
        if INPUTS not in self._commits or self._commits[INPUTS] == before.get(INPUTS):
            return False
        for rows in self._changed_rows(INPUTS, before.get(INPUTS, -1)):
            values = rows.drop_columns([INPUT_ID]).to_pylist()
            self.store.write_attributes(zip(rows[INPUT_ID].to_pylist(), values, strict=True))
        self.store.write_versions(inputs=self._commits[INPUTS])
        return True

    def _changed_rows(self, table: str, after: int) -> Iterator[pa.Table]:
        """Rows that changed, some perhaps twice: the newest comes last."""
        try:
            if after < 0:
                raise Rewritten
            for file in self.source.added(table, after, self._commits[table], None):
                yield self.source.rows(table, file)
        except Rewritten:
            for batch in self.source.query(table, "select * from t", self._commits[table]):
                yield pa.table(batch)

    # Housekeeping.

    def _begin_cycle(self, before: dict[str, int]) -> int:
        """A number larger than any that a row or a mark has."""
        before[_CYCLE] = before.get(_CYCLE, 0) + 1
        self.store.write_versions(**{_CYCLE: before[_CYCLE]})
        return before[_CYCLE]

    def _clean(self) -> None:
        """Delete versions that no worker reads any more."""
        with self.store.reading() as transaction:
            live = self.store.live(transaction)
        if live is not None and time.time() - live.switched_at > GRACE_SECONDS:
            self.store.delete_other_versions(live)

    def _model_of(self, live: Live) -> Model:
        if self._model is None or self._model.version != live.model_version:
            with self.store.reading() as transaction:
                row = self.store.model_row(transaction, live.model_version)
            assert row is not None
            self._model = model_of(row)
        return self._model


def _user_records(rows: pa.Table, model: Model, cycle: int) -> Iterator[tuple[bytes, bytes]]:
    """(digest, record) of rows of the users table, their posteriors computed many at once."""
    d = model.d
    for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
        part = rows.slice(first, _ROWS_AT_ONCE)
        known = model.user_posteriors(
            matrix(part[schema.A], gaussian.packed_length(d)),
            matrix(part[schema.B], d),
            matrix(part[schema.PRIOR_MEAN], d),
        )
        users = np.concatenate([known.mean, scorer.quadratics(known.mean, known.covariance)], axis=1)
        digests = (digest(user) for user in part[USER_ID].to_pylist())
        yield from zip(digests, pack_users(cycle, part[schema.N_EVENTS].to_pylist(), users), strict=True)


def _last_with(files: Iterable[Iterable[str]]) -> dict[str, int]:
    """The number of the last of several files that has an id, by id: what is newer wins."""
    last: dict[str, int] = {}
    for number, ids in enumerate(files):
        last.update(dict.fromkeys(ids, number))
    return last


def _only_last(rows: pa.Table, key: str, last: dict[str, int], number: int) -> pa.Table:
    """The rows of file ``number`` of which no later file has another."""
    return rows.filter(pa.array([last[identity] == number for identity in rows[key].to_pylist()], pa.bool_()))


def _portable(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the models table as the store keeps it: times as text."""
    return {key: value.isoformat() if hasattr(value, "isoformat") else value for key, value in row.items()}
