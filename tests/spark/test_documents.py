"""Every command that README and the guides print, run as it is printed."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from pyspark.sql import SparkSession  # noqa: E402
from running import Server  # noqa: E402

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAST = {"MTL_MODEL__K": "2", "MTL_TRAIN__ITERATIONS": "2", "MTL_ENCODE__MIN_CATEGORY_COUNT": "1"}
INGEST = (
    "python jobs/ingest.py --events ratings.csv --inputs movies.csv --columns input_id=movie,label=stars "
    "--set tables.root=tables"
)
# Figures of scale.py in the order of the guide's table.
EXPONENTS = ("pass_seconds", "fixed_seconds", "write_seconds", "update_seconds", "store_seconds", "store_bytes")
# What a command begins with that nothing here can run, and why.
NOT_HERE = {
    "make ": "the targets are looked up below",
    ". .venv/bin/activate": "the tests run in it",
    "spark-submit --master": "tests/cluster submits to a cluster",
}


def blocks(file: str, language: str) -> list[str]:
    return [text for of, text in FENCED.findall((ROOT / file).read_text()) if of == language]


def commands(file: str) -> Iterator[str]:
    """The file's commands, a line each, without their comments."""
    for block in blocks(file, ""):
        for line in block.replace("\\\n", " ").splitlines() if "►" not in block else []:  # that one is a drawing
            yield re.sub(r"\s+# .*", "", line)


@pytest.fixture
def here(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the commands name, in which jobs run in this process, with its session."""
    random = np.random.default_rng(1)
    users, movies = np.arange(190, 200), np.arange(240, 305, 2)
    pairs = pd.MultiIndex.from_product([users, movies], names=["user_id", "movie"]).to_frame(index=False)
    pairs["stars"] = np.clip(np.round(3 + pairs.movie % 3 - pairs.user_id % 2 + random.normal(size=len(pairs))), 1, 5)
    pairs = pairs.sample(frac=1, random_state=1).assign(user=pairs.user_id)
    for name, rows in {"ratings": pairs[:250], "today": pairs[250:280], "test": pairs[280:]}.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    attributes = {"movie": movies, "year": 1990 + movies % 7, "genres": random.choice(["Drama", "Comedy"], len(movies))}
    pd.DataFrame(attributes).to_csv(tmp_path / "movies.csv", index=False)
    (tmp_path / "conf").symlink_to(ROOT / "conf")

    def failed(name: str, reason: str) -> None:
        raise AssertionError(f"{name}: {reason}")

    monkeypatch.chdir(tmp_path)
    for name, value in FAST.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mtl.job.open_session", lambda *_: spark)
    monkeypatch.setattr("mtl.session.open_session", lambda *_: spark)
    monkeypatch.setattr(SparkSession, "stop", lambda self: None)
    monkeypatch.setattr("mtl.command._fail", failed)
    handlers, on_term = logging.root.handlers[:], signal.getsignal(signal.SIGTERM)
    yield tmp_path
    logging.root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, on_term)


class Shell:
    """Runs commands as they are printed, jobs in this process; those that would go on for ever until all is done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.results: dict[str, list[dict]] = {}

    def run(self, command: str) -> None:
        if command.startswith("python jobs/serve.py"):
            assert command.endswith("tables.root=tables")
            self.serve('curl -s localhost:8080/v1/observe -d \'{"user": "190", "input": "242", "label": 4}\'')
        elif command.startswith("curl "):
            self.serve(command)
        elif command.startswith("python jobs/"):
            self.job(command)
        elif command.startswith(("rm ", "mv ", "cp ")):
            subprocess.run(command, shell=True, cwd=self.folder, check=True)
        else:
            assert command.startswith(tuple(NOT_HERE)), f"nothing runs this: {command}"

    def job(self, command: str) -> None:
        _, job, *words = shlex.split(command.replace("=incoming", f"={self.folder}/incoming"))
        # Java was started in another folder.
        words = [str(self.folder / word) if (self.folder / word).exists() else word for word in words]
        if ("--stream" in words or job == "jobs/update.py") and "--available-now" not in words:
            words.append("--available-now")
        self.monkeypatch.setattr(sys, "argv", [job, *words])
        self.capsys.readouterr()
        runpy.run_path(str(ROOT / job), run_name="__main__")
        result = json.loads(self.capsys.readouterr().out.splitlines()[-1])
        self.results.setdefault(job.removeprefix("jobs/"), []).append(result)

    def serve(self, curl: str) -> None:
        with Server(self.folder / "tables") as server:
            there = curl.replace("localhost:8080", f"127.0.0.1:{server.port}")
            answer = subprocess.run(shlex.split(there), capture_output=True, text=True, check=True).stdout
        assert "error" not in json.loads(answer), answer


@pytest.fixture
def shell(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(here, monkeypatch, capsys)


@pytest.mark.long
def test_the_commands_of_the_readme(shell: Shell) -> None:
    for command in commands("README.md"):
        shell.run(command.replace("my_package.functions:Factors", "mtl.differentiable:LinearFunction"))
    results = shell.results
    assert [result["accepted"] for result in results["ingest.py"]] == [250, 30]
    assert results["update.py"][0]["applied"] == 30
    assert {"global_mean", "als"} <= results["evaluate.py"][0]["baselines"].keys()
    assert [result["model_version"] for result in results["retrain.py"]] == [1, 2, 3]


@pytest.mark.long
def test_the_python_of_the_readme(here: Path) -> None:
    for block in blocks("README.md", "python"):
        exec(re.sub(r'"(ratings.csv|movies.csv|model)"', rf'"{here}/\1"', block), {})  # Java was started elsewhere
    assert (here / "model").is_dir()


@pytest.mark.long
def test_the_commands_of_choosing(shell: Shell) -> None:
    for command in [INGEST, "python jobs/retrain.py --set tables.root=tables", *commands("mtl/guide/choosing.md")]:
        shell.run(command)
    assert [result["model_version"] for result in shell.results["retrain.py"]] == [1, 2, 3, 4]


@pytest.mark.long
def test_the_commands_of_operating(shell: Shell, spark: SparkSession) -> None:
    here = shell.folder
    (here / "incoming").mkdir()
    shutil.copy(here / "today.csv", here / "incoming" / "1.csv")
    test = pd.read_csv(here / "test.csv")
    test[:5].to_csv(here / "mended.csv", index=False)
    test[5:10].to_csv(here / "late.csv", index=False)
    pd.DataFrame({"user_id": [192, 193]}).to_csv(here / "forget.csv", index=False)
    for command in commands("mtl/guide/operating.md"):
        if "--correct" in command:
            events = spark.read.format("delta").load(str(here / "tables" / "events")).limit(3).toPandas()
            mine = events[["event_id", "user_id", "input_id", "label"]].assign(label=5.0)
            mine.rename(columns={"input_id": "movie", "label": "stars"}).to_csv(here / "corrected.csv", index=False)
        shell.run(command)
    results = shell.results
    assert not any(audit["failed"] for audit in results["audit.py"])
    assert len(results["erase.py"]) == 3
    assert results["rollback.py"] == [{"live": 2, "was": 3}]


def test_the_commands_of_sizing_and_what_the_guide_quotes_of_them() -> None:
    needs = []
    for command in commands("mtl/guide/sizing.md"):
        words = [sys.executable, *shlex.split(command)[1:]]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        needs.append(json.loads(said)["needs"])
    guide = (ROOT / "mtl" / "guide" / "sizing.md").read_text()
    asked = needs[0]
    for quoted in (
        f"{asked['retrain_core_hours']:.0f} core-hours: 4 hours on {math.ceil(asked['cores_for_a_retraining'])} cores",
        f"{asked['memory_gb_of_all_executors'] / 1000:.1f} TB",
        f"{asked['users_table_gb']:.0f} GB",
        f"{asked['core_seconds_of_a_batch_of_200k']:.0f} core-seconds a batch, {asked['cores_for_the_stream']:.0f} cores",
        f"{asked['store_gb_of_a_server']:.0f} GB, {asked['hours_of_a_servers_first_copy']:.0f} hours",
    ):
        assert quoted in guide, quoted
    table = re.findall(r"^\| ([^|]+) \| ([−\d.]+) \| ([−\d.]+) \| ([−\d.]+) \| ([−\d.]+) \|$", guide, re.MULTILINE)
    measured = json.loads((ROOT / "tests" / "bench" / "scale.json").read_text())["exponents"]
    assert len(table) == len(EXPONENTS)
    for (_, *row), figure in zip(table, EXPONENTS, strict=True):
        of_axes = [measured[axis][figure] for axis in ("events", "users", "inputs", "k")]
        assert [float(value.replace("−", "-")) for value in row] == of_axes, figure


def test_the_targets_of_make_that_the_readme_names() -> None:
    named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", (ROOT / "README.md").read_text()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target in named:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {"demo", "test", "cluster-test"} <= named
