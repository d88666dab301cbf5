"""What the running job says of itself, and the page of its status."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from test_switch_spark import wait_for
from test_update import TRAINED, append, live, rows, settings, trained  # noqa: F401

from mtl import schema
from mtl.drift import Seen
from mtl.models import load_model
from mtl.page import page
from mtl.progress import Progress
from mtl.status import batches, cold_start, status
from mtl.tables import Tables
from mtl.update import update


def test_the_job_tells_prometheus_and_the_page_what_it_did(live: Tables, tmp_path: Path) -> None:  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop, watched = threading.Event(), settings(f"update.metrics_port={port}", "update.trigger_seconds=1")
    job = threading.Thread(target=update, args=(live.apart(), watched, False, None, stop))
    append(live, rows(np.arange(TRAINED, 330)))
    job.start()

    def figures() -> dict[str, float]:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        except OSError:
            return {}
        return {name: float(value) for name, value in re.findall(r"^(mtl_\S+) (\S+)$", text, re.M)}

    try:
        wait_for(lambda: figures().get('mtl_update_applied_events{version="1"}') == 80)
        wait_for(lambda: figures().get('mtl_update_lag_events{version="1"}') == 0)
        found = figures()
    finally:
        stop.set()
        job.join()
    told = status(live)
    (version,) = told["versions"]
    assert (version["status"], version["events_applied"], version["batches"], version["waiting"]) == ("live", 80, 1, 0)
    for ours, theirs in (("loss", "mean_loss"), ("coverage", "coverage90"), ("input_drift", "input_drift")):
        assert found[f'mtl_update_{ours}{{version="1"}}'] == pytest.approx(version[theirs])
    assert found['mtl_update_batch_seconds{phase="merge",version="1"}'] > 0
    assert found['mtl_update_live{version="1"}'] == 1
    # The weights' distance by its formula.
    users = live.read(schema.USERS).where(F.col(schema.N_EVENTS) > 0).toPandas()
    moved = (np.stack(users[schema.W]) - np.stack(users[schema.PRIOR_MEAN])) ** 2
    assert version["weight_distance"] == pytest.approx(
        np.mean(moved / np.diag(load_model(live).artefact.users.covariance))
    )
    curve = cold_start(batches(live))
    assert curve["n"].sum() == 80
    assert np.average(curve["loss"], weights=curve["n"]) == pytest.approx(version["mean_loss"])
    text = page(told, batches(live))
    assert text.count("<img") == 4
    assert "None of" in text


def test_tables_without_a_version_have_a_status_too(spark: SparkSession, tmp_path: Path) -> None:
    told = status(Tables(spark, str(tmp_path / "tables")))
    assert told["versions"] == []
    assert "nothing to draw" in page(told, pd.DataFrame())


def test_a_shift_is_in_standard_deviations_of_what_training_saw() -> None:
    phi = np.array([[1.0, 0.0], [1.0, 2.0]])
    seen = Seen.of(np.array([3.0, 1.0]), phi)  # of the second function: 0, 0, 0, 2
    moved = Progress.nothing(2)
    moved.n[0], moved.phi[:] = 4, [4.0, 8.0]
    assert seen.distance(moved) == pytest.approx((2.0 - 0.5) / 0.75**0.5)
    assert seen.distance(Progress.nothing(2)) == 0.0
