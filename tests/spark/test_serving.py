"""The server's copy of real tables: the numbers of mtl.score, and every observation counted once at every moment."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from streaming import TRAINED, append, rows

from mtl.config import Settings, load_settings
from mtl.erase import erase
from mtl.errors import StateError
from mtl.layout import SCHEMAS
from mtl.materialize import materialize
from mtl.models import load_model, promote
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, EVENTS, FEATURES, INPUT_ID, INPUTS, LABEL, USER_ATTRIBUTES, USER_ID, USERS, WEIGHT
from mtl.score import PREDICTION, STD, score
from mtl.serving import takeover
from mtl.serving.observations import Event
from mtl.serving.overlay import open_overlay
from mtl.serving.refresh import Refresher
from mtl.serving.source import Source
from mtl.serving.store import Store
from mtl.serving.view import View, open_view
from mtl.tables import Tables
from mtl.update import update
from mtl.updater import Updater


def settings(*assignments: str) -> Settings:
    return load_settings(
        [], ["tables.root=unused", "model.k=2", "train.iterations=2", "encode.min_category_count=1", *assignments]
    )


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live model over the first events; inputs x0 … x13 and users u0 … u14 and u90 have attributes."""
    root = tmp_path_factory.mktemp("trained") / "tables"
    tables = Tables(spark, str(root))
    tables.create(*SCHEMAS)
    random = np.random.default_rng(0)
    inputs = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(14)], "year": random.normal(size=14)})
    inputs["colour"] = random.choice(["red", "green"], 14)
    users = pd.DataFrame({USER_ID: [*(f"u{i}" for i in range(15)), "u90"], "age": random.normal(size=16)})
    tables.append(INPUTS, spark.createDataFrame(inputs[:13]), evolve=True)
    tables.append(USER_ATTRIBUTES, spark.createDataFrame(users), evolve=True)
    append(tables, rows(np.arange(TRAINED)))
    retrain(tables, settings())
    tables.append(INPUTS, spark.createDataFrame(inputs[13:]))  # x13 has attributes and no features
    return root


class Copy:
    """A store that follows tables."""

    def __init__(self, tables: Tables, folder: Path, version: int | None = None):
        self.tables = tables
        self.store, self.overlay = Store(folder, 1), open_overlay(folder, [])
        self.refresher = Refresher(Source(tables.root), self.store, self.overlay, version)
        self.view: View | None = None

    def refresh(self) -> View:
        self.refresher.refresh()
        return self.look()

    def look(self) -> View:
        self.view = open_view(self.store, self.overlay, load_settings().serve, self.view)
        assert self.view is not None
        return self.view

    def observe(self, events: pd.DataFrame, look_up: bool = False) -> None:
        made = [
            Event(row[EVENT_ID], row[USER_ID], row[INPUT_ID], row[LABEL], row[WEIGHT], "2026-01-01T00:00:00+00:00")
            for row in events.to_dict("records")
        ]
        self.overlay.insert([(event, look_up) for event in made])

    def n_events(self, user: str) -> int:
        weights = self.look().weights_of(user)
        return 0 if weights is None else weights.n_events


@pytest.fixture
def copy(spark: SparkSession, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Copy]:
    monkeypatch.setattr(takeover, "GRACE_SECONDS", 0.0)
    shutil.copytree(trained, tmp_path / "tables")
    copy = Copy(Tables(spark, str(tmp_path / "tables")), tmp_path / "store")
    yield copy
    copy.store.close()
    copy.overlay.close()


def assert_same_as_score(copy: Copy, users: list[str], inputs: list[str]) -> None:
    """Predictions and deviations of the view are those of the job."""
    pairs = pd.DataFrame([(u, x) for u in users for x in inputs], columns=[USER_ID, INPUT_ID])
    model = load_model(copy.tables)
    expected = score(copy.tables, model, copy.tables.spark.createDataFrame(pairs)).toPandas()
    expected = expected.set_index([USER_ID, INPUT_ID])
    view = copy.look()
    assert view.version == model.version
    for user in users:
        weights = view.weights_of(user) or view.unknown_weights
        means, stds = view.score(weights, view.rows_of(inputs).rows)
        wanted = expected.loc[user].loc[inputs]
        np.testing.assert_allclose(means, wanted[PREDICTION], rtol=0, atol=1e-9)
        np.testing.assert_allclose(stds, wanted[STD], rtol=0, atol=1e-9)


USERS_ASKED = ["u0", "u3", "u16", "u90", "nobody"]  # with events, of attributes only, and of nothing
INPUTS_ASKED = ["x0", "x5", "x12", "x13", "nothing"]


def test_the_server_has_the_numbers_of_score_and_keeps_them_as_tables_change(
    copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    copy.refresh()
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)
    append(copy.tables, rows(np.arange(TRAINED, 330)))
    update(copy.tables, settings("update.rewrite_above=0"))
    with caplog.at_level(logging.INFO):
        copy.refresh()
    assert "reading all of them anew" not in caplog.text
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)
    append(copy.tables, rows(np.arange(330, 340)))
    update(copy.tables, settings("update.rewrite_above=1"))
    materialize(copy.tables, load_model(copy.tables))
    described = pd.DataFrame({USER_ID: ["u91"], "age": [0.7]})
    copy.tables.append(USER_ATTRIBUTES, copy.tables.spark.createDataFrame(described))
    copy.refresh()
    assert_same_as_score(copy, [*USERS_ASKED, "u91"], INPUTS_ASKED)
    copy.tables.delta(USERS).optimize().executeCompaction()
    assert copy.refresh().weights_of("u0") is not None
    copy.tables.delta(USERS).delete(F.col(USER_ID) == "u16")  # nobody described: unknown from now on
    assert copy.refresh().weights_of("u16") is None
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)


def test_an_observation_counts_once_before_during_and_after_its_row_comes(copy: Copy) -> None:
    view = copy.refresh()
    mine = rows(np.arange(TRAINED, 290))
    user = mine[USER_ID].value_counts().index[0]
    before, n = view.weights_of(user), int((mine[USER_ID] == user).sum())
    assert before is not None
    copy.observe(mine)
    after = copy.look().weights_of(user)
    assert after is not None
    assert after.n_events == before.n_events + n

    def still() -> None:
        copy.refresh()
        assert copy.n_events(user) == before.n_events + n
        again = copy.look().weights_of(user)
        np.testing.assert_allclose(again.mean, after.mean, atol=1e-9)
        np.testing.assert_allclose(again.quadratic, after.quadratic, atol=1e-8)

    still()
    append(copy.tables, mine)
    still()
    assert copy.overlay.n_pending() == len(mine)  # landed, and in no user yet
    update(copy.tables, settings())
    still()
    assert copy.overlay.n_pending() == 0
    copy.observe(mine)  # a repeat of known ids
    still()
    assert copy.overlay.n_pending() == 0


@pytest.mark.long
def test_files_of_one_commit_that_are_applied_in_different_batches(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    copy.refresh()
    mine = rows(np.arange(TRAINED, 330))
    counts = {user: copy.n_events(user) for user in set(mine[USER_ID])}
    expected = {user: counts[user] + int((mine[USER_ID] == user).sum()) for user in counts}
    copy.observe(mine)
    append(copy.tables, mine, files=3)
    real, batches = Updater.apply, []

    def stop_after_the_first(self: Updater, batch: object, number: int) -> None:
        if batches:
            raise RuntimeError("killed")
        batches.append(number)
        real(self, batch, number)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "apply", stop_after_the_first)
        with pytest.raises(StreamingQueryException, match="killed"):
            update(copy.tables, settings("update.max_files_per_trigger=1"))
    copy.refresh()
    assert 0 < copy.overlay.n_pending() < len(mine)
    assert {user: copy.n_events(user) for user in counts} == expected
    update(copy.tables, settings("update.max_files_per_trigger=1"))
    copy.refresh()
    assert copy.overlay.n_pending() == 0
    assert {user: copy.n_events(user) for user in counts} == expected
    assert_same_as_score(copy, ["u1", "u2"], INPUTS_ASKED)


@pytest.mark.long
def test_an_event_of_an_unknown_input_waits_here_as_it_does_there(copy: Copy) -> None:
    copy.refresh()
    before = copy.n_events("u1")
    new = pd.DataFrame([{EVENT_ID: "new", USER_ID: "u1", INPUT_ID: "x99", LABEL: 1.0, WEIGHT: 1.0}])
    copy.observe(new)
    assert copy.n_events("u1") == before
    append(copy.tables, new)
    update(copy.tables, settings())
    copy.refresh()
    assert copy.n_events("u1") == before
    assert copy.overlay.n_pending() == 1
    described = copy.tables.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["x99"], "year": [1.0]}))
    copy.tables.append(INPUTS, described)
    copy.refresh()
    ends = time.monotonic() + 10  # for its features to be evaluated
    while copy.n_events("u1") == before and time.monotonic() < ends:
        time.sleep(0.01)
    assert copy.n_events("u1") == before + 1  # it counts here first
    update(copy.tables, settings())
    copy.refresh()
    assert copy.n_events("u1") == before + 1
    assert copy.overlay.n_pending() == 0
    assert_same_as_score(copy, ["u1"], ["x99"])


def test_ids_that_the_events_table_had_before_do_not_count_again(copy: Copy) -> None:
    copy.refresh()
    known = rows(np.arange(5))
    users = {user: copy.n_events(user) for user in set(known[USER_ID])}
    copy.observe(known, look_up=True)
    copy.refresh()
    assert copy.overlay.n_pending() == 0
    assert {user: copy.n_events(user) for user in users} == users


def test_a_switch_of_version_takes_every_observation_along_once(copy: Copy) -> None:
    copy.refresh()
    mine = rows(np.arange(TRAINED, 300))
    counts = {user: copy.n_events(user) for user in set(mine[USER_ID])}
    expected = {user: counts[user] + int((mine[USER_ID] == user).sum()) for user in counts}
    copy.observe(mine)
    append(copy.tables, mine)
    retrain(copy.tables, settings("model.k=3"))  # the candidate has them, the live version not yet
    copy.refresh()
    assert {user: copy.n_events(user) for user in counts} == expected
    promote(copy.tables)
    old = copy.look()
    copy.refresher.refresh()
    assert old.weights_of("u0") is not None  # a worker that has not looked yet
    assert {user: copy.n_events(user) for user in counts} == expected
    assert copy.look().version == 2
    copy.refresh()
    assert copy.overlay.n_pending() == 0
    assert {user: copy.n_events(user) for user in counts} == expected
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)


def test_a_rival_follows_its_own_version_and_counts_observations_once(copy: Copy, tmp_path: Path) -> None:
    retrain(copy.tables, settings("train.seed=1"))  # a candidate
    rival = Copy(copy.tables, tmp_path / "rival", version=2)
    both = {1: copy, 2: rival}
    assert {of.refresh().version: of for of in both.values()} == both
    before = {version: of.n_events("u1") for version, of in both.items()}
    observed = rows(np.arange(TRAINED, TRAINED + 3)).assign(user_id="u1")
    for of in both.values():
        of.observe(observed)
    counted = {version: n + 3 for version, n in before.items()}
    assert {version: of.n_events("u1") for version, of in both.items()} == counted
    append(copy.tables, observed)
    update(copy.tables, settings())  # of both versions
    for of in both.values():
        of.refresh()
        assert of.overlay.n_pending() == 0
    assert {version: of.n_events("u1") for version, of in both.items()} == counted
    promote(copy.tables, 2)
    assert [of.refresh().version for of in both.values()] == [2, 2]
    rival.store.close()
    rival.overlay.close()
    missing = Copy(copy.tables, tmp_path / "missing", version=7)
    with pytest.raises(StateError, match="there is no model version 7"):
        missing.refresh()


@pytest.mark.long
def test_a_features_table_that_was_rewritten_is_read_anew(copy: Copy) -> None:
    first = copy.refresh()
    copy.tables.delta(FEATURES).delete(F.col(INPUT_ID) == "x5")
    second = copy.refresh()
    assert len(second.rows) == len(first.rows) - 1
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)


@pytest.mark.long
def test_an_input_that_is_learnt_online_has_one_row_here_and_its_newest(copy: Copy) -> None:
    new = pd.DataFrame({INPUT_ID: ["late"], "year": [0.5], "colour": ["red"]})
    copy.tables.append(INPUTS, copy.tables.spark.createDataFrame(new))
    sizes, offsets = [], []
    for part in np.array_split(np.arange(TRAINED, 270), 2):
        append(copy.tables, rows(part).assign(**{INPUT_ID: "late", LABEL: 9.0}))
        update(copy.tables, settings())
        view = copy.refresh()
        assert_same_as_score(copy, USERS_ASKED, [*INPUTS_ASKED, "late"])
        sizes.append(len(view.rows))
        offsets.append(view.rows_of(["late"]).rows[0, -1])
        best = view.ids(view.best(view.unknown_weights, len(view.rows)))
        assert sorted(best) == sorted(set(best))
    assert sizes[0] == sizes[1]
    assert offsets[0] < offsets[1]


@pytest.mark.long
def test_observations_of_a_log_that_is_read_again_count_once(copy: Copy) -> None:
    copy.refresh()
    mine = rows(np.arange(TRAINED, 270))
    append(copy.tables, mine)
    update(copy.tables, settings())
    copy.refresh()
    counts = {user: copy.n_events(user) for user in set(mine[USER_ID])}
    copy.observe(mine, look_up=True)  # as open_overlay does with what the log has
    copy.refresh()
    assert copy.overlay.n_pending() == 0
    assert {user: copy.n_events(user) for user in counts} == counts


@pytest.mark.long
def test_an_erased_user_is_gone_from_the_server_and_others_events_count_once(copy: Copy) -> None:
    append(copy.tables, rows(np.arange(TRAINED, 300)))
    update(copy.tables, settings())
    copy.refresh()
    assert copy.n_events("u3") > 0
    erase(copy.tables, settings(), users=["u3", "u90"])  # u90 has attributes and no event
    view = copy.refresh()
    assert view.weights_of("u3") is view.weights_of("u90") is None
    events = copy.tables.read(EVENTS).groupBy(INPUT_ID).count().collect()
    with copy.store.reading() as transaction:
        popular = {input.input: input.n_events for input in copy.store.popular(transaction)}
    assert popular == {row[INPUT_ID]: row["count"] for row in events}
    assert_same_as_score(copy, USERS_ASKED, INPUTS_ASKED)
