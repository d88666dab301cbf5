"""All events into a new model version."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.models import is_requested
from mtl.retrain import retrain
from mtl.tables import Tables

DESCRIPTION = """\
Train a new model version over all events by oracle-mtl, and write its features, its users and its row in models.

The first version goes live by itself; later ones are candidates until jobs/promote.py, or at once with --promote.
model.k and train.iterations force what is otherwise chosen by itself. --if-requested is for a scheduler: it does
nothing unless the update job has asked for a retraining (switch.surprise_limit) since the newest version."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--promote", action="store_true", help="make the new version live")
    parser.add_argument("--if-requested", action="store_true", help="only if a retraining has been asked for")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(spark, settings.tables.root)
    if parsed.if_requested and not is_requested(tables):
        return {"model_version": None, "requested": False}
    return retrain(tables, settings, parsed.promote)


if __name__ == "__main__":
    run("retrain", DESCRIPTION, work, arguments)
