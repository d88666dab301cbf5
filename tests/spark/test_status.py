"""What the running job says of itself, and the page of its status."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from streaming import TRAINED, append, rows, settings
from test_switch_spark import wait_for

from mtl import schema
from mtl.drift import Seen, weight_distance
from mtl.forms import Given, PartlyGiven
from mtl.models import load_model
from mtl.page import page
from mtl.prior import Prior
from mtl.schema import INPUT_ID, USER_ID
from mtl.status import DELAY, batches, cold_start, status
from mtl.tables import Tables
from mtl.update import update


def test_the_job_tells_prometheus_and_the_page_what_it_did(live: Tables, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop, watched = (
        threading.Event(),
        settings(f"update.metrics_port={port}", "update.trigger_seconds=1", "update.max_files_per_trigger=1"),
    )
    job = threading.Thread(target=update, args=(live.apart(), watched, False, None, stop))
    for first, last in ((TRAINED, 290), (290, 330)):
        append(live, rows(np.arange(first, last)))
    job.start()

    def figures() -> dict[str, float]:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        except OSError:
            return {}
        return {name: float(value) for name, value in re.findall(r"^(mtl_\S+) (\S+)$", text, re.M)}

    try:
        wait_for(lambda: figures().get('mtl_update_applied_events_total{version="1"}') == 80)
        wait_for(lambda: figures().get('mtl_update_lag_events{version="1"}') == 0)
        found = figures()
    finally:
        stop.set()
        job.join()
    told = status(live)
    (version,) = told["versions"]
    assert (version["status"], version["events_applied"], version["batches"], version["waiting"]) == ("live", 80, 2, 0)
    assert (version["lag_commits"], version["lag_events"]) == (0, 0)
    progress = batches(live)
    last = progress.iloc[-1]
    for figure, column in (("loss", schema.LOSS), ("coverage", schema.COVERED)):
        assert found[f'mtl_update_{figure}{{version="1"}}'] == pytest.approx(last[column] / last[schema.VALIDATED])
    assert found['mtl_update_input_drift{version="1"}'] == pytest.approx(version["input_drift"])
    assert found['mtl_update_weight_distance{version="1"}'] > 0
    written = sum(len(set(rows(np.arange(*part))[USER_ID])) for part in ((TRAINED, 290), (290, 330)))
    assert found['mtl_update_updated_users_total{version="1"}'] == written
    assert found["mtl_update_failed_looks_total"] == 0
    assert found['mtl_update_batch_seconds{phase="write",version="1"}'] > 0
    assert found['mtl_update_live{version="1"}'] == 1
    # The weights' distance by its formula.
    users = live.read(schema.USERS).where(F.col(schema.N_EVENTS) > 0).toPandas()
    moved = (np.stack(users[schema.W]) - np.stack(users[schema.PRIOR_MEAN])) ** 2
    assert version["weight_distance"] == pytest.approx(
        np.mean(moved / np.diag(load_model(live).artefact.users.covariance))
    )
    # Weights that are attributes of their users do not move.
    model, given = load_model(live), Given(3, (2,), (1,))
    users_prior = PartlyGiven(Prior(np.eye(1), np.eye(2), np.zeros((1, 2))), given)
    partly = replace(model, artefact=replace(model.artefact, users=users_prior))
    assert weight_distance(live, partly) == pytest.approx(np.mean(moved[:, :2]))
    # What training saw of φ, event by event.
    events = live.read(schema.EVENTS, load_model(live).events_version).join(live.read(schema.FEATURES), INPUT_ID)
    phi = np.stack(events.select(schema.PHI).toPandas()[schema.PHI])
    seen = Seen.of_version(live, 1)
    np.testing.assert_allclose((seen.mean, seen.std), (phi.mean(0), phi.std(0)), atol=1e-12)
    curve = cold_start(progress)
    assert curve.to_dict("records") == told["cold_start"]
    assert curve["n"].sum() == 80
    assert np.average(curve["loss"], weights=curve["n"]) == pytest.approx(version["mean_loss"])
    # The table by SQL, as the README has it.
    hours = live.spark.sql(
        f"""
        SELECT model_version, date_trunc('HOUR', created_at) AS hour, sum(n_events) AS events,
               sum(loss) / sum(validated) AS mean_loss, sum(standardized) / sum(validated) AS calibration,
               sum(covered) / sum(validated) AS coverage90
        FROM {live.name(schema.PROGRESS)} GROUP BY ALL ORDER BY ALL
        """
    ).collect()
    assert sum(row["events"] for row in hours) == 80
    assert sum(row["events"] * row["mean_loss"] for row in hours) == pytest.approx(80 * version["mean_loss"])
    # The second batch's commit was there before the job began.
    assert progress[DELAY].isna().tolist() == [True, False]
    assert 0 < progress[DELAY].iloc[1] < 3600
    text = page(told, progress)
    assert text.count("<img") == 6
    assert "None of" in text


def test_tables_without_a_version_have_a_status_too(spark: SparkSession, tmp_path: Path) -> None:
    tables = Tables(spark, str(tmp_path / "tables"))
    told = status(tables)
    assert (told["versions"], told["tables"]) == ([], {})
    assert "nothing to draw" in page(told, batches(tables))
    assert not (tmp_path / "tables").exists()
