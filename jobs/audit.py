"""Whether the tables hold together."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.audit import audit
from mtl.config import Settings
from mtl.job import run
from mtl.tables import Tables

DESCRIPTION = """\
Check the invariants of the tables for the live model version; exit status 1 when one fails.

One version is live; every ingest batch adds up; the stream's batches are without gaps and its users hold what was
applied; users equal a from-scratch pass over the events; features equal the oracle evaluated afresh; no erasure is half done.

Where the loss is not squared, users have to equal a replay of training, batches and releases in the ledger's order, and
refit_gap says how far their weights are from those of all events at once (largest difference, relative to the largest
weight or 1)."""


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    return audit(Tables(spark, settings.tables.root), settings)


if __name__ == "__main__":
    run("audit", DESCRIPTION, work)
