"""Checkpoints that are lost, damaged or behind the ledger: refused, and recovered from without losing or doubling an event."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F
from streaming import (
    ONE_FILE_A_BATCH,
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
from mtl.errors import ReplayError
from mtl.schema import INPUT_ID, INPUTS, WAITING
from mtl.stream import folder_of
from mtl.tables import Tables
from mtl.update import update
from mtl.updater import Updater


def plan_more(tables: Tables) -> None:
    """Damage the checkpoint: batch 0, applied once, is now planned with the events of one more commit."""
    planned = Path(folder_of(tables, settings(), 1), "offsets", "0")
    planned.with_name(".0.crc").unlink()
    planned.write_text(planned.read_text().replace('"reservoirVersion":3', '"reservoirVersion":4'))


def die_after_the_write(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 0, ten events, is in users, and its checkpoint does not know it."""
    append(tables, rows(np.arange(TRAINED, 260)))
    with dying(monkeypatch, "_add_to_users", before=False):
        update(tables, settings())


def test_a_batch_that_changed_under_its_number_is_refused(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after_the_write(live, monkeypatch)
    applied = state(live)
    append(live, rows(np.arange(260, 280)))
    plan_more(live)
    with pytest.raises(ReplayError, match="damaged; nothing was applied"):
        update(live, settings())
    assert_same(state(live), applied)


@pytest.mark.long
def test_without_the_comparison_of_fingerprints_the_audit_sees_lost_events(
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    die_after_the_write(live, monkeypatch)
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
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    die_after_the_write(live, monkeypatch)
    monkeypatch.setattr(Updater, "_may_repeat", lambda self, application: False)
    update(live, settings())
    assert "update_adds_up" in broken(live)


@pytest.mark.long
def test_without_the_comparison_of_checkpoints_the_audit_sees_doubled_events(
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
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
        ("_add_to_users", 1),
        pytest.param("_set_aside", 64, marks=pytest.mark.long),
        pytest.param(None, 1, marks=pytest.mark.long),
        pytest.param("_write_ledger", 64, marks=pytest.mark.long),
    ],
)
def test_recovery_goes_on_from_the_ledger_whatever_died_and_wherever_in_a_commit(
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
    step: str | None,
    files: int,
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
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append(live, rows(np.arange(TRAINED, 330)), files=3)
    with dying(monkeypatch, "_add_to_users", before=False, call=1):
        update(live, ONE_FILE_A_BATCH)
    shutil.rmtree(Path(folder_of(live, ONE_FILE_A_BATCH, 1), "offsets"))
    monkeypatch.setattr("mtl.stream.already_applied", lambda updater: None)
    update(live, ONE_FILE_A_BATCH, from_ledger=True)
    assert "users_equal_scratch" in broken(live)


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


@pytest.mark.long
def test_after_a_recovery_within_a_commit_nothing_is_read_again_once_the_stream_has_passed_it(
    live: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append(live, rows(np.arange(TRAINED, 330)), files=3)
    with dying(monkeypatch, "_add_to_users", before=False, call=1):
        update(live, ONE_FILE_A_BATCH)
    shutil.rmtree(folder_of(live, ONE_FILE_A_BATCH, 1))
    update(live, ONE_FILE_A_BATCH, from_ledger=True)
    append(live, rows(np.arange(330, 340)))
    update(live, ONE_FILE_A_BATCH)
    monkeypatch.setattr("mtl.recover.files_added", None)  # the commit's log may be gone by now
    append(live, rows(np.arange(340, 350)))
    assert update(live, ONE_FILE_A_BATCH)["applied"] == 10
    monkeypatch.undo()
    assert broken(live) == []


@pytest.mark.long
def test_waiting_events_are_released_after_a_recovery_that_had_nothing_to_read(live: Tables) -> None:
    append(live, rows(np.arange(TRAINED, 260)).assign(input_id="late"))
    assert update(live, settings())["waited"] == 10
    shutil.rmtree(folder_of(live, settings(), 1))
    update(live, settings(), from_ledger=True)
    live.append(INPUTS, live.spark.createDataFrame(pd.DataFrame({INPUT_ID: ["late"], "year": [1.0]})))
    assert update(live, settings())["released"] == 10
    assert broken(live) == []
