"""Files, bytes and seconds a batch while the update job runs for a thousand micro-batches and looks after its tables.

A feeder commits small files of events as fast as they are taken; the job runs as in production, one commit a batch, with
compaction and VACUUM by [care]. So that VACUUM has something to remove within the run, tables keep removed files for
``--keep-seconds`` in place of 30 days.

    python tests/bench/upkeep.py [--batches 1000 --events 200 --users 20000]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from stream import events, prepare

from mtl import schema
from mtl.config import load_settings
from mtl.session import open_session
from mtl.tables import Tables
from mtl.update import update

WATCHED = (schema.USERS, schema.FEATURES, schema.EVENTS, schema.LEDGER, schema.PROGRESS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--events", type=int, default=200, help="of a batch (default: %(default)s)")
    parser.add_argument("--users", type=int, default=20_000, help="in the table (default: %(default)s)")
    parser.add_argument("--keep-seconds", type=int, default=60, help="that removed files stay (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        assignments = ["update.max_files_per_trigger=1", "update.trigger_seconds=0", "care.vacuum_every_compactions=2"]
        settings = load_settings([], [f"tables.root={folder}/t", *assignments])
        spark = open_session(settings.spark, "bench upkeep")
        spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
        tables, _ = prepare(spark, Path(folder) / "t", arguments.users, 10)
        for table in WATCHED:
            kept = f"'delta.deletedFileRetentionDuration' = 'interval {arguments.keep_seconds} seconds'"
            spark.sql(f"ALTER TABLE {tables.name(table)} SET TBLPROPERTIES ({kept})")
        stop = threading.Event()
        job = threading.Thread(target=update, args=(tables.apart(), settings, False), kwargs={"stop": stop})
        job.start()
        samples = [sample(tables, 0)]
        done = lambda: tables.read(schema.PROGRESS).count()  # noqa: E731
        try:
            for batch in range(arguments.batches):
                rows = events(spark, arguments.events, arguments.users, f"b{batch}").coalesce(1)
                tables.append(schema.EVENTS, rows)
                if (batch + 1) % 50:
                    continue
                while done() < batch + 1:
                    assert job.is_alive(), "the update job ended"
                    time.sleep(1)
                samples.append(sample(tables, batch + 1))
                print(json.dumps(samples[-1]), file=sys.stderr)
        finally:
            stop.set()
            job.join()
    seconds = np.diff([one["at"] for one in samples]) / np.diff([one["batches"] for one in samples])
    print(json.dumps({"batches": arguments.batches, "seconds_a_batch": seconds.round(2).tolist(), "samples": samples}))


def sample(tables: Tables, batches: int) -> dict:
    """Of each table: files that are in use, files and bytes on disk, and files of its log."""
    found = {}
    for table in WATCHED:
        folder = Path(tables.root) / table
        detail = tables.delta(table).detail().first()
        # Spark writes, renames and deletes meanwhile.
        stored = {file: size for file in folder.rglob("*") if (size := size_of(file)) is not None}
        log = [file for file in stored if "_delta_log" in file.parts]
        found[table] = {
            "in_use": detail["numFiles"],
            "in_use_mb": round(detail["sizeInBytes"] / 1e6, 2),
            "on_disk": len(stored) - len(log),
            "on_disk_mb": round(sum(stored.values()) / 1e6, 2),
            "log": len(log),
        }
    return {"batches": batches, "at": round(time.time(), 1), **found}


def size_of(file: Path) -> int | None:
    """Bytes; None where there is no file, or none any more."""
    try:
        return file.stat().st_size if file.is_file() else None
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main()
