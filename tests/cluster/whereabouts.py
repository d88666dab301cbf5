"""A job that prints where the driver and every executor import mtl from, and with which Python; null where they cannot."""

import importlib
import importlib.util
import json
import os
import sys

from pyspark.sql import SparkSession


def here() -> dict:
    found = importlib.util.find_spec("mtl")
    if found:
        importlib.import_module("mtl.updater")  # and with it all that tasks need of other packages
    # Executors are told apart by the folders that they run in.
    return {"mtl": found and found.origin, "python": sys.prefix, "in": os.getcwd()}


def everywhere(batches):
    import time

    import pyarrow as pa

    for _ in batches:
        time.sleep(0.5)  # one executor must not do it all
        yield pa.record_batch([pa.array([json.dumps(here())])], ["said"])


if __name__ == "__main__":
    spark = SparkSession.builder.getOrCreate()
    said = spark.range(0, 16, 1, 16).mapInArrow(everywhere, "said string").collect()
    print(json.dumps({"driver": here(), "executors": [json.loads(row.said) for row in said]}))
    spark.stop()
