"""Measures of predictions against labels, by loss, as sums that Spark adds up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from mtl.model import Model
from mtl.schema import LABEL

BINS = 15  # of equal width, for the calibration error


def clipped(prediction: Column, model: Model) -> Column:
    """The prediction within :attr:`Model.prediction_range`."""
    low, high = model.prediction_range
    return F.greatest(F.least(prediction, F.lit(high)), F.lit(low))


def cost(loss: str, prediction: Column, label: Column) -> Column:
    """What is minimized: squared error, log loss (nats), Poisson deviance."""
    if loss == "logistic":
        return -F.log(F.when(label > 0, prediction).otherwise(1 - prediction))
    if loss == "poisson":
        return 2 * (F.when(label > 0, label * F.log(label / prediction)).otherwise(0.0) - label + prediction)
    return (label - prediction) ** 2


def _squared(prediction: Column, label: Column) -> Column:
    return (label - prediction) ** 2


def _absolute(prediction: Column, label: Column) -> Column:
    return F.abs(label - prediction)


def _correct(prediction: Column, label: Column) -> Column:
    return ((prediction >= 0.5) == (label > 0)).cast("double")


# By loss and measure: the cost of one row, and what is made of the mean over rows.
_MEASURES: dict[str, dict[str, tuple[Callable[[Column, Column], Column], Callable[[float], float]]]] = {
    "squared": {"rmse": (_squared, math.sqrt), "mae": (_absolute, float)},
    "logistic": {
        "log_loss": (lambda p, y: cost("logistic", p, y), float),
        "brier": (_squared, float),
        "accuracy": (_correct, float),
        "mae": (_absolute, float),
    },
    "poisson": {
        "deviance": (lambda p, y: cost("poisson", p, y), float),
        "rmse": (_squared, math.sqrt),
        "mae": (_absolute, float),
    },
}


def sums(model: Model, name: str) -> list[Column]:
    """Aggregates over rows with a column ``name`` of predictions, from which :func:`measures` are taken."""
    prediction, label = clipped(F.col(name), model), F.col(LABEL)
    return [F.sum(row(prediction, label)).alias(f"{name}_{key}") for key, (row, _) in _MEASURES[model.loss].items()]


def measures(model: Model, name: str, groups: Sequence[Row | Mapping[str, Any]]) -> dict[str, float]:
    """Of groups of rows, each with its number of rows ``n`` and its :func:`sums`."""
    n = sum(group["n"] for group in groups)
    return {
        key: finish(sum(group[f"{name}_{key}"] for group in groups) / n)
        for key, (_, finish) in _MEASURES[model.loss].items()
    }


def ranking(rows: DataFrame, model: Model, name: str) -> dict[str, float | None]:
    """For logistic loss, the area under the ROC curve, ties counted half, and the expected calibration error.

    The latter is Σ |mean prediction − mean label| over :data:`BINS` bins of the prediction, weighted by their rows. The
    area is None where all labels are equal.
    """
    if model.loss != "logistic":
        return {}
    probability = clipped(F.col(name), model)
    of = rows.select(probability.alias("p"), F.col(LABEL))
    bins = of.groupBy(F.least(F.floor(F.col("p") * BINS), F.lit(BINS - 1))).agg(
        F.count("*").alias("n"), F.sum("p").alias("p"), F.sum(LABEL).alias("y")
    )
    found = bins.collect()
    n, positive = sum(row["n"] for row in found), sum(row["y"] for row in found)
    area = None
    if 0 < positive < n:
        # No bins: every distinct prediction is a threshold.
        area = BinaryClassificationEvaluator(rawPredictionCol="p", labelCol=LABEL, numBins=0).evaluate(of)
    return {"auc": area, "ece": sum(abs(row["p"] - row["y"]) for row in found) / n}
