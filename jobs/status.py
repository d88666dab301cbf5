"""How the update job is doing."""

import argparse
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.status import batches, page, status
from mtl.tables import Tables

DESCRIPTION = """\
Figures of every model version from the tables: progressive-validation loss and calibration, events applied and waiting, drift
of inputs and weights, rows refused and why, sizes of the tables. With --html also a page of its own with plots, the cold-start
curve among them. Reads only; the update job may be running."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", help="write the page there")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(spark, settings.tables.root)
    told = status(tables)
    if parsed.html:
        Path(parsed.html).write_text(page(told, batches(tables)), encoding="utf-8")
    return told


if __name__ == "__main__":
    run("status", DESCRIPTION, work, arguments)
