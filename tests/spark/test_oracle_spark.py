"""Estimators of pyspark.ml as oracles: the suite that every oracle passes, and what only they can get wrong."""

from __future__ import annotations

import re

import cloudpickle
import numpy as np
import pandas as pd
import pytest
from oracle_checks import OracleChecks, grid
from pyspark import TaskContext
from pyspark.ml import Pipeline
from pyspark.ml.clustering import KMeans
from pyspark.ml.feature import PolynomialExpansion, VectorAssembler, VectorIndexer
from pyspark.ml.linalg import Vectors
from pyspark.ml.regression import (
    AFTSurvivalRegression,
    DecisionTreeRegressor,
    GBTRegressor,
    GeneralizedLinearRegression,
    LinearRegression,
    RandomForestRegressor,
)
from pyspark.sql import SparkSession
from sklearn.linear_model import LinearRegression as LeastSquares
from sklearn.tree import DecisionTreeRegressor as Tree

from mtl.basis import fit_one
from mtl.config import load_settings
from mtl.errors import ConfigError, OracleError
from mtl.oracle import make_oracle
from mtl.oracle.parallel import SparkFits
from mtl.oracle.scikit import scikit_oracle
from mtl.oracle.spark import SparkModel, SparkRegressor, in_numpy, spark_oracle
from mtl.oracle.trees import Trees
from mtl.pipeline import ENCODED, PipelineEncoder
from mtl.regressors import Linear, Oracle


def scaled(featuresCol: str, labelCol: str, predictionCol: str, weightCol: str, degree: int) -> Pipeline:
    """A pipeline as a user would name it in oracle.factory."""
    expand = PolynomialExpansion(degree=degree, inputCol=featuresCol, outputCol="expanded")
    regression = LinearRegression(
        featuresCol="expanded", labelCol=labelCol, predictionCol=predictionCol, weightCol=weightCol, regParam=1e-3
    )
    return Pipeline(stages=[expand, regression])


ORACLES = {
    "pyspark LinearRegression": (LinearRegression, {"solver": "normal"}),
    "pyspark GBTRegressor": (GBTRegressor, {"maxIter": 2, "maxDepth": 4, "stepSize": 0.9, "seed": 0}),
    "pyspark DecisionTreeRegressor": (DecisionTreeRegressor, {"maxDepth": 6}),
    "pyspark RandomForestRegressor": (
        RandomForestRegressor,
        {"numTrees": 10, "bootstrap": False, "featureSubsetStrategy": "all", "seed": 0},
    ),
    "pyspark GeneralizedLinearRegression": (GeneralizedLinearRegression, {"regParam": 1e-6}),
    "pyspark Pipeline": (scaled, {"degree": 2}),
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
    factory = f"{estimator.__module__}:{estimator.__name__}"
    settings = load_settings().oracle.model_copy(update={"kind": "spark", "factory": factory, "params": params})
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

    # A model is unpickled by workers and by the server, which have no session and do not encode inputs.
    pickled = cloudpickle.dumps(encoder)
    width = spark.range(0, 1, 1, 1).rdd.map(lambda _: cloudpickle.loads(pickled).width).first()
    assert width == 2


def test_a_pipeline_without_the_encoded_column_is_refused(spark: SparkSession) -> None:
    rows = pd.DataFrame({"year": [1.0, 2.0]})
    pipeline = Pipeline(stages=[VectorAssembler(inputCols=["year"], outputCol="other")])
    with pytest.raises(ConfigError, match="encoded"):
        PipelineEncoder.fit(rows, spark.createDataFrame(rows).schema, pipeline)


# --- Without Spark once fitted ----------------------------------------------------------------------------------------


NUMPY = {
    "LinearRegression": (LinearRegression, {"regParam": 0.1}),
    "LinearRegression, elastic net": (LinearRegression, {"regParam": 0.1, "elasticNetParam": 0.5}),
    "GeneralizedLinearRegression": (GeneralizedLinearRegression, {"regParam": 0.1}),
    "DecisionTree": (DecisionTreeRegressor, {"maxDepth": 7}),
    "RandomForest": (RandomForestRegressor, {"numTrees": 7, "maxDepth": 6, "seed": 0}),
    "GBT": (GBTRegressor, {"maxIter": 5, "maxDepth": 4, "stepSize": 0.3, "seed": 0}),
}


@pytest.fixture(scope="module")
def wide() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attributes, target and weights without a round number among them."""
    random = np.random.default_rng(0)
    z = np.column_stack([np.ones(400), random.normal(size=(400, 4)) * [1, 1e-5, 1e5, 3]])
    target = np.sin(3 * z[:, 1]) + z[:, 2] * 1e5 + z[:, 3] / 1e5 + 0.1 * random.normal(size=400)
    return z, target, random.uniform(0.1, 3, 400)


@pytest.mark.parametrize(("estimator", "params"), NUMPY.values(), ids=NUMPY)
def test_a_fitted_model_predicts_in_numpy_what_it_does_in_spark(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, wide: tuple, estimator: type, params: dict
) -> None:
    models, convert = [], in_numpy
    monkeypatch.setattr("mtl.oracle.spark.in_numpy", lambda model: models.append(model) or convert(model))
    function = spark_oracle(estimator, params)(*wide)
    assert isinstance(function, Linear | Trees)
    new = np.vstack([wide[0], np.random.default_rng(1).normal(size=(200, 5)) * [1, 1, 1e-5, 1e5, 3]])
    expected = SparkRegressor(SparkModel(models[0])).predict(new)
    assert expected.std() > 0.1
    np.testing.assert_allclose(function.predict(new), expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_is_not_known_is_evaluated_by_spark(spark: SparkSession, wide: tuple) -> None:
    z, target, weight = wide
    logarithmic = {"family": "gamma", "link": "log", "regParam": 0.1}
    function = spark_oracle(GeneralizedLinearRegression, logarithmic)(z, np.exp(target / 4), weight)
    assert isinstance(function, SparkRegressor)
    assert (function.predict(z) > 0).all()


def test_splits_on_categories_are_left_to_spark(spark: SparkSession) -> None:
    rows = spark.createDataFrame([(Vectors.dense([i % 3.0]), [5.0, 1.0, 7.0][i % 3]) for i in range(30)], ["raw", "y"])
    rows = VectorIndexer(inputCol="raw", outputCol="features").fit(rows).transform(rows)
    assert in_numpy(DecisionTreeRegressor(labelCol="y").fit(rows)) is None


# --- All functions at once --------------------------------------------------------------------------------------------


def test_functions_fitted_as_spark_tasks_are_those_fitted_here(spark: SparkSession) -> None:
    z, _ = grid(200)
    random = np.random.default_rng(0)
    target, weight = random.normal(size=(200, 5)), random.uniform(0, 2, (200, 5))
    weight[random.random((200, 5)) < 0.2] = 0.0
    oracle, fits = scikit_oracle(Tree, {"max_depth": 3, "random_state": 0}), SparkFits(spark)
    for repetition in range(2):
        fitted = fits(oracle, z, target + repetition, weight, list(range(5)))
        assert len(fitted) == 5
        for i, (function, predictions) in enumerate(fitted):
            expected = fit_one(oracle, z, target[:, i] + repetition, weight[:, i], i)[1]
            np.testing.assert_array_equal(predictions, expected)
            np.testing.assert_array_equal(function.predict(z), expected)


def test_every_function_is_a_task_of_its_own(spark: SparkSession) -> None:
    def oracle(attributes, target, weight):
        return Linear(np.full(3, float(TaskContext.get().partitionId())))

    z, _ = grid(20)
    fitted = SparkFits(spark)(oracle, z, np.zeros((20, 6)), np.ones((20, 6)), list(range(6)))
    assert [function.coefficients[0] for function, _ in fitted] == list(range(6))


def test_an_oracle_that_fails_in_a_task_is_the_same_error_as_here(spark: SparkSession) -> None:
    def oracle(attributes, target, weight):
        raise ValueError("no solver today")

    z, _ = grid(20)
    with pytest.raises(
        OracleError, match=re.escape("failed on basis function 2 (ValueError: no solver today)")
    ) as raised:
        SparkFits(spark)(oracle, z, np.zeros((20, 3)), np.ones((20, 3)), [2, 4, 5])
    assert "\n" not in str(raised.value)
