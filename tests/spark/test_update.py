"""The update stream: exactly once into users, in any batching and order, whatever dies in between."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from streaming import (
    ONE_FILE_A_BATCH,
    PROBLEM,
    TRAINED,
    append,
    assert_same,
    broken,
    dying,
    rows,
    settings,
    state,
)

from mtl import schema
from mtl.adder import Adder
from mtl.arrow import matrix
from mtl.audit import audit
from mtl.config import Settings
from mtl.errors import ConfigError, StateError
from mtl.ingest import ingest_files
from mtl.lock import exclusive
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, INPUTS, USER_ATTRIBUTES, USER_ID, USERS, WAITING
from mtl.stream import Stream, folder_of
from mtl.tables import Tables
from mtl.update import _validated, update
from mtl.updater import Updater
from mtl.upsert import UsersTable

ALL_ANEW, MERGED = settings("update.rewrite_above=0"), settings("update.rewrite_above=1")


def test_streaming_in_any_batching_and_order_equals_a_from_scratch_pass(live: Tables, tmp_path: Path) -> None:
    one = Tables(live.spark, str(tmp_path / "one"))
    shutil.copytree(live.root, one.root)
    rest = np.arange(TRAINED, len(PROBLEM))
    append(one, rows(rest))
    assert update(one, settings())["applied"] == len(rest)
    shuffled = np.random.default_rng(1).permutation(rest)
    for part in np.array_split(shuffled, [7, 8, 60]):
        append(live, rows(part))
    result = update(live, ONE_FILE_A_BATCH)
    assert (result["batches"], result["applied"]) == (4, len(rest))
    assert_same(state(live), state(one))
    assert broken(live) == broken(one) == []


def test_running_again_changes_nothing(live: Tables) -> None:
    append(live, rows(np.arange(TRAINED, 300)))
    update(live, settings())
    before = live.version(USERS)
    assert update(live, settings())["applied"] == 0
    assert live.version(USERS) == before


def test_nothing_to_do_before_the_first_new_event(live: Tables) -> None:
    assert update(live, settings())["batches"] == 0
    append(live, rows(np.arange(TRAINED, 260)))
    assert update(live, settings())["applied"] == 10


@pytest.mark.parametrize(
    ("step", "before", "how"),
    [
        ("_add_to_users", False, ALL_ANEW),
        ("_add_to_users", False, MERGED),
        pytest.param("_set_aside", False, MERGED, marks=pytest.mark.long),
        pytest.param("_write_ledger", True, MERGED, marks=pytest.mark.long),
        pytest.param("_add_to_users", True, ALL_ANEW, marks=pytest.mark.long),
    ],
)
def test_a_death_at_any_step_loses_and_doubles_nothing(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str, before: bool, how: Settings
) -> None:
    rest = np.arange(TRAINED, 330)
    append(live, pd.concat([rows(rest), rows(rest[:5], inputs="unheard")]))
    with dying(monkeypatch, step, before):
        update(live, how)
    result = update(live, how)
    assert (result["applied"], result["waited"]) == (len(rest), 5)
    assert live.read(WAITING).count() == 5
    assert broken(live) == []


@pytest.mark.long
@pytest.mark.parametrize("how", [ALL_ANEW, MERGED])
def test_without_the_transaction_guard_the_audit_sees_doubled_events(
    live: Tables, monkeypatch: pytest.MonkeyPatch, how: Settings
) -> None:
    append(live, rows(np.arange(TRAINED, 300)))

    @contextmanager
    def unguarded(self: Tables, application: str, version: int) -> Iterator[None]:
        yield

    save = Tables._save
    monkeypatch.setattr(Tables, "once", unguarded)
    monkeypatch.setattr(Tables, "_save", lambda self, table, writer, once: save(self, table, writer, None))
    with dying(monkeypatch, "_add_to_users", before=False):
        update(live, how)
    update(live, how)
    assert "users_equal_scratch" in broken(live)


def test_users_without_events_are_kept_to_the_last_bit_where_all_are_written_anew(live: Tables) -> None:
    before = state(live)
    touched = rows(np.arange(TRAINED, 310)).query("user_id != 'u3'")
    others = before.index.difference(touched[USER_ID])
    assert 0 < len(others) < len(before) / 2
    append(live, touched)
    append(live, rows(np.arange(310, 312), users="new"))
    update(live, ONE_FILE_A_BATCH)
    after = state(live)
    for name in (schema.A, schema.B, schema.W, schema.N_EVENTS):
        assert (np.stack(after.loc[others, name]) == np.stack(before.loc[others, name])).all()
    operations = live.delta(USERS).history(2).select("operation").toPandas()["operation"].tolist()
    assert operations == ["MERGE", "WRITE"]  # the last first
    assert broken(live) == []


@pytest.mark.parametrize(
    "how", [pytest.param("update.rewrite_above=0", marks=pytest.mark.long), "update.rewrite_above=1"]
)
def test_batches_added_in_the_job_are_as_spark_adds_them(
    live: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    here = []
    real = Adder._computed_here
    monkeypatch.setattr(Adder, "_computed_here", lambda *arguments: here.append(1) or real(*arguments))
    by_spark = Tables(live.spark, str(tmp_path / "spark"))
    shutil.copytree(live.root, by_spark.root)
    for tables in (live, by_spark):
        first, second = np.array_split(np.arange(TRAINED, 330), 2)
        append(tables, rows(first))
        append(tables, rows(first[:3], users="new"))
        append(tables, rows(second[:3]).assign(user_id=["u90", "new7", "new8"]))  # u90 has attributes
        append(tables, rows(second[3:]))
    update(by_spark, settings(how, "update.max_files_per_trigger=1", "update.keep_mb=0"))
    assert len(here) == 0
    assert update(live, settings(how, "update.max_files_per_trigger=1"))["batches"] == 4
    assert len(here) == 3  # all but the first
    assert_same(state(live), state(by_spark))
    measured = [t.read(schema.PROGRESS).orderBy(schema.BATCH_ID).toPandas() for t in (live, by_spark)]
    for name in (schema.VALIDATED, schema.LOSS, schema.SEEN_RIDGE):
        np.testing.assert_allclose(*(np.stack(rows[name]) for rows in measured), rtol=1e-12)
    assert broken(live) == []


def test_what_a_death_left_unwritten_is_not_taken_for_written(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in np.array_split(np.arange(TRAINED, 330), 5):
        append(live, rows(part))
    for before in (True, False):
        with dying(monkeypatch, "_add_to_users", before, call=1):
            update(live, ONE_FILE_A_BATCH)
    assert update(live, ONE_FILE_A_BATCH)["applied"] > 0
    assert state(live)[schema.N_EVENTS].sum() == 330
    assert broken(live) == []


@pytest.mark.long
def test_after_a_write_that_failed_no_users_are_kept(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(live, MERGED, load_model(live))
    kept = []
    merge, added = UsersTable.merge, Adder.added

    def fails_at_last(self: UsersTable, *arguments: object) -> None:
        kept.append(stream.updater.adder._kept is not None)
        if len(kept) == 4:
            raise OSError("the disk is full")
        merge(self, *arguments)

    @contextmanager
    def seen(self: Adder, *arguments: object) -> Iterator[tuple]:
        kept_before.append(self._kept is not None)
        with added(self, *arguments) as found:
            yield found

    kept_before: list[bool] = []
    monkeypatch.setattr(UsersTable, "merge", fails_at_last)
    monkeypatch.setattr(Adder, "added", seen)
    for part in np.array_split(np.arange(TRAINED, 330), 4):
        append(live, rows(part))
    stream.settings = settings("update.rewrite_above=1", "update.max_files_per_trigger=1")
    with pytest.raises(OSError, match="the disk is full"):
        stream.drain()
    assert kept_before == [False, False, True, True]
    assert kept == [False] * 4  # while a write is under way nobody knows what the table holds
    assert stream.updater.adder._kept is None
    stream.close()


def test_fewer_users_never_replace_more(live: Tables) -> None:
    users = UsersTable(live.apart(), 1, 0.5)
    some = users.rows().limit(3)
    with pytest.raises(StateError, match="3 users of model version 1 were to replace"):
        users.replace(some, "test", 0)
    assert users.rows().count() == users.n > 3
    everybody = users.rows()
    assert users.are_most(everybody, 10 * users.n)
    assert not UsersTable(live.apart(), 1, 1.0).are_most(everybody, 10 * users.n)


def test_a_batch_that_comes_while_its_query_stops_is_for_the_next_run(live: Tables) -> None:
    stream = Stream(live, settings("update.trigger_seconds=1"), load_model(live))
    append(live, rows(np.arange(TRAINED, 300)))
    stream.tend()
    assert stream.query is not None
    stream.query.processAllAvailable()
    stream.updater.gate.close()
    append(live, rows(np.arange(300, 330)))
    with pytest.raises(StreamingQueryException, match="for the next run"):
        stream.query.awaitTermination(60)
    stream.close()
    assert update(live, settings())["applied"] == 30
    assert broken(live) == []


@pytest.mark.long
def test_what_has_come_to_now_stops_after_the_batch_in_hand(live: Tables) -> None:
    for part in np.array_split(np.arange(TRAINED, len(PROBLEM)), 12):
        append(live, rows(part))
    stop = threading.Event()
    stop.set()
    first = update(live, ONE_FILE_A_BATCH, stop=stop)
    assert first["batches"] < 12
    update(live, ONE_FILE_A_BATCH)
    assert state(live)[schema.N_EVENTS].sum() == len(PROBLEM)
    assert broken(live) == []


def test_nothing_is_released_past_a_batch_that_failed(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    append(live, rows(np.arange(TRAINED, 262)).assign(input_id="late"))
    assert update(live, settings())["waited"] == 12
    append(live, rows(np.arange(262, 280)))
    stream = Stream(live, settings(), load_model(live))
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_add_to_users", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.drain()
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["late"], "year": [1.0]})))
    assert stream.updater.release() == 0
    stream.updater.release_if_inputs_came()
    stream.close()
    result = update(live, settings())
    assert (result["applied"], result["released"]) == (18 + 12, 12)
    assert broken(live) == []


def test_nothing_is_released_past_a_batch_of_which_only_what_waits_was_written(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has no row of it yet, and a recovery would have it read anew."""
    append(live, rows(np.arange(TRAINED, 262)).assign(input_id="late"))
    with dying(monkeypatch, "_write_ledger", before=True):
        update(live, settings())
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["late"], "year": [1.0]})))
    stream = Stream(live, settings(), load_model(live))
    assert stream.updater.release() == 0
    stream.close()
    assert update(live, settings(), from_ledger=True)["applied"] == 12
    assert state(live)[schema.N_EVENTS].sum() == TRAINED + 12
    assert broken(live) == []


@pytest.mark.long
def test_inputs_that_are_what_the_oracle_says_are_not_learnt(live: Tables) -> None:
    retrain(live, settings("oracle.residual=false"), promote=True)
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["new"], "year": [0.5]})))
    append(live, rows(np.arange(TRAINED, 262)).assign(input_id="new", label=9.0))
    assert update(live, settings())["applied"] == 12
    model = load_model(live)
    stored = live.of_version(schema.FEATURES, model.version).where(F.col(INPUT_ID) == "new").toPandas().iloc[0]
    expected = model.features_of_new(pd.DataFrame({"year": [0.5]}))
    np.testing.assert_allclose(stored[schema.PHI], expected.phi[0])
    assert stored[schema.OFFSET] == pytest.approx(expected.offset[0])
    assert broken(live) == []


def test_checkpoints_are_on_a_path_that_the_driver_can_open(live: Tables) -> None:
    with pytest.raises(ConfigError, match=r"update\.checkpoints: name a local folder"):
        update(live, settings("update.checkpoints=hdfs:///checkpoints"))


def test_a_batch_counts_by_its_events_however_many_were_measured(live: Tables) -> None:
    append(live, rows(np.arange(TRAINED, 310)))
    update(live, settings())
    (whole,) = _validated(live, 1)
    half = {name: F.col(name) / 2 for name in (schema.VALIDATED, schema.LOSS)}
    live.delta(schema.PROGRESS).update(set=half)
    (sampled,) = _validated(live, 1)
    assert whole.n == sampled.n == 60
    assert sampled.loss == pytest.approx(whole.loss)


def test_an_event_that_waits_does_not_have_all_features_read_anew(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], Updater._load_inputs
    monkeypatch.setattr(Updater, "_load_inputs", lambda self: read.append(self) or load(self))
    append(live, rows(np.arange(TRAINED, 255)).assign(input_id="unknown"))
    assert update(live, settings())["waited"] == 5
    assert len(read) == 1  # when the stream was opened


def test_new_users_start_from_the_prior_of_their_attributes(live: Tables) -> None:
    model = load_model(live)
    append(live, rows(np.arange(TRAINED, 260), users="v"))
    append(live, rows(np.arange(260, 261)).assign(user_id="u90"))
    update(live, settings())
    attributes = live.read(USER_ATTRIBUTES).where(F.col(USER_ID) == "u90").toPandas()
    kept = live.read(USERS).toArrow()
    prior = dict(zip(kept[USER_ID].to_pylist(), matrix(kept[schema.PRIOR_MEAN], 3), strict=True))
    np.testing.assert_allclose(prior["u90"], model.prior_mean_of_new(attributes)[0], atol=1e-12)
    someone = f"v{PROBLEM.user[TRAINED]}"
    np.testing.assert_allclose(prior[someone], model.prior_mean_of_unknown, atol=1e-12)
    assert broken(live) == []


def test_an_input_with_attributes_gets_features_within_the_batch(live: Tables) -> None:
    new = pd.DataFrame({INPUT_ID: ["new"], "year": [0.5]})
    live.append(INPUTS, live.spark.createDataFrame(new))
    append(live, rows(np.arange(TRAINED, 255)).assign(input_id="new"))
    assert update(live, settings("update.learn_arrivals=false"))["waited"] == 0
    live.delta(INPUTS).update(F.col(INPUT_ID) == "new", {"year": F.lit(7.5)})  # features keep what it came with
    stored = live.read(schema.FEATURES).where(F.col(INPUT_ID) == "new").toArrow()
    expected = load_model(live).features_of_new(new)
    np.testing.assert_allclose(matrix(stored[schema.PHI], 3), expected.phi)
    assert broken(live) == []


@pytest.mark.parametrize("is_catalogued", [False, True])
@pytest.mark.parametrize(
    ("step", "before"),
    [(None, False), *(pytest.param("_learn_arrivals", b, marks=pytest.mark.long) for b in (False, True))],
)
def test_an_input_that_training_had_no_event_of_is_learnt_from_its_events_once(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str | None, before: bool, is_catalogued: bool
) -> None:
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["new"], "year": [0.5]})))
    if is_catalogued:
        retrain(live, settings(), promote=True)
    of_new = rows(np.arange(TRAINED, 265)).assign(input_id="new", label=9.0)
    for part in (of_new[:5], of_new[5:]):
        append(live, part)
    if step:
        with dying(monkeypatch, step, before):
            update(live, ONE_FILE_A_BATCH)
    update(live, ONE_FILE_A_BATCH)
    model = load_model(live)
    stored = live.of_version(schema.FEATURES, model.version).where(F.col(INPUT_ID) == "new").toPandas().iloc[0]
    unlearnt = model.features_of_new(pd.DataFrame({"year": [0.5]}))
    assert stored[schema.N_EVENTS] == 15
    assert unlearnt.offset[0] < stored[schema.OFFSET] < 9.0
    assert stored[schema.OFFSET_VARIANCE] < unlearnt.offset_variance[0]
    assert broken(live) == []


@pytest.mark.parametrize(
    ("step", "before"),
    [
        (None, False),
        pytest.param("_add_to_users", False, marks=pytest.mark.long),
        pytest.param("_finish_release", True, marks=pytest.mark.long),
    ],
)
def test_an_event_of_an_unknown_input_waits_and_is_applied_when_the_input_arrives(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str | None, before: bool
) -> None:
    append(live, rows(np.arange(TRAINED, 262)).assign(input_id="late"))
    append(live, rows(np.arange(262, 270)))
    assert update(live, settings())["waited"] == 12
    assert update(live, settings())["released"] == 0
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["late"], "year": [1.0]})))
    if step:
        with dying(monkeypatch, step, before):
            update(live, settings())
    assert update(live, settings())["released"] == 12
    assert update(live, settings())["released"] == 0
    assert state(live)[schema.N_EVENTS].sum() == 270
    assert broken(live) == []


def test_a_second_job_on_the_same_version_is_refused(live: Tables) -> None:
    with (
        exclusive(f"{folder_of(live, settings(), 1)}.lock", "the test"),
        pytest.raises(StateError, match="update of model version 1 is run by"),
    ):
        update(live, settings())


@pytest.mark.long
def test_a_second_version_catches_up_on_its_own_and_the_first_stays(live: Tables) -> None:
    append(live, rows(np.arange(TRAINED, 280)))
    update(live, settings())
    retrain(live, settings("model.k=1"), promote=True)
    append(live, rows(np.arange(280, 300)))
    assert update(live, settings())["applied"] == 20
    assert update(live, settings(), version=1)["applied"] == 20
    totals = dict(live.read(USERS).groupBy(schema.MODEL_VERSION).agg(F.sum(schema.N_EVENTS)).collect())
    assert totals == {1: 300, 2: 300}
    assert broken(live) == []


def test_ingest_to_audit_adds_up(spark: SparkSession, tmp_path: Path) -> None:
    tables = Tables(spark, str(tmp_path / "tables"))
    split: Callable[[slice], str] = lambda part: str(tmp_path / f"{part.start}.parquet")  # noqa: E731
    for part in (slice(0, 300), slice(280, 400)):
        rows(np.arange(part.start, part.stop)).to_parquet(split(part))
    ingest_files(tables, settings(), split(slice(0, 300)))
    retrain(tables, settings())
    reports, _ = ingest_files(tables, settings(), split(slice(280, 400)))
    assert reports.duplicates == 20
    update(tables, settings())
    assert audit(tables, settings())["failed"] is False
    live = tables.read(USERS).first()
    tables.delta(USERS).update(F.col(USER_ID) == live[USER_ID], {schema.N_EVENTS: F.lit(0)})
    assert {"update_adds_up", "users_equal_scratch"} <= {*audit(tables, settings())["broken"]}
