"""One Spark session for the whole run, and fresh tables for a test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from pyspark.sql import SparkSession

from mtl.config import load_settings
from mtl.session import open_session
from mtl.tables import Tables

# Whether numbers are shared between processes is settled when prometheus_client is first imported, by whatever test that is.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: two processes share the files, and neither should have it left at the end."""
    items.sort(key=lambda item: item.path.name != "test_update.py")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    # Little data, many plans: what compiles code for speed costs more than it gains. The quick compiler's cache is 48 MB by
    # default, which half an hour of tests fills; Java then sweeps it all the time.
    options = {
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC",
        "spark.databricks.delta.snapshotPartitions": "1",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
    }
    settings = load_settings(
        assignments=[
            "spark.master=local[2]",
            "spark.driver_memory=3g",
            "spark.shuffle_partitions=2",
            "spark.options={" + ", ".join(f'"{key}" = "{value}"' for key, value in options.items()) + "}",
        ]
    )
    session = open_session(settings.spark, "oracle-mtl tests")
    yield session
    session.stop()


@pytest.fixture
def tables(spark: SparkSession, tmp_path: Path) -> Tables:
    return Tables(spark, str(tmp_path / "tables"))
