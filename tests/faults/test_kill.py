"""kill -9 of the real jobs, at named points and at random: nothing lost, nothing doubled.

Events come through ingest, retrainings make candidates, the update job follows, compacts and switches, and all of it is
killed again and again. In the end the tables must hold what a run without a death would have left: every distinct valid
event once, users equal to a from-scratch pass, the ledger without a gap (:func:`mtl.audit.audit`).

Jobs that are to die are processes of their own; what prepares and what checks runs in the tests' session.

``make faults`` kills some two hundred times (FAULTS=long); the tests of every day, twice.
"""

from __future__ import annotations

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
from doomed import owner_of
from problems import planted
from pyspark.sql import SparkSession

from mtl.audit import audit
from mtl.config import load_settings
from mtl.ingest import ingest_files
from mtl.retrain import retrain
from mtl.tables import Tables
from mtl.update import update

ROOT = Path(__file__).resolve().parents[2]
DOOMED = Path(__file__).with_name("doomed.py")
LONG = os.environ.get("FAULTS") == "long"
PROBLEM = planted(5, users=30, inputs=15, k=2, events=600)
TRAINED = 400
ROUNDS, DEATHS = (10, 18) if LONG else (1, 2)
"""Rounds of deaths at random moments, each from the same tables, and deaths of a round."""

LAST = "last.csv"

POINTS = {
    "ingest": [
        "mtl.ingest:_plan:after:0",
        "mtl.ingest:_quarantine:after:0",
        "mtl.ingest:_insert:before:0",
        "mtl.ingest:_insert:after:0",
        "mtl.ingest:close:after:0",
    ],
    "update": [
        "mtl.updater:Updater._set_aside:before:0",
        "mtl.updater:Updater._set_aside:after:0",
        "mtl.updater:Updater._write_ledger:after:0",
        "mtl.updater:Updater._write_ledger:after:2",
        "mtl.updater:Updater._record_progress:before:1",
        "mtl.updater:Updater._record_progress:after:0",
        "mtl.updater:Updater._add_to_users:after:0",
        "mtl.updater:Updater._add_to_users:before:2",
        "mtl.updater:Updater._add_to_users:after:3",
        "mtl.upsert:UsersTable.merge:after:0",
        "mtl.upsert:UsersTable.replace:after:0",
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
    ],
    "retrain": ["mtl.models:publish:before:0", "mtl.models:publish:after:0", "mtl.models:next_version:after:0"],
}

SETS = [
    "model.k=2",
    "train.iterations=2",
    "ingest.recover_after_minutes=0",
    f"update.max_files_per_trigger={1 if LONG else 2}",
    "care.compact_every_batches=2",
    "switch.policy='automatic'",
    "switch.min_events=10",
    "switch.tolerance=10.0",
]


class Place:
    """A folder with tables, and the jobs on them: in this process, or in one of their own that may die."""

    def __init__(self, folder: Path, spark: SparkSession, java: str = ""):
        self.folder, self.java = folder, java  # further options of Java, for jobs in processes of their own
        self.tables = Tables(spark, str(folder / "tables"))
        self.settings = load_settings([], [f"tables.root={self.tables.root}", *SETS])

    def ingest(self, events: str | None, inputs: str | None = None) -> None:
        ingest_files(self.tables, self.settings, events, inputs)

    def retrain(self, promote: bool = False) -> None:
        retrain(self.tables, self.settings, promote=promote)

    def update(self, recover: bool = False) -> None:
        update(self.tables, self.settings, from_ledger=recover)

    def command(self, name: str, *arguments: str) -> list[str]:
        options = {
            "spark.driver.extraJavaOptions": f"-XX:TieredStopAtLevel=1 -XX:+UseSerialGC {self.java}",
            "spark.databricks.delta.snapshotPartitions": "1",
            "spark.sql.codegen.wholeStage": "false",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        }
        sets = [
            f"tables.root={self.tables.root}",
            "spark.master=local[2]",
            "spark.driver_memory=1g",
            "spark.shuffle_partitions=2",
            "spark.options={" + ", ".join(f'"{key}" = "{value}"' for key, value in options.items()) + "}",
            *SETS,
        ]
        return [str(ROOT / "jobs" / f"{name}.py"), *arguments, *(word for item in sets for word in ("--set", item))]

    def killed_at(self, point: str, name: str, *arguments: str) -> bool:
        """Whether the job reached the point, and died of it; else it ended well."""
        command = [sys.executable, str(DOOMED), point, *self.command(name, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        return done.returncode != 0

    def killed_within(self, seconds: float, name: str, *arguments: str) -> bool:
        """Whether the job was killed at a moment of the first ``seconds`` in which it worked; else it ended well."""
        command = [sys.executable, *self.command(name, *arguments)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = next((line for line in process.stderr if " mtl " in line), None)  # the first line of our log
            assert said or process.wait() == 0
            time.sleep(random.uniform(0, seconds))
            process.kill()
        return process.returncode == -signal.SIGKILL

    def refused(self, name: str, *arguments: str) -> str:
        """The reason in one line, of a job that fails."""
        command = [sys.executable, *self.command(name, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr[-2000:]
        return done.stderr.strip().splitlines()[-1]

    def write(self, name: str, events: np.ndarray) -> str:
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
        file = self.folder / name
        pd.concat([frame, frame[:3], bad]).sample(frac=1, random_state=0).to_csv(file, index=False)
        return str(file)

    def assert_all_is_there(self) -> None:
        """As after a run without a death: every event once, users as from scratch, the ledger without a gap."""
        self.ingest(self.write("again.csv", np.arange(len(PROBLEM))))
        self.update()
        checked = audit(self.tables, self.settings)
        assert not checked["broken"]
        assert checked["checks"]["ingest_adds_up"]["accepted"] == len(PROBLEM)
        in_users = checked["checks"]["update_adds_up"]
        assert in_users["in_users"] + in_users["waiting"] == len(PROBLEM)


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with a live version, and some commits of events that nobody has read yet; x14 is not known.

    Beside them a file of events that are not ingested yet, for a candidate to be compared on.
    """
    place = Place(tmp_path_factory.mktemp("faults"), spark)
    order = np.random.default_rng(0).permutation(len(PROBLEM))
    late = PROBLEM.input[order[:TRAINED]] == 14
    place.ingest(place.write("base.csv", order[:TRAINED][~late]))
    place.retrain()
    *parts, last = np.array_split(order[TRAINED:], 4 if LONG else 3)
    for i, part in enumerate(parts):
        place.ingest(place.write(f"stream{i}.csv", part))
    place.ingest(place.write("late.csv", order[:TRAINED][late]))
    place.write(LAST, last)
    return place.folder


@pytest.fixture(scope="module")
def java(trained: Path, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """In the long campaign: what Java loads is kept from one process for the others, which start in two thirds of the time."""
    if not LONG:
        return ""
    archive = tmp_path_factory.mktemp("java") / "classes.jsa"
    dumping = Place(trained, spark, f"-XX:ArchiveClassesAtExit={archive} -Xlog:disable")
    subprocess.run(
        [sys.executable, *dumping.command("audit")], check=True, capture_output=True
    )  # waits for Java as well
    assert archive.exists()
    return f"-XX:SharedArchiveFile={archive}"


@pytest.fixture
def place(trained: Path, java: str, spark: SparkSession, tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    yield Place(tmp_path, spark, java)
    shutil.rmtree(tmp_path / "tables")


def test_every_named_point_is_in_the_code() -> None:
    for point in (point for points in POINTS.values() for point in points):
        owner, name = owner_of(point)
        assert callable(getattr(owner, name)), point


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
@pytest.mark.parametrize(("name", "point"), [(name, point) for name, points in POINTS.items() for point in points])
def test_kill_9_at_a_named_point(place: Place, name: str, point: str) -> None:
    inputs = place.folder / "inputs.csv"
    pd.DataFrame({"input_id": ["x14"], "year": [1999]}).to_csv(inputs, index=False)
    if "release" in point:  # of the first version, which does not know the input; the next one would
        place.update()
        place.ingest(None, str(inputs))
    elif name == "update":
        place.retrain()  # a candidate, that the job brings up to date, compares and promotes
    if name == "update":
        place.ingest(str(place.folder / LAST))
    more = place.write("more.csv", np.arange(len(PROBLEM)))
    arguments = {"ingest": ["--events", more], "retrain": [], "update": ["--available-now"]}[name]
    merging = ["--set", "update.rewrite_above=1"] if "merge" in point else []
    assert place.killed_at(point, name, *arguments, *merging), "the point was not reached"
    if name == "ingest":
        place.ingest(more)
    place.assert_all_is_there()


@pytest.mark.parametrize("chance", range(ROUNDS))
def test_kill_9_at_random_moments(place: Place, chance: int) -> None:
    """Of update jobs one after the other, while a candidate comes and goes live, and of ingests between them."""
    random.seed(time.time_ns())
    place.retrain()
    place.ingest(str(place.folder / LAST))
    deaths = 0
    for i in range(DEATHS):
        if i % 4 == 3:
            events = place.write("more.csv", np.arange(len(PROBLEM)))
            deaths += place.killed_within(6, "ingest", "--events", events)
        else:
            deaths += place.killed_within(8, "update", *(["--available-now"] if i % 2 else []))
    print(f"round {chance}: {deaths} deaths")
    assert deaths
    place.assert_all_is_there()


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
@pytest.mark.parametrize("torn", ["offsets", "commits", "metadata", "everything"])
def test_a_torn_checkpoint_is_refused_and_recovered_from(place: Place, torn: str) -> None:
    place.retrain()
    place.killed_at("mtl.updater:Updater._add_to_users:after:1", "update", "--available-now")
    checkpoint = place.folder / "tables" / "_checkpoints" / "update-v1"
    if torn == "everything":
        shutil.rmtree(checkpoint)
    elif torn == "metadata":
        (checkpoint / torn).write_text("")
    else:
        last = max((file for file in (checkpoint / torn).iterdir() if file.name.isdigit()), key=lambda f: int(f.name))
        last.write_text("")
        last.with_name(f".{last.name}.crc").unlink(missing_ok=True)
    assert place.refused("update", "--available-now").startswith("update: ")
    place.update(recover=True)
    place.assert_all_is_there()


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
def test_a_full_disk_stops_the_job_and_loses_nothing(
    place: Place, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = tmp_path_factory.mktemp("small")
    tables = place.folder / "tables"
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in tables.rglob("*") if file.is_file())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + 100_000}", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(tables, small / "tables")
        filler = small / "filler"
        with filler.open("wb") as file:
            free = shutil.disk_usage(small).free - 60_000
            file.write(b"\0" * max(0, free))
        full = Place(small, spark, place.java)
        assert full.refused("update", "--available-now").startswith("update: ")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=500m", small], check=True)
        full.assert_all_is_there()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
def test_a_vacuum_behind_a_slow_reader_is_told_and_not_skipped(place: Place) -> None:
    """Files that the stream has not read are gone, their events are in compacted ones: it must not go on without them."""
    spark, name = place.tables.apart().spark, place.tables.name("events")
    spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    spark.sql(f"OPTIMIZE {name}")
    spark.sql(f"VACUUM {name} RETAIN 0 HOURS")
    assert place.refused("update", "--available-now").startswith("update: ")
    place.retrain(promote=True)
    place.assert_all_is_there()
