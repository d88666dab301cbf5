"""A past prediction, rebuilt and taken apart."""

import argparse
from datetime import datetime, timezone
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.explain import explain
from mtl.job import run
from mtl.moment import moment
from mtl.tables import Tables

DESCRIPTION = """\
Rebuild what was predicted for a user and an input at a moment, from the tables as they were then: the version that was
live, its features, the user's state. The JSON has the prediction, its standard deviation, the addends that it was made of,
the last batches before and the table versions read. Reaches as far back as the tables keep old files (30 days)."""


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write name=value")
    return name, value


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
    parser.add_argument("--offset", type=float, metavar="H", help="the known part of h that the question came with")
    parser.add_argument(
        "--context", type=pair, action="append", default=[], metavar="NAME=VALUE", help="of model.contexts; repeatable"
    )


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables, context = Tables(spark, settings.tables.root), dict(parsed.context)
    return explain(tables, parsed.user, parsed.input, parsed.at, parsed.offset, context)


if __name__ == "__main__":
    run("explain", DESCRIPTION, work, arguments)
