"""Erasure and correction: afterwards as if never seen, whatever dies in between, and the audit holds."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import erase as module
from mtl import schema
from mtl.audit import audit
from mtl.batches import Batch, IngestReport, plan
from mtl.config import Settings, load_settings
from mtl.erase import _mentioning, erase
from mtl.errors import InputError, StateError
from mtl.ingest import ingest_files
from mtl.known import KnownEvents
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, EVENT_TIME, INPUT_ID, LABEL, MODEL_VERSION, USER_ID, WEIGHT
from mtl.stream import Stream
from mtl.tables import Tables
from mtl.update import update

PROBLEM = planted(8, users=15, inputs=10, k=2, events=300)
TRAINED = 200
START = datetime(2024, 1, 1, tzinfo=timezone.utc)
SECONDS = np.random.default_rng(0).integers(0, 100 * 86_400, len(PROBLEM))
USER = "u3"

pytestmark = pytest.mark.long  # a run of every version's stream for each test


def settings(*assignments: str) -> Settings:
    common = ["tables.root=unused", "model.k=1", "train.iterations=2", "encode.min_category_count=1"]
    return load_settings([], [*common, "update.max_files_per_trigger=1", *assignments])


def rows(events: np.ndarray, loss: str = "squared") -> pd.DataFrame:
    label = PROBLEM.label[events] if loss == "squared" else (PROBLEM.label[events] > 3) * 1.0
    return pd.DataFrame(
        {
            EVENT_ID: [f"e{i}" for i in events],
            USER_ID: [f"u{i}" for i in PROBLEM.user[events]],
            INPUT_ID: [f"x{i}" for i in PROBLEM.input[events]],
            LABEL: label,
            WEIGHT: PROBLEM.weight[events],
            EVENT_TIME: [START + timedelta(seconds=int(s)) for s in SECONDS[events]],
        }
    )


class Run:
    """Tables, and files beside them that are ingested."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.folder, self.tables, self.files = folder, Tables(spark, str(folder / "tables")), 0

    def write(self, frame: pd.DataFrame) -> str:
        self.files += 1
        path = self.folder / f"{self.files}.parquet"
        frame.to_parquet(path)
        return str(path)

    def ingest(self, events: pd.DataFrame, now: Settings, **others: str) -> str:
        path = self.write(events)
        ingest_files(self.tables, now, path, **others)
        return path

    def users(self, version: int = 1) -> pd.DataFrame:
        names = [f.name for f in SCHEMAS[schema.USERS]]
        found = self.tables.read(schema.USERS).where(F.col(MODEL_VERSION) == version).select(*names)
        return found.toPandas().set_index(USER_ID).sort_index()

    def mentions(self, text: str) -> list[str]:
        """Tables that hold the text anywhere in a row, but in the models' pickles."""
        found = []
        for table in SCHEMAS:
            whole = self.tables.read(table).drop(schema.ARTEFACT)
            if not whole.where(F.to_json(F.struct("*")).rlike(rf"\b{text}\b")).isEmpty():
                found.append(table)
        return found

    def vacuum(self) -> None:
        for table in SCHEMAS:
            self.tables.delta(table).vacuum(0)


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    assert one.index.equals(other.index)
    for name in (schema.N_EVENTS, schema.REFERENCE_TIME):
        assert one[name].equals(other[name])
    for name in (schema.A, schema.B, schema.W):
        np.testing.assert_allclose(np.stack(one[name]), np.stack(other[name]), rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def streamed(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, both streamed; u3 has trained, streamed, waiting, released and refused events, and attributes."""
    folder = tmp_path_factory.mktemp("streamed")
    run, now = Run(spark, folder), settings()
    described = run.write(pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(10)], "year": np.linspace(-1, 1, 10)}))
    users = run.write(pd.DataFrame({USER_ID: [f"u{i}" for i in range(10)], "age": np.linspace(20, 60, 10)}))
    run.ingest(rows(np.arange(TRAINED)), now, inputs=described, users=users)
    retrain(run.tables, now)
    part = rows(np.arange(TRAINED, 250))
    late = part.tail(4).assign(**{USER_ID: [USER, USER, USER, "u1"], INPUT_ID: ["late", "late", "never", "never"]})
    run.ingest(pd.concat([part.head(46), late]), now)
    update(run.tables, now)
    retrain(run.tables, settings("model.half_life_days=20"))
    run.ingest(rows(np.arange(250, len(PROBLEM))), now)
    refused = [f"{USER},x1,none", f"{USER},x1", "u30,x1,none"]
    (folder / "refused.csv").write_text("\n".join(["user_id,input_id,label", *refused]))
    ingest_files(run.tables, now, str(folder / "refused.csv"))
    update(run.tables, now)
    run.tables.append(schema.INPUTS, spark.createDataFrame([("late", 0.3)], "input_id string, year double"))
    assert update(run.tables, now)["released"] == 2
    spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    return folder


@pytest.fixture
def run(spark: SparkSession, streamed: Path, tmp_path: Path) -> Run:
    """A copy of the test's own."""
    shutil.copytree(streamed / "tables", tmp_path / "tables")
    return Run(spark, tmp_path)


def broken(run: Run) -> list[str]:
    return audit(run.tables, settings())["broken"]


def test_a_user_is_gone_from_every_table_and_version_and_the_audit_holds_even_after_vacuum(run: Run) -> None:
    before = [run.users(version) for version in (1, 2)]
    own = int(run.tables.read(schema.EVENTS).where(F.col(USER_ID) == USER).count())
    report = erase(run.tables, settings(), users=[USER])
    assert run.mentions(USER) == []
    assert report["removed"] == {schema.EVENTS: own, schema.QUARANTINE: 2, schema.WAITING: 3, schema.USER_ATTRIBUTES: 1}
    # Of the three events that waited for version 1 two were released.
    assert report["removed_from_users"][1] == before[0].loc[USER, schema.N_EVENTS] == own - 1
    still = report["still_in"]
    assert still["theta_of_versions"] == [1, 2]
    assert {Path(path).name for path in still["sources"]} >= {"refused.csv"}
    until = datetime.fromisoformat(still["old_versions_until"][schema.EVENTS]) - datetime.now(timezone.utc)
    assert until == pytest.approx(timedelta(days=30), abs=timedelta(hours=1))
    assert broken(run) == []
    for version, users in zip((1, 2), before, strict=True):
        after = run.users(version)
        assert USER not in after.index
        others = after.index if version == 1 else after.index.intersection(users.index)
        caught_up = after.loc[others, schema.N_EVENTS] == users.loc[others, schema.N_EVENTS]
        pd.testing.assert_frame_equal(after.loc[others][caught_up], users.loc[others][caught_up])
    properties = run.tables.delta(schema.EVENTS).detail().collect()[0]["properties"]
    assert properties["delta.appendOnly"] == "true"
    run.vacuum()
    assert broken(run) == []
    # Life goes on: the user comes back as nobody knows it.
    run.ingest(rows(np.arange(5)).assign(**{USER_ID: USER, EVENT_ID: [f"new{i}" for i in range(5)]}), settings())
    for version in (1, 2):
        update(run.tables, settings(), version=version)
        assert run.users(version).loc[USER, schema.N_EVENTS] == 5
    assert broken(run) == []


def test_a_death_after_every_step_is_finished_by_running_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Run(run.tables.spark, run.folder / "other")
    shutil.copytree(run.tables.root, other.tables.root)
    expected = erase(other.tables, settings(), users=[USER])
    first, last = ("plan", "_remove_events", "_remove_refused", "_account", "_drain"), ("_remove_rest", "close")
    deaths = [
        *((step, False) for step in first),
        ("_replace", True),
        ("_replace", False),
        *((step, False) for step in last),
    ]
    for step, before in deaths:
        real = getattr(module, step)

        def die(*arguments: object, real: object = real, before: bool = before, **named: object) -> None:
            if not before:
                real(*arguments, **named)
            raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(module, step, die)
            with pytest.raises(RuntimeError, match="killed"):
                erase(run.tables, settings(), users=[USER])
        if before:
            assert {"erasures_done", "update_adds_up"} <= {*broken(run)}
    assert run.tables.read(schema.ERASURES).count() == 1
    with pytest.raises(InputError, match="nothing to erase"):
        erase(run.tables, settings())
    stored = json.loads(run.tables.read(schema.ERASURES).first()[schema.REPORT])
    for name in ("asked", "removed", "removed_from_users"):
        assert stored[name] == json.loads(json.dumps(expected))[name], name
    assert run.mentions(USER) == []
    assert broken(run) == []
    for version in (1, 2):
        assert_same(run.users(version), other.users(version))


@pytest.mark.parametrize("half_life", [0, 10])
def test_single_events_erased_leave_what_a_run_without_them_gives(
    spark: SparkSession, tmp_path: Path, half_life: int
) -> None:
    now, run = settings(f"model.half_life_days={half_life}"), Run(spark, tmp_path)
    run.ingest(rows(np.arange(TRAINED)), now)
    retrain(run.tables, now)
    without = Run(spark, tmp_path / "without")
    shutil.copytree(run.tables.root, without.tables.root)
    rest = rows(np.arange(TRAINED, len(PROBLEM)))
    newest = rest.sort_values(EVENT_TIME).groupby(USER_ID).tail(1)[EVENT_ID].head(7)  # of their users: ages move back
    new = rest.tail(1).assign(**{USER_ID: "only", EVENT_ID: "once"})
    run.ingest(pd.concat([rest, new]), now)
    without.ingest(rest[~rest[EVENT_ID].isin(newest)], now)
    for one in (run, without):
        update(one.tables, now)
    listed = run.folder / "ids.csv"
    listed.write_text("\n".join(["event_id", *newest, "once"]))
    report = erase(run.tables, now, file=str(listed))
    assert report["removed_from_users"] == {1: 8}
    assert report["still_in"]["theta_of_versions"] == []
    assert "only" not in run.users().index
    assert_same(run.users(), without.users())
    assert broken(run) == []
    # Events that training had seen; and the guard off: without the recomputation the audit sees them.
    erase(run.tables, now, events=["e0", "e1"])
    assert broken(run) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_replace", lambda *arguments: None)
        erase(run.tables, now, events=["e2"])
    assert set(broken(run)) == {"users_equal_scratch", "update_adds_up"}
    # Asked again, the user is computed anew all the same.
    erase(run.tables, now, users=[f"u{PROBLEM.user[2]}"])
    assert "users_equal_scratch" not in broken(run)


def test_a_corrected_event_counts_as_corrected_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = rows(np.array([0, 1, 201, 202]))
    right = wrong.assign(**{LABEL: [9.0, wrong[LABEL][1], -9.0, 9.0], WEIGHT: [1.0, wrong[WEIGHT][1], 1.0, 1.0]})
    path = run.write(right)
    ingest = module.ingest_events

    def die(*arguments: object) -> None:
        ingest(*arguments)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "ingest_events", die)
        with pytest.raises(RuntimeError, match="killed"):
            erase(run.tables, settings(), correct=path)
    report = erase(run.tables, settings(), correct=path)
    assert (report["asked"], report["removed"][schema.EVENTS]) == (3, 3)
    assert len(report["finished"]) == 1
    stored = run.tables.read(schema.EVENTS).where(F.col(EVENT_ID).isin(*right[EVENT_ID])).toPandas()
    assert stored.set_index(EVENT_ID)[LABEL].to_dict() == right.set_index(EVENT_ID)[LABEL].to_dict()
    for version, waiting in ((1, 2), (2, 0)):
        update(run.tables, settings(), version=version)
        assert broken(run) == []
        assert run.users(version)[schema.N_EVENTS].sum() == run.tables.read(schema.EVENTS).count() - waiting
    assert erase(run.tables, settings(), correct=path)["asked"] == 0
    run.vacuum()
    assert broken(run) == []


def test_a_job_that_updates_a_version_keeps_an_erasure_from_beginning(run: Run) -> None:
    other = Stream(run.tables, settings(), load_model(run.tables, 2))
    try:
        with pytest.raises(StateError, match="the update of model version 2 is run by process"):
            erase(run.tables, settings(), users=[USER])
    finally:
        other.close()
    assert run.tables.read(schema.ERASURES).isEmpty()
    assert USER in run.users().index


def test_the_index_of_ids_forgets_with_the_table(run: Run) -> None:
    known = KnownEvents(run.tables, str(run.folder / "index"))
    known.refresh()
    before = len(known.ids)
    erase(run.tables, settings(), events=["e0", "e201"])
    known.refresh()
    assert (before, len(known.ids)) == (len(PROBLEM), len(PROBLEM) - 2)


def test_a_message_that_was_no_json_is_found_by_its_words(spark: SparkSession) -> None:
    torn, whole = '{"user_id": "u3", "label": ', '{"user_id": "u4", "label": "many"}'
    refused = spark.createDataFrame([(torn,), (whole,)], "raw string")
    for user, row in (("u3", torn), ("u4", whole)):
        found = _mentioning(refused, spark.createDataFrame([(user,)], "user_id string"), USER_ID)
        assert [r[0] for r in found.collect()] == [row]


def test_corrections_that_are_none_change_nothing(run: Run) -> None:
    before, known = run.tables.version(schema.EVENTS), rows(np.arange(3))
    cases = [
        (known.assign(**{LABEL: ["1", "2", "many"]}), r"1 of 3 rows are no events, .*label is not a number"),
        (known.assign(**{EVENT_ID: ["e0", "e1", "e9999"]}), r"there is no event e9999 to correct"),
        (known.assign(**{EVENT_ID: ["e0", "e0", "e1"]}), r"3 rows have 2 different ids"),
    ]
    for frame, reason in cases:
        with pytest.raises(InputError, match=reason):
            erase(run.tables, settings(), correct=run.write(frame))
    with pytest.raises(InputError, match="one thing at a time"):
        erase(run.tables, settings(), users=["u1"], events=["e1"])
    with pytest.raises(InputError, match="give one column"):
        erase(run.tables, settings(), file=run.write(known))
    assert run.tables.version(schema.EVENTS) == before


def test_lists_that_cannot_be_read_whole_erase_nothing(run: Run) -> None:
    before = run.tables.version(schema.EVENTS)
    for name, text, said in (
        ("wide.csv", "user_id\nu1,u2\nu4\n", "1 of 2 rows have no user_id; nothing was erased; the first: .*u1,u2"),
        ("torn.jsonl", '{"event_id": "e1"}\n{"event_id": "e', "1 of 2 rows have no event_id"),
        ("empty.csv", "user_id,age\nu1,3\n,4\n", "1 of 2 rows have no user_id"),
    ):
        path = run.folder / name
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            erase(run.tables, settings(), file=str(path))
    assert run.tables.version(schema.EVENTS) == before


def test_refused_attributes_of_an_erased_user_leave_the_audit_as_it_was(run: Run) -> None:
    users = run.write(pd.DataFrame({USER_ID: ["u77", "u77", "u78"], "age": [30.0, 31.0, 40.0]}))
    ingest_files(run.tables, settings(), run.write(rows(np.arange(3))), users=users)
    assert schema.QUARANTINE in run.mentions("u77")
    assert erase(run.tables, settings(), users=["u77"])["removed"][schema.QUARANTINE] == 2
    assert broken(run) == []


def test_an_ingest_that_is_not_closed_keeps_an_erasure_from_beginning(run: Run) -> None:
    """Its batch would be counted by the rows that are left of it."""
    batch = Batch("f" * 32)
    plan(run.tables, batch, IngestReport(1, 0, 0, 0, batch.name), "somewhere.csv")
    with pytest.raises(StateError, match="1 batches of ingest are not closed, the first f"):
        erase(run.tables, settings(), users=[USER])
    assert erase(run.tables, settings("ingest.recover_after_minutes=0"), users=[USER])["erasure_id"]
    assert broken(run) == []


def test_another_loss_is_replayed_without_the_erased_and_refitted_where_the_order_is_lost(
    spark: SparkSession, tmp_path: Path
) -> None:
    now, run = settings("model.loss=logistic"), Run(spark, tmp_path)
    run.ingest(rows(np.arange(TRAINED), "logistic"), now)
    retrain(run.tables, now)
    for part in np.array_split(np.arange(TRAINED, len(PROBLEM)), 2):
        run.ingest(rows(part, "logistic"), now)
        update(run.tables, now)
    report = erase(run.tables, now, events=["e5", "e210", "e290"])
    assert (report["removed_from_users"], report["refitted_versions"]) == ({1: 3}, [])
    assert broken(run) == []
    flipped = rows(np.array([211]), "logistic")
    erase(run.tables, now, correct=run.write(flipped.assign(**{LABEL: 1 - flipped[LABEL]})))
    update(run.tables, now)
    assert broken(run) == []
    erase(run.tables, now, events=["e212"])  # its file holds the corrected event as it was
    assert broken(run) == []
    run.vacuum()
    assert erase(run.tables, now, events=["e213"])["refitted_versions"] == [1]
    assert broken(run) == ["users_equal_scratch"]
    check = audit(run.tables, now)["checks"]["users_equal_scratch"]
    assert "train a new version with jobs/retrain.py" in check["reason"]
    assert load_model(run.tables).version == 1
