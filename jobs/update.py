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
Apply the events that came after training to the users of the live model version and its candidates, each exactly once.

A stream with a checkpoint: run again, after a crash too, it goes on where it stopped. Events of an input that is not
known wait until jobs/ingest.py brings the input. A candidate that has caught up is compared with the live version on fresh
events, each predicted before it is learnt from, and promoted or refused if switch.policy is automatic. SIGTERM stops the job
after the batch in hand."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--available-now", action="store_true", help="stop when all events there are have been applied")
    parser.add_argument("--model-version", type=int, metavar="V", help="this version alone")
    parser.add_argument(
        "--recover",
        action="store_true",
        help="give up a lost or damaged checkpoint and go on from the ledger's last batch",
    )


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    tables = Tables(spark, settings.tables.root)
    return update(tables, settings, parsed.available_now, parsed.model_version, stop, parsed.recover)


if __name__ == "__main__":
    run("update", DESCRIPTION, work, arguments)
