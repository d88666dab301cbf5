"""All events into a new model version."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.retrain import retrain
from mtl.tables import Tables

DESCRIPTION = """\
Train a new model version over all events by oracle-mtl, and write its features, its users and its row in models.

The first version goes live by itself; later ones are candidates until jobs/promote.py, or at once with --promote.
model.k and train.iterations force what is otherwise chosen from the data."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--promote", action="store_true", help="make the new version live")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return retrain(Tables(spark, settings.tables.root), settings, parsed.promote)


if __name__ == "__main__":
    run("retrain", DESCRIPTION, work, arguments)
