"""The command line of a job that works in a Spark session."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from mtl.command import Arguments, execute
from mtl.config import Settings
from mtl.session import open_session

Work = Callable[[SparkSession, Settings, argparse.Namespace], dict[str, Any]]


def run(name: str, description: str, work: Work, arguments: Arguments | None = None) -> None:
    """:func:`mtl.command.execute` with a session, in which a Spark error is a failure of one line too."""

    def in_session(settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # a failed batch is reported once, by us
        spark = open_session(settings.spark, f"oracle-mtl {name}")
        result = work(spark, settings, parsed)
        if "DATABRICKS_RUNTIME_VERSION" not in os.environ:  # there the session is not ours to stop
            spark.stop()
        return result

    execute(name, description, in_session, arguments, (PySparkException, Py4JError))
