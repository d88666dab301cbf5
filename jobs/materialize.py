"""Features of new inputs into the shared cache."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings
from mtl.job import run
from mtl.materialize import materialize
from mtl.models import load_model
from mtl.tables import Tables

DESCRIPTION = """\
Evaluate the stored oracle for every input that has attributes but no features row of the live model version.

The update stream does the same for inputs as events of them come; this job does it ahead of them."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-version", type=int, metavar="V", help="this version instead of the live one")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(spark, settings.tables.root)
    model = load_model(tables, parsed.model_version)
    return {"model_version": model.version, "materialized": materialize(tables, model)}


if __name__ == "__main__":
    run("materialize", DESCRIPTION, work, arguments)
