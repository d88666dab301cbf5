"""Several versions kept up to date by one job, and the switch between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from pyspark.sql import functions as F
from streaming import TRAINED, append, broken, rows, settings

from mtl import models, schema
from mtl.errors import LockedError
from mtl.lock import exclusive
from mtl.retrain import retrain
from mtl.schema import MODEL_VERSION, USERS
from mtl.stream import folder_of
from mtl.tables import Tables
from mtl.update import Fleet, update

AUTOMATIC = settings("switch.policy='automatic'", "switch.min_events=20", "switch.tolerance=0.2")


def status(tables: Tables) -> dict[int, str]:
    return {row[MODEL_VERSION]: row[schema.STATUS] for row in models.versions(tables).collect()}


def events_of(tables: Tables) -> dict[int, int]:
    return dict(tables.read(USERS).groupBy(MODEL_VERSION).agg(F.sum(schema.N_EVENTS)).collect())


def test_a_candidate_that_is_no_worse_on_fresh_events_goes_live(live: Tables) -> None:
    retrain(live, settings())
    append(live, rows(np.arange(TRAINED, 300)))
    result = update(live, AUTOMATIC)
    assert result["promoted"] == [2]
    assert (result["model_version"], result["applied"], result["versions"]["1"]["applied"]) == (2, 50, 50)
    compared = result["compared"]["2"]
    assert compared["n"] == 50
    # The same data, settings and seed: the same model but for where training's sums were rounded.
    assert compared["candidate"] == pytest.approx(compared["live"], rel=1e-6)
    assert status(live) == {1: "retired", 2: "live"}
    assert broken(live) == []
    assert models.rollback(live) == {"live": 1, "was": 2}
    append(live, rows(np.arange(300, 310)))
    assert update(live, settings())["model_version"] == 1
    assert broken(live) == []


@pytest.mark.long
def test_a_worse_candidate_is_refused_and_its_users_are_left_alone(live: Tables) -> None:
    retrain(live, settings())
    worse = F.col(MODEL_VERSION) == 2
    live.delta(schema.FEATURES).update(worse, {schema.OFFSET: F.col(schema.OFFSET) + 5})
    append(live, rows(np.arange(TRAINED, 300)))
    assert update(live, AUTOMATIC)["promoted"] == []
    assert status(live) == {1: "live", 2: "refused"}
    append(live, rows(np.arange(300, 310)))
    assert update(live, AUTOMATIC)["versions"] == {}
    assert events_of(live) == {1: 310, 2: 300}


@pytest.mark.long
def test_by_hand_nothing_is_promoted_or_refused(live: Tables) -> None:
    retrain(live, settings())
    append(live, rows(np.arange(TRAINED, 300)))
    result = update(live, settings("switch.min_events=20"))
    assert result["compared"]["2"]["n"] == 50
    assert status(live) == {1: "live", 2: "candidate"}
    assert events_of(live) == {1: 300, 2: 300}


@pytest.mark.long
def test_a_candidate_that_fails_holds_nobody_up(live: Tables) -> None:
    retrain(live, settings())
    append(live, rows(np.arange(TRAINED, 300)))
    with exclusive(f"{folder_of(live, settings(), 2)}.lock", "the test"):
        result = update(live, AUTOMATIC)
    assert result["applied"] == 50
    assert "the update of model version 2 is run by" in result["failed_candidates"][2]


def test_a_candidate_that_another_job_held_is_followed_when_that_has_ended(live: Tables) -> None:
    retrain(live, settings())
    fleet = Fleet(live, settings(), None)
    with exclusive(f"{folder_of(live, settings(), 2)}.lock", "the test"):
        fleet._look()
        assert set(fleet.streams) == {1}
    fleet._look()
    assert set(fleet.streams) == {1, 2}
    fleet.close()


def test_one_retraining_at_a_time_publishes_versions(live: Tables) -> None:
    with (
        exclusive(f"{live.root}/_checkpoints/retrain.lock", "the test"),
        pytest.raises(LockedError, match="retraining"),
    ):
        retrain(live, settings())
    assert retrain(live, settings())["model_version"] == 2


@pytest.mark.long
def test_surprise_beyond_the_limit_asks_for_a_retraining_and_a_retraining_answers(live: Tables) -> None:
    stop = threading.Event()
    shifted = rows(np.arange(TRAINED, 350))
    shifted[schema.LABEL] += 20
    append(live, shifted)
    watching = settings("switch.min_events=20", "switch.surprise_limit=2.0", "update.trigger_seconds=1")
    job = threading.Thread(target=update, args=(live.apart(), watching, False, None, stop))
    job.start()
    wait_for(lambda: models.is_requested(live))
    retrain(live, settings())
    time.sleep(5)
    assert not models.is_requested(live)  # of the same events no more is asked for
    stop.set()
    job.join()
    request = live.read(schema.MODELS).where(F.col(schema.STATUS) == schema.REQUESTED).first()
    assert "standardized error" in request[schema.METRICS]
    assert status(live) == {1: "live", 2: "candidate"}


def test_the_running_job_follows_candidates_promotions_and_rollbacks(live: Tables) -> None:
    stop = threading.Event()
    running = settings("update.trigger_seconds=1", "switch.grace_seconds=3600")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            update(live.apart(), running, False, None, stop)
        except BaseException as error:
            failures.append(error)

    job = threading.Thread(target=work)
    job.start()
    try:
        append(live, rows(np.arange(TRAINED, 280)))
        wait_for(lambda: events_of(live)[1] == 280, failures)
        retrain(live, settings("model.k=1"))
        append(live, rows(np.arange(280, 300)))
        wait_for(lambda: events_of(live) == {1: 300, 2: 300}, failures)
        models.promote(live)
        append(live, rows(np.arange(300, 320)))
        wait_for(lambda: events_of(live) == {1: 320, 2: 320}, failures)
        models.rollback(live)
        append(live, rows(np.arange(320, 330)))
        wait_for(lambda: events_of(live)[1] == 330, failures)
    finally:
        stop.set()
        job.join()
    assert not failures
    assert broken(live) == []


def wait_for(condition: Callable[[], bool], failures: list[BaseException] | None = None, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if failures:
            raise failures[0]
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.5)
