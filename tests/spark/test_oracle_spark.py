"""Estimators of pyspark.ml as oracles: the suite that every oracle passes, and what only they can get wrong."""

from __future__ import annotations

import cloudpickle
import numpy as np
import pandas as pd
import pytest
from oracle_checks import OracleChecks, grid
from pyspark.ml import Pipeline
from pyspark.ml.clustering import KMeans
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import AFTSurvivalRegression, GBTRegressor, LinearRegression
from pyspark.sql import SparkSession
from sklearn.linear_model import LinearRegression as LeastSquares

from mtl.basis import Oracle
from mtl.config import OracleSettings
from mtl.errors import ConfigError
from mtl.oracle import make_oracle
from mtl.oracle.spark import spark_oracle
from mtl.pipeline import ENCODED, PipelineEncoder

ORACLES = {
    "pyspark LinearRegression": (LinearRegression, {"solver": "normal"}),
    "pyspark GBTRegressor": (GBTRegressor, {"maxIter": 2, "maxDepth": 4, "stepSize": 0.9, "seed": 0}),
}


class TestOracles(OracleChecks):
    @pytest.fixture(params=ORACLES.values(), ids=ORACLES)
    def oracle(self, spark: SparkSession, request: pytest.FixtureRequest) -> Oracle:
        return spark_oracle(*request.param)


def test_a_linear_regression_in_spark_is_weighted_least_squares(spark: SparkSession) -> None:
    z, target = grid(50)
    weight = np.random.default_rng(0).uniform(0.1, 9, 50)
    expected = LeastSquares().fit(z, target, sample_weight=weight).predict(z)
    function = spark_oracle(LinearRegression, {"solver": "normal"})(z, target, weight)
    np.testing.assert_allclose(function.predict(z), expected, atol=1e-6)


def test_predictions_come_back_in_the_order_of_the_rows_whatever_the_partitions(spark: SparkSession) -> None:
    z, target = grid(30)
    function = spark_oracle(LinearRegression, {})(z, target, np.ones(30))
    many = np.column_stack([np.ones(5000), np.random.default_rng(0).normal(size=(5000, 2))])
    order = np.argsort(function.predict(many))
    np.testing.assert_array_equal(np.argsort(function.predict(many[::-1])[::-1]), order)
    line = many @ np.linalg.lstsq(z, function.predict(z), rcond=None)[0]
    np.testing.assert_allclose(function.predict(many), line, atol=1e-8)


def test_fitting_leaves_nothing_cached(spark: SparkSession) -> None:
    before = len(spark.sparkContext._jsc.getPersistentRDDs())
    spark_oracle(LinearRegression, {})(*grid(20), np.ones(20))
    assert len(spark.sparkContext._jsc.getPersistentRDDs()) == before


@pytest.mark.parametrize(
    ("estimator", "params", "reason"),
    [
        (LinearRegression, {"regParm": 1}, "oracle.params do not fit LinearRegression .*regParm"),
        (LinearRegression, {"regParam": "much"}, "oracle.params do not fit LinearRegression"),
        (AFTSurvivalRegression, {}, "AFTSurvivalRegression .it needs a weightCol too"),
        (KMeans, {}, "oracle.params do not fit KMeans"),
    ],
)
def test_an_estimator_that_cannot_be_an_oracle_is_a_mistake_in_the_settings(
    spark: SparkSession, estimator: type, params: dict, reason: str
) -> None:
    settings = OracleSettings(
        kind="spark",
        factory=f"{estimator.__module__}:{estimator.__name__}",
        params=params,
        residual=True,
        pipeline="",
    )
    with pytest.raises(ConfigError, match=reason):
        make_oracle(settings)


def embedding() -> Pipeline:
    """A pipeline as a user would name it in oracle.pipeline."""
    return Pipeline(stages=[VectorAssembler(inputCols=["year"], outputCol=ENCODED, handleInvalid="keep")])


def test_a_pipeline_replaces_the_encodings(spark: SparkSession) -> None:
    rows = pd.DataFrame({"year": [1.0, 2.0, 6.0], "title": ["a", None, "c"]})
    encoder = PipelineEncoder.fit(rows, spark.createDataFrame(rows).schema, embedding())
    expected = [[1, -2.0], [1, -1.0], [1, 3.0]]
    np.testing.assert_allclose(encoder(rows), expected)
    np.testing.assert_allclose(cloudpickle.loads(cloudpickle.dumps(encoder))(rows), expected)
    np.testing.assert_allclose(encoder(pd.DataFrame({"year": [np.nan], "title": [None]})), [[1, 0.0]])


def test_a_pipeline_without_the_encoded_column_is_refused(spark: SparkSession) -> None:
    rows = pd.DataFrame({"year": [1.0, 2.0]})
    pipeline = Pipeline(stages=[VectorAssembler(inputCols=["year"], outputCol="other")])
    with pytest.raises(ConfigError, match="encoded"):
        PipelineEncoder.fit(rows, spark.createDataFrame(rows).schema, pipeline)
