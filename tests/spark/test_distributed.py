"""Training with users and inputs both in Spark gives what one process gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from problems import Problem, planted
from pyspark.sql import SparkSession

from mtl import blocks
from mtl.basis import InputPrior, OracleBasis
from mtl.distributed import DistributedEngine
from mtl.engine import LocalEngine
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.oracle.linear import Linear, NormalEquations, fit_ridge
from mtl.prior import Prior
from mtl.train import START_VARIANCE, Fit, Schedule, alternate

K = 2
PROBLEM = planted(7, users=20, inputs=23, k=2, events=300)

Basis = Callable[[Array], InputPrior]


def linear(attributes: Array) -> InputPrior:
    return OracleBasis.start(fit_ridge, K + 1, START_VARIANCE, residual=True)


def without_residual(attributes: Array) -> InputPrior:
    return OracleBasis.start(fit_ridge, K + 1, START_VARIANCE, residual=False)


def closed_form(attributes: Array) -> InputPrior:
    return Prior.start(attributes.T @ attributes, K + 1, START_VARIANCE)


def fit(engine: LocalEngine | DistributedEngine, problem: Problem, basis: Basis) -> Fit:
    described = problem.user_attributes
    users = Prior.start(described.T @ described, K + 1, START_VARIANCE)
    inputs = basis(problem.input_attributes)
    return alternate(engine, users, inputs, len(problem), problem.label_variance, Schedule(4))


def partitions(spark: SparkSession, problem: Problem, n: int) -> list:
    parts = np.array_split(np.arange(len(problem.user_attributes)), n)
    return [blocks.to_arrow(problem.block(part)) for part in parts]


def engine(spark: SparkSession, problem: Problem, n_partitions: int, shard: int) -> DistributedEngine:
    rows = pa.Table.from_batches(partitions(spark, problem, n_partitions)).to_pandas()
    frame = spark.createDataFrame(pd.DataFrame(rows), blocks.DDL).repartition(n_partitions)
    squares = float(problem.weight @ problem.label**2)
    return DistributedEngine(frame, problem.input_attributes, problem.mean_label, squares, K, shard_inputs=shard)


@pytest.mark.parametrize(
    ("basis", "n_partitions", "shard"), [(linear, 3, 10), (closed_form, 2, 23), (without_residual, 1, 7)]
)
def test_distributed_training_equals_local_training(
    spark: SparkSession, basis: Basis, n_partitions: int, shard: int
) -> None:
    local, distributed = PROBLEM.engine(K), engine(spark, PROBLEM, n_partitions, shard)
    one, other = fit(local, PROBLEM, basis), fit(distributed, PROBLEM, basis)
    np.testing.assert_allclose(other.objective, one.objective, rtol=1e-9)
    np.testing.assert_allclose(other.users.coefficients, one.users.coefficients, atol=1e-8)
    rows = distributed.feature_rows(
        lambda first, inputs, attributes: pa.table(
            {"place": first + np.arange(len(attributes)), "offset": inputs.mean[:, 0]}
        ),
        "place long, offset double",
    )
    offsets = rows.toPandas().sort_values("place")["offset"]
    np.testing.assert_allclose(offsets, local.inputs.mean[:, 0], atol=1e-8)


def test_a_black_box_is_refused_where_inputs_are_distributed(spark: SparkSession) -> None:
    basis = OracleBasis.start(lambda z, t, w: Linear(np.zeros(z.shape[1])), K + 1, START_VARIANCE, residual=True)
    with pytest.raises(ConfigError, match=r"train\.reduction"):
        engine(spark, PROBLEM, 1, 23).fit_oracle(basis, 1.0)


def test_normal_equations_of_parts_add_up_to_those_of_the_whole() -> None:
    random = np.random.default_rng(0)
    root = random.normal(size=(9, 3, 3))
    W, v, z = root @ root.transpose(0, 2, 1), random.normal(size=(9, 3)), random.normal(size=(9, 2))
    whole = NormalEquations.of(W, v, z)
    parts = NormalEquations.of(W[:4], v[:4], z[:4]) + NormalEquations.of(W[4:], v[4:], z[4:])
    for one, other in zip(whole.solve(()), parts.solve(()), strict=True):
        np.testing.assert_allclose(one.coefficients, other.coefficients)
