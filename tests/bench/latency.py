"""Seconds from an event's commit in the events table to its being in the users table, at a steady rate of events.

A feeder commits the events of every second; the update job runs beside it with processing-time triggers, in the same
session on the same cores. An event counts as visible when the batch that holds it is committed.

    python tests/bench/latency.py [--rate 1000 --seconds 180 --warm-up 90 --users 100000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from stream import events, prepare

from mtl import schema
from mtl.config import load_settings
from mtl.session import open_session
from mtl.stream import Stream
from mtl.update import between_looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=1000, help="events per second (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=180, help="how long they come (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=90, help="seconds that are not counted (default: %(default)s)")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--trigger", type=float, default=1.0, help="update.trigger_seconds (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            [],
            [f"tables.root={folder}", f"update.trigger_seconds={arguments.trigger}", "care.compact_every_batches=0"],
        )
        spark = open_session(settings.spark, "bench latency")
        tables, model = prepare(spark, Path(folder) / "t", arguments.users, 10)
        feeder = tables.apart()
        stream = Stream(tables, settings, model)
        written: dict[int, float] = {}  # commit → when
        done = threading.Event()

        def feed() -> None:
            started = time.monotonic()
            for second in range(arguments.seconds):
                time.sleep(max(0.0, started + second - time.monotonic()))
                rows = events(feeder.spark, arguments.rate, arguments.users, f"s{second}")
                feeder.append(schema.EVENTS, rows)
                written[feeder.version(schema.EVENTS)] = time.monotonic()
            done.set()

        thread = threading.Thread(target=feed)
        thread.start()
        visible: dict[int, float] = {}
        look = 0.0
        while not done.is_set() or max(written) > max(visible, default=0):
            if time.monotonic() > look:  # as often as the job does
                stream.tend()
                look = time.monotonic() + between_looks(settings)
            consumed = stream.consumed
            now = time.monotonic()
            for commit in list(written):
                if commit <= consumed:
                    visible.setdefault(commit, now)
            time.sleep(0.05)
        thread.join()
        stream.close()
    first = min(written.values()) + arguments.warm_up
    waits = np.array([visible[commit] - at for commit, at in written.items() if at >= first])
    print(
        json.dumps(
            {
                "rate": arguments.rate,
                "users": arguments.users,
                "commits": len(waits),
                "batches": stream.updater.tally.batches,
                "p50_seconds": float(np.quantile(waits, 0.5)),
                "p99_seconds": float(np.quantile(waits, 0.99)),
                "largest_seconds": float(waits.max()),
            }
        )
    )


if __name__ == "__main__":
    main()
