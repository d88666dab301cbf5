"""kill -9 of the real jobs, at named points and at random: nothing lost, nothing doubled.

Events come through ingest, retrainings make candidates, the update job follows, compacts and switches, and all of it is
killed again and again. In the end the tables must hold what a run without a death would have left: every distinct valid
event once, users equal to a from-scratch pass, the ledger without a gap (jobs/audit.py).

``make faults`` kills some two hundred times (FAULTS=long); the tests of every day, a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted

ROOT = Path(__file__).resolve().parents[2]
DOOMED = Path(__file__).with_name("doomed.py")
LONG = os.environ.get("FAULTS") == "long"
PROBLEM = planted(5, users=30, inputs=15, k=2, events=600)
TRAINED = 400

POINTS = {
    "ingest": [
        "mtl.ingest:_plan:after:0",
        "mtl.ingest:_quarantine:after:0",
        "mtl.ingest:_insert:before:0",
        "mtl.ingest:_insert:after:0",
        "mtl.ingest:_close:after:0",
    ],
    "update": [
        "mtl.updater:Updater._set_aside:before:0",
        "mtl.updater:Updater._set_aside:after:0",
        "mtl.updater:Updater._write_ledger:after:0",
        "mtl.updater:Updater._write_ledger:after:2",
        "mtl.updater:Updater._record_progress:before:1",
        "mtl.updater:Updater._record_progress:after:0",
        "mtl.updater:Updater._merge:after:0",
        "mtl.updater:Updater._merge:before:2",
        "mtl.updater:Updater._merge:after:3",
        "mtl.updater:Updater._finish_release:before:0",
        "mtl.updater:Updater._finish_release:after:0",
        "mtl.care:compact:before:0",
        "mtl.care:compact:after:0",
        "mtl.care:compact:after:3",
        "mtl.stream:Stream.drain:after:0",
        "mtl.stream:Stream.drain:before:1",
        "mtl.stream:Stream.drain:after:1",
        "mtl.models:promote:before:0",
        "mtl.models:promote:after:0",
        "mtl.models:refuse:before:0",
    ],
    "retrain": ["mtl.models:publish:before:0", "mtl.models:publish:after:0", "mtl.models:next_version:after:0"],
}
EVERY_DAY = {"update": ["mtl.models:promote:after:0"]}


def job(name: str, folder: Path, *arguments: str) -> list[str]:
    fixed = [
        "spark.master=local[2]",
        "spark.driver_memory=1g",
        "spark.shuffle_partitions=2",
        "model.k=2",
        "train.iterations=2",
        "ingest.recover_after_minutes=0",
        "update.max_files_per_trigger=1",
        "care.compact_every_batches=2",
        "switch.policy='automatic'",
        "switch.min_events=10",
        "switch.tolerance=10.0",
    ]
    options = 'spark.options={"spark.driver.extraJavaOptions" = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}'
    sets = [word for setting in [options, f"tables.root={folder / 'tables'}", *fixed] for word in ("--set", setting)]
    return [str(ROOT / "jobs" / f"{name}.py"), *arguments, *sets]


def run(name: str, folder: Path, *arguments: str) -> dict:
    done = subprocess.run([sys.executable, *job(name, folder, *arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def killed_at(point: str, name: str, folder: Path, *arguments: str) -> bool:
    """Whether the job reached the point, and died of it; else it ended well."""
    command = [sys.executable, str(DOOMED), point, *job(name, folder, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode != 0


def killed_after(seconds: float, name: str, folder: Path, *arguments: str) -> bool:
    process = subprocess.Popen(
        [sys.executable, *job(name, folder, *arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def write(folder: Path, name: str, events: np.ndarray) -> str:
    """A file of events, some of them twice, one of them bad."""
    frame = pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in PROBLEM.user[events]],
            "input_id": [f"x{i}" for i in PROBLEM.input[events]],
            "label": PROBLEM.label[events].astype(str),
            "weight": PROBLEM.weight[events],
            "event_id": [f"e{i}" for i in events],
        }
    )
    bad = frame[:1].assign(label="many", event_id=f"bad-{name}")
    pd.concat([frame, frame[:3], bad]).sample(frac=1, random_state=0).to_csv(folder / name, index=False)
    return str(folder / name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with a live version, and four commits of events that nobody has read yet; x14 is not known."""
    folder = tmp_path_factory.mktemp("faults")
    order = np.random.default_rng(0).permutation(len(PROBLEM))
    late = PROBLEM.input[order[:TRAINED]] == 14
    run("ingest", folder, "--events", write(folder, "base.csv", order[:TRAINED][~late]))
    run("retrain", folder)
    parts = np.array_split(order[TRAINED:], 3)
    for i, part in enumerate(parts):
        run("ingest", folder, "--events", write(folder, f"stream{i}.csv", part))
    run("ingest", folder, "--events", write(folder, "late.csv", order[:TRAINED][late]))
    return folder


@pytest.fixture
def tables(trained: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    yield tmp_path
    shutil.rmtree(tmp_path / "tables")


def assert_all_is_there(folder: Path) -> None:
    """As after a run without a death: every event once, users as from scratch, the ledger without a gap."""
    run("ingest", folder, "--events", write(folder, "again.csv", np.arange(len(PROBLEM))))
    run("update", folder, "--available-now")
    audit = run("audit", folder)
    assert audit["failed"] is False
    assert audit["checks"]["ingest_adds_up"]["accepted"] == len(PROBLEM)
    update = audit["checks"]["update_adds_up"]
    assert update["in_users"] + update["waiting"] == len(PROBLEM)


@pytest.mark.parametrize(
    ("name", "point"), [(name, point) for name, points in (POINTS if LONG else EVERY_DAY).items() for point in points]
)
def test_kill_9_at_a_named_point(tables: Path, name: str, point: str) -> None:
    inputs = tables / "inputs.csv"
    pd.DataFrame({"input_id": ["x14"], "year": [1999]}).to_csv(inputs, index=False)
    if name == "update":
        run("retrain", tables)  # a candidate, that the job brings up to date, compares and promotes
        if "release" in point:
            run("update", tables, "--available-now")
            run("ingest", tables, "--inputs", str(inputs))
    arguments = {
        "ingest": ["--events", write(tables, "more.csv", np.arange(len(PROBLEM)))],
        "retrain": [],
        "update": ["--available-now"],
    }[name]
    killed = killed_at(point, name, tables, *arguments)
    print(f"{point}: {'killed' if killed else 'not reached'}")
    if name == "ingest" and killed:
        run(name, tables, *arguments)
    assert_all_is_there(tables)


def test_kill_9_at_random_moments(tables: Path) -> None:
    """Of update jobs one after the other, while a candidate comes and goes live, and of ingests between them."""
    moments = random.Random(time.time_ns())
    run("retrain", tables)
    deaths = 0
    for i in range(60 if LONG else 2):
        if LONG and i % 4 == 3:
            events = write(tables, "more.csv", np.arange(len(PROBLEM)))
            deaths += killed_after(moments.uniform(6, 14), "ingest", tables, "--events", events)
        else:
            deaths += killed_after(moments.uniform(6, 24), "update", tables, "--available-now")
    print(f"{deaths} deaths")
    assert_all_is_there(tables)


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
@pytest.mark.parametrize("torn", ["offsets", "commits", "metadata", "everything"])
def test_a_torn_checkpoint_is_refused_and_recovered_from(tables: Path, torn: str) -> None:
    run("retrain", tables)
    killed_at("mtl.updater:Updater._merge:after:1", "update", tables, "--available-now")
    checkpoint = tables / "tables" / "_checkpoints" / "update-v1"
    if torn == "everything":
        shutil.rmtree(checkpoint)
    elif torn == "metadata":
        (checkpoint / torn).write_text("")
    else:
        last = max((file for file in (checkpoint / torn).iterdir() if file.name.isdigit()), key=lambda f: int(f.name))
        last.write_text("")
        last.with_name(f".{last.name}.crc").unlink(missing_ok=True)
    refused = subprocess.run(
        [sys.executable, *job("update", tables, "--available-now")], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("update: ")
    run("update", tables, "--available-now", "--recover")
    assert_all_is_there(tables)


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
def test_a_full_disk_stops_the_job_and_loses_nothing(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    small = tmp_path_factory.mktemp("small")
    size = sum(file.stat().st_size for file in tables.rglob("*") if file.is_file())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + 100_000}", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(tables, small, dirs_exist_ok=True)
        filler = small / "filler"
        with filler.open("wb") as file:
            free = shutil.disk_usage(small).free - 60_000
            file.write(b"\0" * max(0, free))
        command = [sys.executable, *job("update", small, "--available-now")]
        full = subprocess.run(command, capture_output=True, text=True, check=False)
        assert full.returncode == 1, full.stderr[-2000:]
        assert full.stderr.strip().splitlines()[-1].startswith("update: ")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=500m", small], check=True)
        assert_all_is_there(small)
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
def test_a_vacuum_behind_a_slow_reader_is_told_and_not_skipped(tables: Path) -> None:
    """Files that the stream has not read are gone, their events are in compacted ones: it must not go on without them."""
    script = (
        "import sys; from mtl.config import load_settings; from mtl.session import open_session; "
        "settings = load_settings([], ['spark.master=local[1]', 'spark.driver_memory=1g', "
        '\'spark.options={"spark.databricks.delta.retentionDurationCheck.enabled"="false"}\']); '
        "spark = open_session(settings.spark, 'vacuum'); name = f'delta.`{sys.argv[1]}`'; "
        "spark.sql(f'OPTIMIZE {name}'); spark.sql(f'VACUUM {name} RETAIN 0 HOURS')"
    )
    subprocess.run([sys.executable, "-c", script, str(tables / "tables" / "events")], check=True, cwd=ROOT)
    command = [sys.executable, *job("update", tables, "--available-now")]
    behind = subprocess.run(command, capture_output=True, text=True, check=False)
    assert behind.returncode == 1
    assert behind.stderr.strip().splitlines()[-1].startswith("update: ")
    run("retrain", tables, "--promote")
    assert_all_is_there(tables)
