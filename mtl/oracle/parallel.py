"""Black boxes fitted as parallel Spark tasks, one task a basis function, each on one core."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from mtl.basis import fit_one
from mtl.errors import OracleError
from mtl.gaussian import Array
from mtl.regressors import Oracle, Regressor
from mtl.sharing import Shared, share

_COLUMNS = "function int, fitted binary, predictions binary, problem string"


class SparkFits:
    """:data:`mtl.basis.FitAll` on the workers of a session. Attributes are sent once, targets and weights each time."""

    def __init__(self, spark: SparkSession):
        self.spark = spark
        self._sent: tuple[Array, Shared] | None = None

    def __call__(
        self, oracle: Oracle, attributes: Array, target: Array, weight: Array, which: list[int]
    ) -> list[tuple[Regressor, Array]]:
        n = target.shape[1]
        if self._sent is None or self._sent[0] is not attributes:
            if self._sent:
                self._sent[1].destroy()
            self._sent = attributes, share(self.spark, attributes)
        given = share(self.spark, (cloudpickle.dumps(oracle), target, weight, which))
        try:
            # A range is cut evenly, so that each of its n partitions is one function.
            functions = self.spark.range(0, n, 1, n).withColumnRenamed("id", "function")
            rows = functions.mapInArrow(_fits(self._sent[1], given), _COLUMNS).toArrow().sort_by("function")
        finally:
            given.destroy()
        for problem in rows["problem"].drop_null().to_pylist():
            raise OracleError(problem)
        return [
            (cloudpickle.loads(fitted.as_buffer()), np.frombuffer(predictions.as_buffer()))
            for fitted, predictions in zip(rows["fitted"], rows["predictions"], strict=True)
        ]


def _fits(attributes: Any, given: Any) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for i in batch.column("function").to_pylist():
                oracle, target, weight, which = given.value
                fitted = fit_to_row(cloudpickle.loads(oracle), attributes.value, target[:, i], weight[:, i], which[i])
                yield pa.RecordBatch.from_pylist([fitted], _SCHEMA)

    return partition


_SCHEMA = pa.schema(
    [
        ("function", pa.int32()),
        ("fitted", pa.binary()),
        ("predictions", pa.binary()),
        ("problem", pa.string()),
    ]
)


def fit_to_row(oracle: Oracle, attributes: Array, target: Array, weight: Array, i: int) -> dict[str, Any]:
    """A row of what was fitted, or of why not: a task that raised would be tried again, and its reason be buried."""
    try:
        fitted, predictions = fit_one(oracle, attributes, target, weight, i)
        return {"function": i, "fitted": cloudpickle.dumps(fitted), "predictions": predictions.tobytes()}
    except OracleError as error:
        return {"function": i, "problem": str(error)}
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        return {"function": i, "problem": f"what the oracle fitted as basis function {i} cannot be stored ({reason})"}
