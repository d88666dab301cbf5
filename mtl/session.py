"""One Spark session with Delta, from settings, without the network."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pyspark
from pyspark.sql import SparkSession

from mtl.config import CONF, SparkSettings
from mtl.errors import StateError
from mtl.sharing import is_remote

_LOGGING = CONF / "log4j2.properties"


def jars_folder() -> Path:
    """Where ``make setup`` puts the Delta jars: beside Spark's own, so that every way of starting finds them."""
    return Path(os.environ.get("SPARK_HOME") or pyspark.__path__[0]) / "jars"


def is_hosted() -> bool:
    """Whether master, memory and jars are somebody else's to say: spark-submit's, Databricks' or a Connect server's."""
    return not os.environ.keys().isdisjoint({"PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE"})


def open_session(settings: SparkSettings, name: str) -> SparkSession:
    """The session of this process: on its host's terms where there is one (:func:`is_hosted`), else a local one by ``settings``.

    Raises:
        StateError: there are no Delta jars beside Spark's own and none are configured.
    """
    # Tasks are Spark's unit of parallelism: one BLAS thread each.
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    options = {
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        # VACUUM lists the smallest table in as many tasks as this, 10,000 by default, which takes two cores a minute.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(8 * settings.shuffle_partitions),
        # Spark generates code for every plan and has Java compile it. A stream's batches have the same plans, some hundreds of
        # pieces of code, and Spark keeps 100 of them.
        "spark.sql.codegen.cache.maxEntries": "2000",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
        # Below its maximum Spark measures the batch after every row, which over list columns is quadratic.
        "spark.sql.execution.arrow.maxBytesPerBatch": "2147483647",
        "spark.driver.maxResultSize": "0",
        "spark.ui.showConsoleProgress": "false",
        "spark.cleaner.referenceTracking.cleanCheckpoints": "true",  # of mtl.partitions.settled
        # A Python worker keeps its memory from batch to batch: to get it from the system anew takes as long as what is done
        # with it.
        "spark.executorEnv.MALLOC_MMAP_MAX_": "0",
        "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "spark.executorEnv.MALLOC_TOP_PAD_": str(1 << 26),
        "spark.executorEnv.ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    if not is_hosted():
        if not any(jars_folder().glob("delta-spark_*.jar")) and not {"spark.jars", "spark.jars.packages"} & {
            *settings.options
        }:
            raise StateError(
                f"no Delta jars in {jars_folder()}: run 'make setup' (and unset SPARK_HOME, if that is another Spark), or set "
                'spark.options "spark.jars"'
            )
        options |= {"spark.master": settings.master, "spark.driver.memory": settings.driver_memory}
        if settings.master.startswith("local"):
            options |= {
                "spark.driver.host": "127.0.0.1",
                "spark.driver.bindAddress": "127.0.0.1",
                "spark.ui.enabled": "false",
                "spark.sql.warehouse.dir": os.path.join(tempfile.gettempdir(), "oracle-mtl-warehouse"),
            }
            java = ["-XX:+UseParallelGC"]  # less work in all than the default collector, which is made for short pauses
            if isinstance(_LOGGING, Path):  # inside a zip it is no file that Java could open
                java.append(f"-Dlog4j2.configurationFile={_LOGGING.as_uri()}")
            options["spark.driver.extraJavaOptions"] = " ".join(java)
    builder = SparkSession.builder.appName(name)
    for key, value in {**options, **settings.options}.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    if not is_remote(spark):
        spark.sparkContext.setLogLevel(settings.log_level)
    return spark
