"""The live model version against events that it has not seen."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.command import parse_renames
from mtl.config import Settings
from mtl.evaluate import evaluate
from mtl.job import run
from mtl.tables import Tables

DESCRIPTION = """\
Measure the live model version on a file of events that it was not trained on, by what its loss is measured by: RMSE, MAE
and the share of labels inside the 90% interval; for logistic loss log loss, AUC, expected calibration error (15 bins of
equal width), Brier score and accuracy; for Poisson loss the mean deviance, RMSE and MAE. Nothing is written.

The file is read as jobs/ingest.py reads it, and has to hold nothing but rows that it would accept; every row counts
once. --baselines trains others on the events table and measures them on the same rows: the global mean, the mean of the
input, one penalized regression a user on the input attributes, for other losses than squared one of all users, and
MLlib's ALS (on the labels as they are, its scores kept where a mean label can be), the best of a grid ([evaluate] in
conf/default.toml; MLlib computes in Java unless a native BLAS is installed). They see neither offsets nor contexts. With
squared loss predictions are clipped to the range of the labels in training, everyone's alike."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", required=True, metavar="F", help="file or folder of events")
    parser.add_argument("--baselines", action="store_true", help="measure the baselines as well")
    parser.add_argument(
        "--columns",
        default="",
        metavar="OURS=THEIRS,…",
        help="what the file calls our columns, for example input_id=item,label=rating",
    )


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(spark, settings.tables.root)
    return evaluate(tables, settings, parsed.events, parse_renames(parsed.columns), parsed.baselines)


if __name__ == "__main__":
    run("evaluate", DESCRIPTION, work, arguments)
