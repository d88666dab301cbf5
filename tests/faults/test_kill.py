"""kill -9 of the real stream job at random moments, restarted until it is done: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from problems import planted

ROOT = Path(__file__).resolve().parents[2]
KILLS = 2  # make faults: more, at named points too
PROBLEM = planted(5, users=30, inputs=15, k=2, events=600)


def job(name: str, folder: Path, *arguments: str) -> list[str]:
    fixed = [
        "spark.master=local[2]",
        "spark.driver_memory=1g",
        "spark.shuffle_partitions=2",
        "model.k=2",
        "train.iterations=2",
    ]
    options = 'spark.options={"spark.driver.extraJavaOptions" = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}'
    settings = [options, f"tables.root={folder / 'tables'}", *fixed, "update.max_files_per_trigger=1"]
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments, *sets]


def run(name: str, folder: Path, *arguments: str) -> dict:
    done = subprocess.run(job(name, folder, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, name: str, events: np.ndarray) -> str:
    frame = pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in PROBLEM.user[events]],
            "input_id": [f"x{i}" for i in PROBLEM.input[events]],
            "label": PROBLEM.label[events],
            "weight": PROBLEM.weight[events],
            "event_id": [f"e{i}" for i in events],
        }
    )
    frame.to_csv(folder / name, index=False)
    return str(folder / name)


def test_kill_9_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(PROBLEM))
    run("ingest", tmp_path, "--events", write(tmp_path, "base.csv", order[:400]))
    run("retrain", tmp_path)
    for i, part in enumerate(np.array_split(order[400:], 2)):
        run("ingest", tmp_path, "--events", write(tmp_path, f"stream{i}.csv", part))
    moments = random.Random(time.time_ns())
    for _ in range(KILLS):
        process = subprocess.Popen(
            job("update", tmp_path, "--available-now"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        offsets = tmp_path / "tables" / "_checkpoints" / "update-v1" / "offsets" / "0"
        while not offsets.exists() and process.poll() is None:
            time.sleep(0.05)  # from here on there is something to lose
        delay = moments.uniform(0, 8)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        print(f"killed {delay:.2f} s after the first batch was planned")
        process.wait()
    run("update", tmp_path, "--available-now")
    audit = run("audit", tmp_path)
    assert audit["failed"] is False
    assert audit["checks"]["update_adds_up"]["in_users"] == len(PROBLEM)
    assert audit["checks"]["ingest_adds_up"]["accepted"] == len(PROBLEM)
