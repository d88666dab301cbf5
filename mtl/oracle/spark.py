"""Any pyspark.ml regressor with a weightCol as an oracle.

Fitted linear and tree models become functions in NumPy: evaluating a basis function then needs no Spark.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.ml import regression
from pyspark.ml.functions import array_to_vector
from pyspark.ml.util import DefaultParamsReader
from pyspark.sql import DataFrame, SparkSession

from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.oracle.trees import parse_trees
from mtl.regressors import Linear, Oracle, Regressor

_ROW, _FEATURES, _TARGET, _WEIGHT, _PREDICTION = "row", "features", "target", "weight", "prediction"


class SparkModel:
    """A fitted pyspark.ml model that pickles as the files of Spark's own writer, and needs Spark only where it is used."""

    def __init__(self, model: Any):
        self._model, self._files = model, b""

    def transform(self, rows: DataFrame) -> DataFrame:
        if self._model is None:
            self._model = model_of(self._files)
        return self._model.transform(rows)

    def __getstate__(self) -> bytes:
        self._files = self._files or files_of(self._model)
        return self._files

    def __setstate__(self, files: bytes) -> None:
        self._model, self._files = None, files


@dataclass(frozen=True)
class SparkRegressor:
    """A fitted pyspark.ml model as a function on arrays."""

    model: SparkModel

    def predict(self, attributes: Array) -> Array:
        rows = self.model.transform(_frame(active_session(), attributes)).select(_ROW, _PREDICTION).toPandas()
        return rows.sort_values(_ROW)[_PREDICTION].to_numpy()


def files_of(model: Any) -> bytes:
    """A fitted pyspark.ml model as a zip of the files that its own writer makes (on this machine's disk)."""
    with tempfile.TemporaryDirectory() as folder:
        model.write().overwrite().save(f"file://{folder}/model")
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(Path(folder).rglob("*")):
                archive.write(file, file.relative_to(folder))
        return buffer.getvalue()


def model_of(files: bytes) -> Any:
    """The model of :func:`files_of`."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(BytesIO(files)).extractall(folder)
        return DefaultParamsReader.loadParamsInstance(f"file://{folder}/model", active_session())


def spark_oracle(factory: Any, params: Mapping[str, Any]) -> Oracle:
    """An oracle that fits the estimator ``factory(**params)`` with weights scaled to mean 1.

    Args:
        factory: a class of estimators, or a function that returns one (a Pipeline, say); it is given featuresCol, labelCol,
            predictionCol and weightCol too.

    Raises:
        ConfigError: the estimator refuses the parameters or has no weightCol.
    """
    columns = {"featuresCol": _FEATURES, "labelCol": _TARGET, "predictionCol": _PREDICTION, "weightCol": _WEIGHT}
    active_session()
    try:
        estimator = factory(**params, **columns)
    except TypeError as error:
        raise ConfigError(f"oracle.params do not fit {factory.__name__} (it needs a weightCol too): {error}") from None

    def fit(attributes: Array, target: Array, weight: Array) -> Regressor:
        rows = _frame(active_session(), attributes, **{_TARGET: target, _WEIGHT: weight / weight.mean()}).persist()
        try:
            model = estimator.fit(rows)
        finally:
            rows.unpersist()
        return in_numpy(model) or SparkRegressor(SparkModel(model))

    return fit


def in_numpy(model: Any) -> Regressor | None:
    """The function of a fitted linear or tree model without Spark; None for any other, and for splits on categories."""
    if isinstance(model, regression.LinearRegressionModel) or (
        isinstance(model, regression.GeneralizedLinearRegressionModel) and _is_identity_linked(model)
    ):
        return Linear(model.coefficients.toArray(), model.intercept)
    if isinstance(model, regression.DecisionTreeRegressionModel | regression.GBTRegressionModel):
        return parse_trees(model.toDebugString)
    if isinstance(model, regression.RandomForestRegressionModel):
        return parse_trees(model.toDebugString, 1 / model.getNumTrees)
    return None


def _is_identity_linked(model: regression.GeneralizedLinearRegressionModel) -> bool:
    if model.isSet("link"):
        return model.getLink() == "identity"
    return model.getFamily() == "gaussian"  # of the others another link is the canonical one


def _frame(spark: SparkSession, attributes: Array, **columns: Array) -> DataFrame:
    rows = pd.DataFrame({_ROW: np.arange(len(attributes)), _FEATURES: list(attributes), **columns})
    return spark.createDataFrame(rows).withColumn(_FEATURES, array_to_vector(_FEATURES))


def active_session() -> SparkSession:
    spark = SparkSession.getActiveSession()
    if spark is None:
        raise ConfigError("oracle.pipeline, and functions of oracle.kind spark, are evaluated in a Spark session only")
    return spark
