"""The store against tables that another hand wrote, without Spark: what a refresh makes of commits, files and their loss."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake
from made_up import MU, VERSION, covariances, features, model_row

from mtl import gaussian, schema
from mtl.arrow import lists
from mtl.config import load_settings
from mtl.errors import StateError
from mtl.features import Features, feature_rows
from mtl.layout import PARTITIONED_BY
from mtl.schema import (
    EVENT_ID,
    EVENTS,
    FEATURES,
    INPUT_ID,
    INPUTS,
    LABEL,
    LEDGER,
    MODELS,
    USER_ATTRIBUTES,
    USER_ID,
    USERS,
)
from mtl.serving import ranking, takeover
from mtl.serving.observations import Event
from mtl.serving.overlay import open_overlay
from mtl.serving.records import digest
from mtl.serving.refresh import Refresher
from mtl.serving.scorer import Weights, covariance_of
from mtl.serving.source import Source
from mtl.serving.store import Store
from mtl.serving.view import View, open_view
from mtl.zeros import WithZeros

K = 2
D = K + 1


class Tables:
    """Tables of one model version, and a store that follows them."""

    def __init__(self, folder: Path, zeros: float = 0.0):
        """Args: zeros: weight of implicit feedback."""
        self.root, self.random = folder / "tables", np.random.default_rng(0)
        row = {**model_row(K), schema.EVENTS_VERSION: 0, schema.N_EVENTS: 1}
        row |= {schema.CREATED_AT: datetime.now(timezone.utc), schema.PROMOTED_AT: datetime.now(timezone.utc)}
        if zeros:
            artefact = cloudpickle.loads(row[schema.ARTEFACT])
            users = WithZeros.of(artefact.users, features(self.random, 50, D), zeros)
            row[schema.ARTEFACT] = cloudpickle.dumps(replace(artefact, users=users))
        kinds = {schema.INPUT_COLUMNS: pa.list_(pa.int32()), schema.USER_COLUMNS: pa.list_(pa.int32())}
        self.append(MODELS, pa.table({name: pa.array([value], kinds.get(name)) for name, value in row.items()}))
        self.features("x0", "x1")
        self.users("u0", "u1")
        self.events("e0", user="u0", input="x0")
        nothing = {
            name: pa.array([], pa.string())
            for name in (schema.QUERY, schema.APPLICATION_ID, schema.BATCH_ID, schema.OFFSETS)
        }
        self.append(LEDGER, pa.table(nothing))
        self.store, self.overlay = Store(folder / "store", 1), open_overlay(folder / "store", [])
        self.refresher = Refresher(Source(str(self.root)), self.store, self.overlay)
        self.view: View | None = None

    def append(self, table: str, rows: pa.Table, metadata: str = "", mode: str = "append") -> None:
        by = PARTITIONED_BY.get(table)
        properties = CommitProperties(custom_metadata={"userMetadata": metadata}) if metadata else None
        write_deltalake(self.root / table, rows, mode=mode, partition_by=by, commit_properties=properties)  # type: ignore[call-overload]

    def features(self, *inputs: str, offset: float = 0.0) -> None:
        mean = self.random.normal(size=(len(inputs), D)) * 0.1
        mean[:, 0] += offset
        made = Features.of(mean, covariances(self.random, len(inputs), D, 0.05), MU)
        no_residual, no_implicit = np.zeros((len(inputs), D)), np.zeros((len(inputs), 0))
        self.append(FEATURES, feature_rows(VERSION, pa.array(inputs), made, no_residual, no_implicit))

    def users(self, *users: str, n_events: int = 1, version: int = VERSION) -> None:
        n = len(users)
        nothing = {schema.A: np.zeros((n, gaussian.packed_length(D))), schema.B: np.zeros((n, D))}
        columns = {name: lists(values) for name, values in {**nothing, schema.PRIOR_MEAN: np.zeros((n, D))}.items()}
        ids = {schema.MODEL_VERSION: pa.array([version] * n), USER_ID: pa.array(users)}
        self.append(USERS, pa.table({**ids, **columns, schema.N_EVENTS: pa.array([n_events] * n)}))

    def events(self, *ids: str, user: str = "u0", input: str = "x0", **more: str) -> None:
        n = len(ids)
        columns: dict[str, list[Any]] = {
            EVENT_ID: list(ids),
            USER_ID: [user] * n,
            INPUT_ID: [input] * n,
            LABEL: [4.0] * n,
        }
        self.append(EVENTS, pa.table(columns), **more)

    def lose_files(self, table: str) -> None:
        """Compacted, then vacuumed: the log still names files that are gone."""
        of = DeltaTable(self.root / table)
        assert of.optimize.compact()["numFilesRemoved"] > 1
        assert of.vacuum(0, dry_run=False, enforce_retention_duration=False)

    def observed(
        self, event: str, user: str, input: str, look_up: bool = False, covered: tuple[int, int] | None = None
    ) -> None:
        """An observation; ``covered``: one that landed, and is marked so."""
        self.overlay.insert([(Event(event, user, input, 4.0, 1.0, "2026-01-01T00:00:00+00:00"), look_up)])
        if covered:
            every = {key: p for key, p in self.overlay.every().items() if p.event.event_id == event}
            for pending in every.values():
                pending.landed, pending.covered = (1, 0), covered
            self.overlay.write(every)

    def refresh(self) -> View:
        self.refresher.refresh()
        self.view = open_view(self.store, self.overlay, load_settings().serve, self.view)
        assert self.view is not None
        return self.view

    def counts(self) -> dict[str, int]:
        with self.store.reading() as transaction:
            inputs = {one: self.store.count(transaction, one)[0] for one in ("x0", "x1")}
        return {one: n for one, n in inputs.items() if n}

    def seen(self, user: str) -> int:
        with self.store.reading() as transaction:
            return len(self.store.seen(transaction, digest(user)))


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    made = Tables(tmp_path)
    yield made
    made.store.close()
    made.overlay.close()


def test_an_input_that_came_and_was_learnt_between_two_looks_is_there_once(tables: Tables) -> None:
    tables.refresh()
    tables.features("new")  # materialized,
    tables.features("new", offset=9.0)  # and learnt of
    view = tables.refresh()
    every = view.ids(range(len(view.rows)))
    assert Counter(every) == Counter(["x0", "x1", "new"])
    assert view.ids(view.best(view.unknown_weights, 1)) == ["new"]
    assert view.rows_of(["new"]).rows[0, -1] > MU + 8


@pytest.mark.parametrize("table", [FEATURES, USERS, INPUTS])
def test_files_that_are_gone_are_read_by_the_whole_table(tables: Tables, table: str) -> None:
    tables.append(INPUTS, pa.table({INPUT_ID: ["x0"], "year": [1.0]}))
    tables.refresh()
    tables.features("x2")
    tables.users("u2", n_events=7)
    tables.append(INPUTS, pa.table({INPUT_ID: ["x2"], "year": [3.0]}))
    tables.lose_files(table)
    for _ in range(2):
        view = tables.refresh()
        assert sorted(view.ids(range(len(view.rows)))) == ["x0", "x1", "x2"]
        assert ranking.has(view, "x2", {"year": 3.0})
        assert (user := view.weights_of("u2")) is not None
        assert user.n_events == 7


def test_observations_among_events_whose_files_are_gone_count_once(tables: Tables) -> None:
    before = tables.refresh().weights_of("u1")
    for i in range(2):
        tables.observed(f"mine{i}", "u1", "x1")
    tables.events("mine0", user="u1", input="x1")
    tables.events("other", user="u0", input="x0")
    tables.lose_files(EVENTS)
    assert before is not None
    for _ in range(2):
        view = tables.refresh()
        assert tables.counts() == {"x0": 2, "x1": 1}
        landed = {p.event.event_id: p.landed for p in tables.overlay.every().values()}
        # What a lost file had the users contain, or their stream could not go on.
        assert (landed["mine0"] is not None, landed["mine1"]) == (True, None)
        assert (user := view.weights_of("u1")) is not None
        assert user.n_events == before.n_events + 1
        assert tables.overlay.n_asked() == 0


def test_an_id_that_the_tables_had_counts_once_where_only_another_version_s_users_moved(tables: Tables) -> None:
    before = tables.refresh().weights_of("u0")
    assert before is not None
    tables.observed("e0", "u0", "x0", look_up=True)
    tables.users("u0", version=VERSION + 1)
    for _ in range(2):
        user = tables.refresh().weights_of("u0")
        assert user is not None
        assert user.n_events == before.n_events


def test_a_later_cycle_does_not_count_again_what_a_row_contains(tables: Tables) -> None:
    tables.refresh()
    tables.observed("mine", "u1", "x1", covered=(VERSION, 0))
    contains_all: Any = SimpleNamespace(model_version=VERSION, contains=lambda *of: True)
    tables.refresher.takeover.mark(contains_all, 99, None)
    view = open_view(tables.store, tables.overlay, load_settings().serve, None)
    assert view is not None
    assert (user := view.weights_of("u1")) is not None
    assert user.n_events == 1  # the row's alone


def test_observations_that_were_ingested_while_no_copy_was_there_count_once(tables: Tables) -> None:
    tables.observed("e0", "u0", "x0")
    seen: list[int] = []
    switch = tables.store.write_live

    def write_live(*of: Any, **more: Any) -> None:
        switch(*of, **more)
        view = open_view(tables.store, tables.overlay, load_settings().serve, None)
        user = view.weights_of("u0") if view else None
        seen.append(user.n_events if user else 0)

    tables.store.write_live = write_live  # type: ignore[method-assign]
    tables.refresh()
    assert seen == [1]


def test_an_observation_goes_with_its_erased_user(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "GRACE_SECONDS", 0.0)
    tables.refresh()
    tables.observed("mine", "u9", "x1", covered=(VERSION, 5))
    tables.refresher.takeover.forget()  # there are marks to act on
    assert tables.refresh().weights_of("u9") is None
    assert tables.overlay.n_pending() == 0


@pytest.mark.parametrize("failure", [OSError("the network is down"), SystemExit()])
def test_an_erasure_whose_reading_ends_early_is_begun_again(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    tables.events("e1", user="u1", input="x1")
    tables.refresh()
    assert (tables.counts(), tables.seen("u1")) == ({"x0": 1, "x1": 1}, 1)
    tables.events("e0", user="u0", input="x0", metadata=f"{schema.ERASURE}u1", mode="overwrite")
    tables.events("e2", user="u0", input="x0")
    source = tables.refresher.source
    query = source.query

    def fail(table: str, *of: Any) -> Any:
        batches = query(table, *of)
        if table == EVENTS:
            yield next(batches)
            raise failure
        yield from batches

    with monkeypatch.context() as patch:
        patch.setattr("mtl.serving.history._ROWS_AT_ONCE", 1)
        patch.setattr(source, "query", fail)
        with pytest.raises(type(failure)):
            tables.refresh()
    assert (tables.counts(), tables.seen("u1")) == ({"x0": 1, "x1": 1}, 1)  # all or nothing
    tables.refresh()
    assert (tables.counts(), tables.seen("u1")) == ({"x0": 2}, 0)


def test_tables_made_anew_at_the_same_place_are_not_followed(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many commits as there were, too."""
    tables.refresh()
    row = tables.refresher.source.query(MODELS, "select * from t")
    models = pa.Table.from_batches(row)
    shutil.rmtree(tables.root / MODELS)
    tables.append(MODELS, models)
    tables.refresh()  # nobody has looked yet
    monkeypatch.setattr("mtl.serving.refresh._IDENTIFY_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(StateError, match="are gone or were made anew"):
            tables.refresh()


def test_parts_of_a_commit_add_up(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.serving.history._ROWS_AT_ONCE", 2)
    users, inputs = [f"u{i % 3}" for i in range(7)], [f"x{i % 2}" for i in range(7)]
    ids, labels = [f"e{i + 1}" for i in range(7)], [float(i) for i in range(7)]
    tables.append(EVENTS, pa.table({EVENT_ID: ids, USER_ID: users, INPUT_ID: inputs, LABEL: labels}))
    tables.refresh()
    assert tables.counts() == {"x0": 1 + 4, "x1": 3}
    assert [tables.seen(user) for user in ("u0", "u1", "u2")] == [2, 2, 2]
    with tables.store.reading() as transaction:
        assert tables.store.count(transaction, "x1") == (3, 1.0 + 3 + 5)


def test_zeros_speak_of_users_without_events_as_they_do_in_score(tmp_path: Path) -> None:
    """Mean and covariance together: of nobody, of attributes in the tables, and of those of a request."""
    tables = Tables(tmp_path, zeros=0.3)
    tables.append(USER_ATTRIBUTES, pa.table({USER_ID: ["u9"], "age": [1.5]}))
    view = tables.refresh()
    model, nothing = view.model, (np.zeros((1, gaussian.packed_length(D))), np.zeros((1, D)))

    def assert_known(user: Weights | None, attributes: pd.DataFrame) -> None:
        expected = model.user_posteriors(*nothing, model.prior_mean_of_new(attributes))
        assert np.abs(expected.mean - model.prior_mean_of_new(attributes)).max() > 0.1
        assert user is not None
        np.testing.assert_allclose(user.mean, expected.mean[0], atol=1e-9)
        np.testing.assert_allclose(covariance_of(user), expected.covariance[0], atol=1e-9)

    described = pd.DataFrame({"age": [1.5]})
    assert_known(view.unknown_weights, pd.DataFrame(index=[0]))
    assert_known(view.weights_of("u9"), described)
    assert_known(view.weights_of_described({"age": 1.5}), described)
