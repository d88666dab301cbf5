"""New events into the users of the live model."""

import argparse
import signal
import threading
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.tables import Tables
from mtl.update import update

DESCRIPTION = """\
Apply the events that came after training to the users of the live model version, each exactly once.

A stream with a checkpoint: run again, after a crash too, it goes on where it stopped. Events of an input that is not
known wait until jobs/ingest.py brings the input. SIGTERM stops it after the batch in hand."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--available-now", action="store_true", help="stop when all events there are have been applied")
    parser.add_argument("--model-version", type=int, metavar="V", help="this version instead of the live one")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    tables = Tables(spark, settings.tables.root)
    return update(tables, settings, parsed.available_now, parsed.model_version, stop)


if __name__ == "__main__":
    run("update", DESCRIPTION, work, arguments)
