"""A past prediction, rebuilt and taken apart."""

import argparse
from datetime import datetime, timezone
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.explain import explain
from mtl.job import run
from mtl.tables import Tables

DESCRIPTION = """\
Rebuild what was predicted for a user and an input at a moment, from the tables as they were then: the version that was
live, its features, the user's state. The JSON has the prediction, its standard deviation, the addends that it was made of,
the last batches before and the table versions read. Reaches as far back as the tables keep old files (30 days)."""


def moment(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="ID")
    parser.add_argument("--input", required=True, metavar="ID")
    parser.add_argument(
        "--at",
        type=moment,
        default=datetime.now(timezone.utc),
        metavar="TIME",
        help="such as 2026-11-25T12:00:00 (UTC unless it says otherwise); default: now",
    )


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return explain(Tables(spark, settings.tables.root), parsed.user, parsed.input, parsed.at)


if __name__ == "__main__":
    run("explain", DESCRIPTION, work, arguments)
