"""The version before made live again."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.models import rollback
from mtl.tables import Tables

DESCRIPTION = """\
Make the model version live again that was live before this one; one commit.

Its update stream goes on where it stopped: run jobs/update.py to catch up."""


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return rollback(Tables(spark, settings.tables.root))


if __name__ == "__main__":
    run("rollback", DESCRIPTION, work)
