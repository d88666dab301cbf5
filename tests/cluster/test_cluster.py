"""The jobs on a cluster: one master, two workers of one core, and a Python that knows nothing of mtl.

What runs there is what ``make package`` built, sent along by spark-submit. In the middle of the retraining a worker is
killed with all that it holds; the tables must be those of local mode all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyspark
import pytest
from problems import planted
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrow import matrix
from mtl.config import load_settings
from mtl.evaluate import evaluate
from mtl.ingest import ingest_files
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.tables import Tables
from mtl.update import update

ROOT = Path(__file__).resolve().parents[2]
SPARK_HOME = Path(pyspark.__path__[0])
WHEREABOUTS = Path(__file__).with_name("whereabouts.py")
PATIENCE = 600  # seconds for one job on a busy machine

PROBLEM = planted(7, users=80, inputs=40, k=2, events=3000)
TRAINED, STREAMED = 2400, 2800  # events up to here
# Sums depend on how users are partitioned, so that is said and not left to the number of cores.
ITERATIONS = 15
TRAINING = [
    "train.partitions=4",
    "update.partitions=2",
    "spark.shuffle_partitions=2",
    "model.k=3",
    f"train.iterations={ITERATIONS}",
]
AGREEMENT = 1e-9  # relative to the largest number of a column


@dataclass
class Cluster:
    """A standalone cluster of processes on this machine, each with its own work folder."""

    folder: Path
    python: Path  # of drivers and executors, unless a job says otherwise
    url: str = ""
    workers: list[subprocess.Popen] = field(default_factory=list)
    started: int = 0  # workers so far
    master: subprocess.Popen | None = None

    def start(self) -> None:
        port = free_port()
        self.url = f"spark://127.0.0.1:{port}"
        master = ["Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
        self.master = self._daemon("master", *master)
        # A worker that comes before its master asks again after ten seconds or so.
        wait_for(lambda: listens(port), 60, "the master does not listen")
        self.fill()

    def fill(self) -> None:
        """Start workers until there are two."""
        while len(self.workers) < 2:
            self.started += 1
            name = f"worker{self.started}"
            work = ["--work-dir", str(self.folder / name), "--cores", "1", "--memory", "1g"]
            ports = ["--host", "127.0.0.1", "--webui-port", "0"]
            self.workers.append(self._daemon(name, "worker.Worker", *ports, *work, self.url))
        registered = "Registering worker"
        wait_for(lambda: self.log("master").count(registered) == self.started, 60, "the workers do not register")

    def stop(self) -> None:
        for process in [*self.workers, *([self.master] if self.master else [])]:
            kill(process)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def submit(self, job: Path, *arguments: str, options: tuple[str, ...] = (), log: str) -> subprocess.Popen:
        command = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", self.url, "--driver-memory", "1g"]
        for option in (
            "spark.executor.memory=700m",
            "spark.driver.host=127.0.0.1",
            "spark.driver.bindAddress=127.0.0.1",
            "spark.ui.enabled=false",
            f"spark.pyspark.python={self.python}",
            f"spark.pyspark.driver.python={self.python}",
            # As in conftest: little data, many plans.
            "spark.driver.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
            "spark.executor.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
            "spark.sql.codegen.wholeStage=false",
            "spark.sql.codegen.factoryMode=NO_CODEGEN",
        ):
            command += ["--conf", option]
        with open(self.folder / f"{log}.out", "w") as out, open(self.folder / f"{log}.log", "w") as err:
            return subprocess.Popen(
                [*command, *options, str(job), *arguments],
                stdout=out,
                stderr=err,
                env=environment(),
                cwd=self.folder,
                start_new_session=True,
            )

    def result(self, process: subprocess.Popen, log: str) -> dict:
        """What the job printed last; the test fails with the job's own words if it did."""
        try:
            status = process.wait(PATIENCE)
        finally:
            kill(process)
        said = (self.folder / f"{log}.out").read_text()
        assert status == 0, said[-3000:] + self.log(log)[-3000:]
        return json.loads(said.splitlines()[-1])

    def run(self, job: Path, *arguments: str, options: tuple[str, ...] = (), log: str) -> dict:
        return self.result(self.submit(job, *arguments, options=options, log=log), log)

    def _daemon(self, name: str, kind: str, *arguments: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "w") as log:
            main = f"org.apache.spark.deploy.{'master.' if kind == 'Master' else ''}{kind}"
            command = [str(SPARK_HOME / "bin" / "spark-class"), main, *arguments]
            # Its executors are its children: one group, to be killed at once.
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=self.folder,
                start_new_session=True,
            )


def environment() -> dict[str, str]:
    """Without what leads to a Python package of ours, or to another Spark."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYSPARK", "SPARK", "MTL"))
    }
    return {**kept, "SPARK_HOME": str(SPARK_HOME), "SPARK_DAEMON_MEMORY": "256m", "SPARK_LOCAL_IP": "127.0.0.1"}


def kill(process: subprocess.Popen) -> None:
    """With its children, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.1)


@pytest.fixture(scope="module")
def packaged() -> Path:
    zips = list((ROOT / "dist").glob("oracle_mtl-*.zip"))
    if len(zips) != 1:
        pytest.skip("there is no package in dist: run 'make cluster-test', or 'make package' before")
    return zips[0]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the packages of this one, mtl and pyspark left out: Spark brings the latter itself."""
    folder = tmp_path_factory.mktemp("python")
    packages = folder / "packages"
    packages.mkdir()
    left_out = ("mtl", "oracle_mtl", "__editable__", "pyspark")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(left_out) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    python = folder / "python"
    # -S: without the site-packages that belong to the interpreter.
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, bare_python: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), bare_python)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    p = PROBLEM
    events = pd.DataFrame({USER_ID: [f"u{u}" for u in p.user], INPUT_ID: [f"x{x}" for x in p.input], LABEL: p.label})
    parts = {"trained": events[:TRAINED], "streamed": events[TRAINED:STREAMED], "unseen": events[STREAMED:]}
    parts["choices"] = parts["trained"].assign(label=(p.label[:TRAINED] > p.mean_label).astype(int))
    parts["inputs"] = pd.DataFrame(
        {INPUT_ID: [f"x{i}" for i in range(len(p.input_attributes))], "size": p.input_attributes[:, -1]}
    )
    for name, rows in parts.items():
        rows.to_csv(folder / f"{name}.csv", index=False)
    return {name: str(folder / f"{name}.csv") for name in parts}


def test_python_of_the_cluster_has_no_mtl(bare_python):
    def run(line: str) -> str:
        return subprocess.run(
            [bare_python, "-c", line], capture_output=True, text=True, cwd="/", env=environment()
        ).stderr

    assert "No module named 'mtl'" in run("import mtl")
    assert run("import numpy, scipy, pandas, pyarrow, sklearn, pydantic") == ""


def test_executors_have_what_was_shipped_and_nothing_else(cluster, packaged):
    without = cluster.run(WHEREABOUTS, log="without")
    assert {place["mtl"] for place in [without["driver"], *without["executors"]]} == {None}
    shipped = cluster.run(WHEREABOUTS, options=("--py-files", str(packaged)), log="shipped")
    assert shipped["driver"]["mtl"].endswith(f"{packaged.name}/mtl/__init__.py")
    assert all(place["mtl"].endswith(f"{packaged.name}/mtl/__init__.py") for place in shipped["executors"])
    assert len({place["in"] for place in shipped["executors"]}) == 2


def test_environment_archive_serves_executors(cluster, packaged):
    archive = packaged.with_name(f"{packaged.stem}-environment.tar.gz")
    if not archive.exists():
        pytest.skip("there is no environment archive in dist: run 'make cluster-test ENV=1'")
    options = ("--archives", f"{archive}#environment", "--conf", "spark.pyspark.python=./environment/bin/python")
    said = cluster.run(WHEREABOUTS, options=options, log="archive")
    assert said["driver"]["mtl"] is None
    for place in said["executors"]:
        assert place["mtl"].startswith(f"{place['in']}/environment/lib/")


def test_same_as_local_mode_though_a_worker_dies(spark, cluster, packaged, files, tmp_path):
    local, shared = (Tables(spark, str(tmp_path / name)) for name in ("local", "shared"))
    settings = load_settings(assignments=TRAINING)
    ingest_files(local, settings, files["trained"], files["inputs"])
    expected = retrain(local, settings)
    ingest_files(local, settings, files["streamed"])
    update(local, settings)
    expected |= evaluate(local, settings, files["unseen"])

    submit = Submitted(cluster, packaged, shared.root, TRAINING, tmp_path)
    submit("ingest", "--events", files["trained"], "--inputs", files["inputs"])
    trained = submit.retrain_with_a_death()
    submit("ingest", "--events", files["streamed"])
    submit("update", "--available-now")
    evaluated = submit("evaluate", "--events", files["unseen"])

    np.testing.assert_allclose(trained["objective"], expected["objective"], rtol=AGREEMENT)
    assert evaluated["rmse"] == pytest.approx(expected["rmse"], rel=AGREEMENT)
    assert_same_tables(local, shared)


@pytest.mark.parametrize("setting", ["train.reduction=distributed", "model.loss=logistic"])
def test_what_training_keeps_on_executors_outlives_one(spark, cluster, packaged, files, tmp_path, setting):
    """Inputs' shards, and under another loss than the squared one the events' working values."""
    local, shared = (Tables(spark, str(tmp_path / name)) for name in ("local", "shared"))
    settings = load_settings(assignments=[*TRAINING, setting])
    ingest_files(local, settings, files["choices"], files["inputs"])
    expected = retrain(local, settings)
    ingest_files(shared, settings, files["choices"], files["inputs"])
    trained = Submitted(cluster, packaged, shared.root, [*TRAINING, setting], tmp_path).retrain_with_a_death()
    np.testing.assert_allclose(trained["objective"], expected["objective"], rtol=AGREEMENT)
    assert_same_tables(local, shared)


@dataclass
class Submitted:
    """Jobs on the cluster, over tables that all its processes see."""

    cluster: Cluster
    packaged: Path
    root: str
    settings: list[str]
    folder: Path

    @property
    def options(self) -> tuple[str, ...]:
        return "--py-files", str(self.packaged), "--conf", f"spark.checkpoint.dir={self.folder / 'checkpoints'}"

    @property
    def arguments(self) -> list[str]:
        return [part for value in (*self.settings, f"tables.root={self.root}") for part in ("--set", value)]

    def __call__(self, name: str, *own: str) -> dict:
        job = ROOT / "jobs" / f"{name}.py"
        return self.cluster.run(job, *own, *self.arguments, options=self.options, log=f"{self.folder.name}-{name}")

    def retrain_with_a_death(self) -> dict:
        """Of one of the two workers, with its executor and all that this holds, between two passes or within one."""
        log = f"{self.folder.name}-retrain"
        self.cluster.fill()
        job = ROOT / "jobs" / "retrain.py"
        training = self.cluster.submit(job, *self.arguments, options=self.options, log=log)
        try:
            words = self.cluster.folder / f"{log}.out"  # spark-submit sends all that Python says there
            has_begun = lambda: "iteration 3," in words.read_text() or training.poll() is not None  # noqa: E731
            wait_for(has_begun, PATIENCE, "the training does not come to its third pass")
            kill(self.cluster.workers.pop())
            assert f"iteration {ITERATIONS - 2}," not in words.read_text(), "the worker died too late to matter"
        finally:
            result = self.cluster.result(training, log)
        assert "Lost executor" in self.cluster.log(log)
        return result


def assert_same_tables(local: Tables, cluster: Tables) -> None:
    compared = {schema.FEATURES: INPUT_ID, schema.USERS: USER_ID}
    numbers = {
        schema.FEATURES: (schema.PHI, schema.SECOND_MOMENT, schema.OFFSET_PHI),
        schema.USERS: (schema.A, schema.B, schema.W),
    }
    for table, key in compared.items():
        ours, theirs = (tables.read(table).orderBy(F.col(key)).toArrow() for tables in (local, cluster))
        assert ours[key].to_pylist() == theirs[key].to_pylist()
        assert len(ours)
        for column in numbers[table]:
            width = len(ours[column][0])
            a, b = matrix(ours[column], width), matrix(theirs[column], width)
            np.testing.assert_allclose(a, b, rtol=0, atol=AGREEMENT * np.abs(a).max())
