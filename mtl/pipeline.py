"""A pyspark.ml Pipeline of the user's own in place of the encodings of :mod:`mtl.encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pyspark.ml.functions import vector_to_array
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.arrow import matrix
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.oracle.spark import SparkModel, active_session

ENCODED = "encoded"  # the pipeline's last output column, a vector
_ROW = "_row"


@dataclass(frozen=True)
class PipelineEncoder:
    """Input attribute rows → (n, p): the constant 1, then the fitted pipeline's vector, centred.

    A row without any attribute is the average one, as for :class:`mtl.encode.Encoder`; other rows reach the pipeline as
    they are, missing values included.
    """

    model: SparkModel
    schema: T.StructType
    centre: Array  # (p − 1,)

    @classmethod
    def fit(cls, rows: pd.DataFrame, schema: T.StructType, pipeline: Any) -> PipelineEncoder:
        """Fit the pipeline on all rows of attributes.

        Raises:
            ConfigError: what the setting names is no pipeline, or gives no vector column ``encoded``.
        """
        if not hasattr(pipeline, "fit"):
            raise ConfigError(
                f"oracle.pipeline gave {type(pipeline).__name__}: a function that returns a Pipeline is wanted"
            )
        model = SparkModel(pipeline.fit(active_session().createDataFrame(_with_none(rows), schema)))
        unfinished = cls(model, schema, np.empty(0))
        return cls(model, schema, unfinished._vectors(rows).mean(0))

    @property
    def width(self) -> int:
        return 1 + len(self.centre)

    def linear(self, setting: str, names: Sequence[str]) -> tuple[int, ...]:
        """Places of all encoded columns for ["*"]; the pipeline's vector has no other names."""
        if set(names) - {"*"}:
            raise ConfigError(f'{setting}: with oracle.pipeline it can only be [] or ["*"], the vector {ENCODED!r}')
        return tuple(range(1, self.width)) if names else ()

    def __call__(self, rows: pd.DataFrame) -> Array:
        rows = rows.reindex(columns=self.schema.names)
        known = rows.notna().any(axis=1).to_numpy()
        encoded = np.zeros((len(rows), self.width))
        encoded[:, 0] = 1.0
        if known.any():
            encoded[known, 1:] = self._vectors(rows[known]) - self.centre
        return encoded

    def _vectors(self, rows: pd.DataFrame) -> Array:
        numbered = T.StructType([T.StructField(_ROW, T.LongType()), *self.schema])
        frame = active_session().createDataFrame(
            _with_none(rows.assign(**{_ROW: range(len(rows))})[numbered.names]), numbered
        )
        transformed = self.model.transform(frame)
        if ENCODED not in transformed.columns:
            raise ConfigError(
                f"oracle.pipeline has no output column {ENCODED!r}: it has {', '.join(transformed.columns)}"
            )
        found = transformed.select(_ROW, vector_to_array(F.col(ENCODED)).alias(ENCODED)).toArrow().sort_by(_ROW)
        if len(found) != len(rows):
            raise ConfigError(f"oracle.pipeline turned {len(rows)} inputs into {len(found)}: set handleInvalid to keep")
        return matrix(found[ENCODED], len(found[ENCODED][0]))


def _with_none(rows: pd.DataFrame) -> pd.DataFrame:
    """Missing values as None, as Spark wants them, and lists as lists."""
    plain = rows.astype(object).where(rows.notna(), None)
    return plain.map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value)
