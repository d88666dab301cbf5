"""Tables with a live version, for the tests of the stream."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from streaming import TRAINED, append, rows, settings

from mtl.layout import SCHEMAS
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, INPUTS, USER_ATTRIBUTES, USER_ID
from mtl.tables import Tables


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with a live model over the first events; users u0 … u14 and u90 and inputs x0 … x11 have attributes."""
    root = tmp_path_factory.mktemp("trained") / "tables"
    tables = Tables(spark, str(root))
    tables.create(*SCHEMAS)
    random = np.random.default_rng(0)
    inputs = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(12)], "year": random.normal(size=12)})
    users = pd.DataFrame({USER_ID: [*(f"u{i}" for i in range(15)), "u90"], "age": random.normal(size=16)})
    tables.append(INPUTS, spark.createDataFrame(inputs), evolve=True)
    tables.append(USER_ATTRIBUTES, spark.createDataFrame(users), evolve=True)
    append(tables, rows(np.arange(TRAINED)))
    retrain(tables, settings())
    return root


@pytest.fixture
def live(spark: SparkSession, trained: Path, tmp_path: Path) -> Tables:
    """A copy of the trained tables of the test's own."""
    root = tmp_path / "tables"
    shutil.copytree(trained, root)
    return Tables(spark, str(root))
