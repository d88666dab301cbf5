"""How retraining, the update stream and the server's store grow with events, users, inputs, k and cores.

From one point of ``BASE`` sizes one size at a time is changed. Every point is a process of its own, so that memory is its
own and one that dies of its size is reported as such. ``exponents`` has d log figure / d log size between the two largest
points of each axis.

    python tests/bench/scale.py [--axes events users] [--out scale.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from memory import PeakMemory
from pyspark.sql import functions as F
from synthetic import write_events

from mtl import schema
from mtl.config import load_settings
from mtl.retrain import retrain
from mtl.serving.overlay import open_overlay
from mtl.serving.refresh import Refresher
from mtl.serving.source import Source
from mtl.serving.store import Store
from mtl.session import open_session
from mtl.tables import Tables
from mtl.update import update

BASE = {"events": 2_000_000, "users": 100_000, "inputs": 20_000, "k": 10, "cores": 2}
AXES: dict[str, tuple[int, ...]] = {
    "events": (1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000, 50_000_000),
    "users": (10_000, 100_000, 1_000_000, 5_000_000),
    "inputs": (1_000, 20_000, 100_000, 1_000_000),
    "k": (5, 10, 20, 40, 64),
    "cores": (1, 2),
}
FIGURES = (
    "pass_seconds",
    "fixed_seconds",
    "write_seconds",
    "update_seconds",
    "store_seconds",
    "users_bytes",
    "store_bytes",
)
PASSES = 4
FRESH = 200_000  # events of the micro-batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--largest", type=int, default=50_000_000, help="of any size (default: %(default)s)")
    parser.add_argument("--memory", default="4g", help="spark.driver_memory (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here; points that it has are not measured again")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(**json.loads(arguments.point), memory=arguments.memory)))
        return
    points: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        points = [point for point in json.loads(arguments.out.read_text())["points"] if "failed" not in point]
    for axis in arguments.axes:
        for size in AXES[axis]:
            sizes = {**BASE, axis: size}
            if size > arguments.largest or any(sizes == {name: point[name] for name in BASE} for point in points):
                continue
            points.append(apart(sizes, arguments.memory))
            print(json.dumps(points[-1]), file=sys.stderr)
            if arguments.out:
                arguments.out.write_text(json.dumps(report(points)))
    print(json.dumps(report(points)))


def apart(sizes: dict[str, int], memory: str) -> dict[str, Any]:
    """The point, measured in a process of its own; where it died, the last line it said."""
    command = [sys.executable, __file__, "--point", json.dumps(sizes), "--memory", memory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines() or ["nothing"]
    return {**sizes, "failed": f"exit {done.returncode}: {said[-1][:300]}"}


def measure(events: int, users: int, inputs: int, k: int, cores: int, memory: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tables"
        assignments = [f"tables.root={root}", f"spark.master=local[{cores}]", f"spark.driver_memory={memory}"]
        assignments += [
            f"model.k={k}",
            f"train.iterations={PASSES}",
            "oracle.kind=identity",
            "update.max_files_per_trigger=1000",
        ]
        settings = load_settings([], [*assignments, "care.compact_every_batches=0"])
        spark = open_session(settings.spark, "bench scale")
        tables = Tables(spark, str(root))
        columns = [schema.EVENT_ID, schema.USER_ID, schema.INPUT_ID, schema.LABEL, schema.WEIGHT]
        tables.append(
            schema.EVENTS, spark.read.parquet(str(write_events(Path(folder), events, users, inputs))).select(*columns)
        )
        with PeakMemory() as peak, passes() as ends:
            started = time.time()
            result = retrain(tables, settings)
            ended = time.time()
        pass_seconds = float(np.median(np.diff(ends)))
        fresh = spark.read.parquet(str(write_events(Path(folder), FRESH, users, inputs, seed=1))).select(*columns)
        tables.append(schema.EVENTS, fresh.withColumn(schema.EVENT_ID, F.concat(F.lit("fresh-"), schema.EVENT_ID)))
        streamed = update(tables, settings)
        assert streamed["events"] == FRESH  # of inputs that training has not seen they wait
        spark.stop()
        store_seconds, store_bytes = fill_store(root, Path(folder) / "store")
        return {
            **{"events": events, "users": users, "inputs": inputs, "k": k, "cores": cores},
            "retrain_seconds": ended - started,
            "fixed_seconds": ends[0] - started - pass_seconds,  # catalogue and shuffle into blocks
            "pass_seconds": pass_seconds,
            "write_seconds": ended - ends[-1],
            "peak_gb": peak.peak_gb,
            "update_seconds": streamed["seconds"],
            "store_seconds": store_seconds,
            "users_bytes": size(root / schema.USERS),
            "store_bytes": store_bytes,
            "users_found": result["users"],
        }


@contextlib.contextmanager
def passes() -> Iterator[list[float]]:
    """When each pass of a training ended, by its log (seconds since 1970)."""
    ends: list[float] = []

    class Ends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("retrain: iteration"):
                ends.append(record.created)

    log, handler = logging.getLogger("mtl"), Ends()
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    try:
        yield ends
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def fill_store(root: Path, folder: Path) -> tuple[float, int]:
    """Seconds of the server's first copy of the tables, and its bytes on disk."""
    store = Store(folder, 64)
    started = time.perf_counter()
    Refresher(Source(str(root)), store, open_overlay(folder, [])).refresh()
    seconds = time.perf_counter() - started
    store.close()
    return seconds, size(folder)


def size(folder: Path) -> int:
    """Bytes on disk of all files under ``folder``."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def report(points: list[dict[str, Any]]) -> dict[str, Any]:
    return {"base": BASE, "points": points, "exponents": exponents(points)}


def exponents(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By axis and figure, d log figure / d log size between the axis' two largest points that there are; users that have events."""
    found: dict[str, dict[str, float]] = {}
    for axis in AXES:
        along = [p for p in points if "failed" not in p and all(p[name] == BASE[name] for name in BASE if name != axis)]
        along.sort(key=lambda point: point[axis])
        if len(along) > 1:
            small, large = along[-2:]
            size = "users_found" if axis == "users" else axis
            step = math.log(large[size] / small[size])
            found[axis] = {name: round(math.log(large[name] / small[name]) / step, 2) for name in FIGURES}
    return found


if __name__ == "__main__":
    main()
