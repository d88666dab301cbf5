"""How the update job is doing."""

import argparse
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.errors import ConfigError
from mtl.job import run
from mtl.page import page
from mtl.status import batches, status
from mtl.tables import Tables

DESCRIPTION = """\
Figures of every model version from the tables: progressive-validation loss and calibration, lag, events applied and waiting,
drift of inputs and weights, the cold-start curve, rows refused and why, sizes of the tables. With --html also a page of its own
with plots. Reads only, tables that are not there yet are left out; the update job may be running."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", help="write the page there")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(spark, settings.tables.root)
    told = status(tables)
    if parsed.html:
        try:
            Path(parsed.html).write_text(page(told, batches(tables)), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html {parsed.html}: {error.strerror}") from None
    return told


if __name__ == "__main__":
    run("status", DESCRIPTION, work, arguments)
