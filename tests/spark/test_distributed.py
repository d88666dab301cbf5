"""Training with users and inputs both in Spark gives what one process gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from problems import Problem, planted
from pyspark.sql import SparkSession

from mtl import blocks
from mtl.basis import OracleBasis
from mtl.differentiable import TwoLayer
from mtl.distributed import DistributedEngine
from mtl.engine import LocalEngine
from mtl.errors import ConfigError
from mtl.firstorder import LBFGS, FunctionBasis
from mtl.forms import Form, partly_given
from mtl.gaussian import Array
from mtl.losses import LOSSES
from mtl.oracle.linear import Linear, NormalEquations, fit_ridge
from mtl.prior import Prior, VectorPrior
from mtl.train import START_VARIANCE, Fit, Schedule, alternate

K = 2
PROBLEM = planted(7, users=20, inputs=23, k=2, events=300)

Basis = Callable[[Array], VectorPrior]


def linear(attributes: Array) -> VectorPrior:
    return OracleBasis.start(fit_ridge, K + 1, START_VARIANCE, residual=True)


def without_residual(attributes: Array) -> VectorPrior:
    return OracleBasis.start(fit_ridge, K + 1, START_VARIANCE, residual=False)


def first_order(attributes: Array) -> VectorPrior:
    return FunctionBasis.start(TwoLayer(3), LBFGS(2), 5.0, attributes.shape[1], K + 1, START_VARIANCE, residual=True)


def closed_form(attributes: Array) -> VectorPrior:
    return Prior.start(attributes.T @ attributes, K + 1, START_VARIANCE)


def fit(engine: LocalEngine | DistributedEngine, problem: Problem, basis: Basis, form: Form) -> Fit:
    users, inputs = problem.user_prior(form), partly_given(basis(problem.input_attributes), form.inputs)
    return alternate(engine, users, inputs, LOSSES["squared"], len(problem), problem.label_variance, Schedule(4))


def partitions(problem: Problem, n: int) -> list[pa.RecordBatch]:
    parts = np.array_split(np.arange(len(problem.user_attributes)), n)
    return [blocks.to_arrow(problem.block(part)) for part in parts]


def engine(spark: SparkSession, problem: Problem, n_partitions: int, shard: int, form: Form) -> DistributedEngine:
    rows = [row for part in partitions(problem, n_partitions) for row in part.to_pylist()]
    each_apart = spark.sparkContext.parallelize(rows, n_partitions)  # a block a partition, as training has it
    frame = spark.createDataFrame(each_apart, blocks.DDL).persist()
    return DistributedEngine(frame, problem.specification(form), shard_inputs=shard)


@pytest.mark.parametrize(
    ("basis", "form", "n_partitions", "shard"),
    [
        (linear, Form(K), 3, 10),
        (closed_form, Form(K), 2, 23),
        (without_residual, Form(K), 1, 7),
        (linear, Form(K, (1,)), 3, 10),
        (first_order, Form(K), 3, 10),
    ],
)
def test_distributed_training_equals_local_training(
    spark: SparkSession, basis: Basis, form: Form, n_partitions: int, shard: int
) -> None:
    local, distributed = PROBLEM.engine(form), engine(spark, PROBLEM, n_partitions, shard, form)
    one, other = fit(local, PROBLEM, basis, form), fit(distributed, PROBLEM, basis, form)
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


def test_a_partition_may_have_users_without_events_alone(spark: SparkSession) -> None:
    attributes = PROBLEM.user_attributes
    silent = replace(PROBLEM, user_attributes=np.vstack([attributes, attributes[:4]]))
    local, distributed = silent.engine(Form(K)), engine(spark, silent, 6, 10, Form(K))
    one, other = (fit(each, silent, linear, Form(K)) for each in (local, distributed))
    np.testing.assert_allclose(other.objective, one.objective, rtol=1e-9)


def test_a_black_box_is_refused_where_inputs_are_distributed(spark: SparkSession) -> None:
    basis = OracleBasis.start(lambda z, t, w: Linear(np.zeros(z.shape[1])), K + 1, START_VARIANCE, residual=True)
    with pytest.raises(ConfigError, match=r"train\.reduction"):
        engine(spark, PROBLEM, 1, 23, Form(K)).refit(basis, 1.0)


def test_another_loss_is_refused_where_inputs_are_distributed(spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match=r"train\.reduction"):
        DistributedEngine(spark.range(1).toDF("users"), replace(PROBLEM.specification(K), loss=LOSSES["logistic"]))


def test_normal_equations_of_parts_add_up_to_those_of_the_whole() -> None:
    random = np.random.default_rng(0)
    root = random.normal(size=(9, 3, 3))
    W, v, z = root @ root.transpose(0, 2, 1), random.normal(size=(9, 3)), random.normal(size=(9, 2))
    whole = NormalEquations.of(W, v, z)
    parts = NormalEquations.of(W[:4], v[:4], z[:4]) + NormalEquations.of(W[4:], v[4:], z[4:])
    for one, other in zip(whole.solve(()), parts.solve(()), strict=True):
        np.testing.assert_allclose(one.coefficients, other.coefficients)
