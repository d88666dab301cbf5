"""The update stream: exactly once into users, in any batching and order, whatever dies in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrow import matrix
from mtl.audit import audit
from mtl.config import Settings, load_settings
from mtl.errors import ReplayError, StateError
from mtl.ingest import ingest_files
from mtl.lock import exclusive
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, INPUT_ID, INPUTS, LABEL, USER_ATTRIBUTES, USER_ID, USERS, WAITING, WEIGHT
from mtl.stream import folder_of
from mtl.tables import Tables
from mtl.update import update
from mtl.updater import Updater

PROBLEM = planted(3, users=20, inputs=12, k=2, events=400)
TRAINED = 250  # events that training sees; the others stream


def settings(*assignments: str) -> Settings:
    return load_settings(
        [], ["tables.root=unused", "model.k=2", "train.iterations=3", "encode.min_category_count=1", *assignments]
    )


ONE_FILE_A_BATCH = settings("update.max_files_per_trigger=1")


def rows(events: np.ndarray, users: str = "u", inputs: str = "x") -> pd.DataFrame:
    return pd.DataFrame(
        {
            EVENT_ID: [f"{users}{inputs}{i}" for i in events],
            USER_ID: [f"{users}{i}" for i in PROBLEM.user[events]],
            INPUT_ID: [f"{inputs}{i}" for i in PROBLEM.input[events]],
            LABEL: PROBLEM.label[events],
            WEIGHT: PROBLEM.weight[events],
        }
    )


def append(tables: Tables, events: pd.DataFrame, files: int = 1) -> None:
    """One commit."""
    missing = [
        F.lit(None).cast(c.dataType).alias(c.name) for c in schema.SCHEMAS[schema.EVENTS] if c.name not in events
    ]
    new = tables.spark.createDataFrame(events).select("*", *missing)
    new = new.coalesce(1) if files == 1 else new.repartition(files)
    tables.append(schema.EVENTS, new.select(schema.SCHEMAS[schema.EVENTS].names))


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with a live model over the first events; users u0 … u14 and u90 and inputs x0 … x11 have attributes."""
    root = tmp_path_factory.mktemp("trained") / "tables"
    tables = Tables(spark, str(root))
    tables.create(*schema.SCHEMAS)
    random = np.random.default_rng(0)
    inputs = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(12)], "year": random.normal(size=12)})
    users = pd.DataFrame({USER_ID: [*(f"u{i}" for i in range(15)), "u90"], "age": random.normal(size=16)})
    tables.append(INPUTS, spark.createDataFrame(inputs), evolve=True)
    tables.append(USER_ATTRIBUTES, spark.createDataFrame(users), evolve=True)
    append(tables, rows(np.arange(TRAINED)))
    retrain(tables, settings())
    return root


@pytest.fixture
def live(spark: SparkSession, trained: Path, tmp_path: Path) -> Tables:
    """A copy of the trained tables of the test's own."""
    root = tmp_path / "tables"
    shutil.copytree(trained, root)
    return Tables(spark, str(root))


def state(tables: Tables) -> pd.DataFrame:
    kept = tables.read(USERS).select(USER_ID, schema.A, schema.B, schema.W, schema.N_EVENTS).toPandas()
    return kept.set_index(USER_ID).sort_index()


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    assert one.index.equals(other.index)
    assert (one[schema.N_EVENTS] == other[schema.N_EVENTS]).all()
    for name in (schema.A, schema.B, schema.W):
        np.testing.assert_allclose(np.stack(one[name]), np.stack(other[name]), rtol=1e-8, atol=1e-8)


def broken(tables: Tables) -> list[str]:
    """Invariants that fail; the events here come without ingest, so its own is left out."""
    return [name for name in audit(tables, settings())["broken"] if name != "ingest_adds_up"]


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, step: str, before: bool, call: int = 0) -> Iterator[None]:
    """The job dies before or after its ``call``-th ``step``."""
    real, calls = getattr(Updater, step), []

    def die(self: Updater, *arguments: object, **named: object) -> object:
        calls.append(step)
        if before and len(calls) == call + 1:
            raise RuntimeError("killed")
        result = real(self, *arguments, **named)
        if len(calls) == call + 1:
            raise RuntimeError("killed")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Updater, step, die)
        with pytest.raises(RuntimeError, match="killed"):
            yield


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
    ("step", "before"),
    [
        ("_merge", False),
        pytest.param("_set_aside", False, marks=pytest.mark.long),
        pytest.param("_write_ledger", True, marks=pytest.mark.long),
        pytest.param("_merge", True, marks=pytest.mark.long),
    ],
)
def test_a_death_at_any_step_loses_and_doubles_nothing(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    rest = np.arange(TRAINED, 330)
    append(live, pd.concat([rows(rest), rows(rest[:5], inputs="unheard")]))
    with dying(monkeypatch, step, before):
        update(live, settings())
    result = update(live, settings())
    assert (result["applied"], result["waited"]) == (len(rest), 5)
    assert live.read(WAITING).count() == 5
    assert broken(live) == []


@pytest.mark.long
def test_without_the_transaction_guard_the_audit_sees_doubled_events(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, rows(np.arange(TRAINED, 300)))

    @contextmanager
    def unguarded(self: Tables, application: str, version: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(Tables, "once", unguarded)
    with dying(monkeypatch, "_merge", before=False):
        update(live, settings())
    update(live, settings())
    assert "users_equal_scratch" in broken(live)


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
    stored = live.read(schema.FEATURES).where(F.col(INPUT_ID) == "new").toArrow()
    expected = load_model(live).features_of_new(new)
    np.testing.assert_allclose(matrix(stored[schema.PHI], 3), expected.phi)
    assert broken(live) == []


@pytest.mark.parametrize(
    ("step", "before"),
    [(None, False), *(pytest.param("_learn_arrivals", b, marks=pytest.mark.long) for b in (False, True))],
)
def test_an_input_that_came_after_training_is_learnt_from_its_events_once(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str | None, before: bool
) -> None:
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["new"], "year": [0.5]})))
    of_new = rows(np.arange(TRAINED, 265)).assign(input_id="new", label=9.0)
    for part in (of_new[:5], of_new[5:]):
        append(live, part)
    if step:
        with dying(monkeypatch, step, before):
            update(live, ONE_FILE_A_BATCH)
    update(live, ONE_FILE_A_BATCH)
    stored = live.read(schema.FEATURES).where(F.col(INPUT_ID) == "new").toPandas().iloc[0]
    model = load_model(live)
    unlearnt = model.features_of_new(pd.DataFrame({"year": [0.5]}))
    assert stored[schema.N_EVENTS] == 15
    assert unlearnt.offset[0] < stored[schema.OFFSET] < 9.0
    assert stored[schema.OFFSET_VARIANCE] < unlearnt.offset_variance[0]
    assert broken(live) == []


@pytest.mark.long
def test_recovery_does_not_learn_an_input_twice(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["new"], "year": [0.5]})))
    append(live, rows(np.arange(TRAINED, 265)).assign(input_id="new"))
    with dying(monkeypatch, "_learn_arrivals", before=False):  # its features are written, its users are not
        update(live, settings())
    shutil.rmtree(folder_of(live, settings(), 1))
    update(live, settings(), from_ledger=True)
    stored = live.read(schema.FEATURES).where(F.col(INPUT_ID) == "new").first()
    assert stored[schema.N_EVENTS] == 15
    assert broken(live) == []


@pytest.mark.parametrize(
    ("step", "before"),
    [
        (None, False),
        pytest.param("_merge", False, marks=pytest.mark.long),
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


def plan_more(tables: Tables) -> None:
    """Damage the checkpoint: batch 0, applied once, is now planned with the events of one more commit."""
    planned = Path(folder_of(tables, settings(), 1), "offsets", "0")
    planned.with_name(".0.crc").unlink()
    planned.write_text(planned.read_text().replace('"reservoirVersion":3', '"reservoirVersion":4'))


def test_a_batch_that_changed_under_its_number_is_refused(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    append(live, rows(np.arange(TRAINED, 260)))
    with dying(monkeypatch, "_merge", before=False):
        update(live, settings())
    applied = state(live)
    append(live, rows(np.arange(260, 280)))
    plan_more(live)
    with pytest.raises(ReplayError, match="damaged; nothing was applied"):
        update(live, settings())
    assert_same(state(live), applied)


@pytest.mark.long
def test_without_the_comparison_of_fingerprints_the_audit_sees_lost_events(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, rows(np.arange(TRAINED, 260)))
    with dying(monkeypatch, "_merge", before=False):
        update(live, settings())
    append(live, rows(np.arange(260, 280)))
    plan_more(live)
    monkeypatch.setattr("mtl.stream.check", lambda updater: None)
    monkeypatch.setattr(Updater, "_compare", lambda *_: None)
    update(live, settings())  # skipped by Delta's guard, as done
    append(live, rows(np.arange(280, 300)))
    update(live, settings())
    assert state(live)[schema.N_EVENTS].sum() == 280
    assert "users_equal_scratch" in broken(live)


@pytest.mark.long
def test_without_a_look_at_the_ledger_the_audit_sees_a_batch_twice(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, rows(np.arange(TRAINED, 260)))
    with dying(monkeypatch, "_merge", before=False):
        update(live, settings())
    monkeypatch.setattr(Updater, "_may_repeat", lambda self, application: False)
    update(live, settings())
    assert "update_adds_up" in broken(live)


@pytest.mark.long
def test_without_the_comparison_of_checkpoints_the_audit_sees_doubled_events(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, rows(np.arange(TRAINED, 260)))
    update(live, settings())
    shutil.rmtree(folder_of(live, settings(), 1))
    monkeypatch.setattr("mtl.stream.check", lambda updater: None)
    update(live, settings())
    assert "users_equal_scratch" in broken(live)


@pytest.mark.parametrize("lost", ["", pytest.param("offsets", marks=pytest.mark.long)])
def test_a_lost_checkpoint_is_refused_for_its_events_would_count_twice(live: Tables, lost: str) -> None:
    append(live, rows(np.arange(TRAINED, 260)))
    update(live, settings())
    shutil.rmtree(Path(folder_of(live, settings(), 1), lost))
    with pytest.raises(ReplayError, match="--recover"):
        update(live, settings())


@pytest.mark.parametrize(
    ("step", "files"),
    [
        ("_merge", 1),
        pytest.param("_set_aside", 64, marks=pytest.mark.long),
        pytest.param(None, 1, marks=pytest.mark.long),
        pytest.param("_write_ledger", 64, marks=pytest.mark.long),
    ],
)
def test_recovery_goes_on_from_the_ledger_whatever_died_and_wherever_in_a_commit(
    live: Tables, monkeypatch: pytest.MonkeyPatch, step: str | None, files: int
) -> None:
    limited = settings(f"update.max_files_per_trigger={files}")
    events = pd.concat([rows(np.arange(TRAINED, 330)), rows(np.arange(TRAINED, 255), inputs="unheard")])
    append(live, events.sample(frac=1, random_state=0), files=3)
    if step:
        with dying(monkeypatch, step, before=False, call=1 if files == 1 else 0):
            update(live, limited)
    else:
        update(live, limited)
    checkpoint = Path(folder_of(live, limited, 1))
    shutil.rmtree(checkpoint / "offsets")
    if step != "_set_aside":  # with nothing in the ledger there is nothing that it could contradict
        with pytest.raises(ReplayError, match="--recover"):
            update(live, limited)
    update(live, limited, from_ledger=True)
    assert update(live, limited)["batches"] == 0
    assert (state(live)[schema.N_EVENTS].sum(), live.read(WAITING).count()) == (330, 5)
    assert broken(live) == []


@pytest.mark.long
def test_without_what_a_checkpoint_had_read_the_audit_sees_doubled_events(
    live: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, rows(np.arange(TRAINED, 330)), files=3)
    with dying(monkeypatch, "_merge", before=False, call=1):
        update(live, ONE_FILE_A_BATCH)
    shutil.rmtree(Path(folder_of(live, ONE_FILE_A_BATCH, 1), "offsets"))
    monkeypatch.setattr("mtl.stream.already_applied", lambda updater: None)
    update(live, ONE_FILE_A_BATCH, from_ledger=True)
    assert "users_equal_scratch" in broken(live)


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
