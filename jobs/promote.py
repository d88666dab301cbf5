"""A candidate made live."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.models import promote
from mtl.tables import Tables

DESCRIPTION = """\
Make a model version live, the newest candidate by default, and retire the one that was; one commit.

Its users are as fresh as its own update stream: run jobs/update.py --model-version V before."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-version", type=int, metavar="V", help="this version instead of the newest candidate")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return promote(Tables(spark, settings.tables.root), parsed.model_version)


if __name__ == "__main__":
    run("promote", DESCRIPTION, work, arguments)
