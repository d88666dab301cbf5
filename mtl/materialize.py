"""Features of inputs that came after training: evaluated by the stored oracle, kept in the shared cache."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.batches import persistently
from mtl.features import feature_rows
from mtl.model import Model
from mtl.schema import INPUT_ID, MODEL_VERSION
from mtl.tables import Tables

log = logging.getLogger("mtl")

_AT_ONCE = 100_000  # inputs evaluated and written in one commit


def materialize(tables: Tables, model: Model, only: DataFrame | None = None) -> int:
    """Write features for inputs that have attributes but no features of this model version; how many there were.

    An insert-only MERGE: two that run at once cannot both write an input.

    Args:
        only: look at these inputs (input_id) alone.
    """
    inputs = tables.read(schema.INPUTS)
    if only is not None:
        inputs = inputs.join(F.broadcast(only), INPUT_ID, "left_semi")
    missing = inputs.join(tables.of_version(schema.FEATURES, model.version), INPUT_ID, "left_anti").toPandas()
    for first in range(0, len(missing), _AT_ONCE):
        insert_features(tables, model, missing.iloc[first : first + _AT_ONCE])
    if len(missing):
        log.info("materialize: %d new inputs for model version %d", len(missing), model.version)
    return len(missing)


def insert_features(tables: Tables, model: Model, attributes: pd.DataFrame) -> None:
    features = model.features_of_new(attributes.drop(columns=INPUT_ID))
    ids, width = pa.array(attributes[INPUT_ID], pa.string()), model.artefact.input_implicit
    of_none = np.zeros_like(features.phi), np.zeros((len(attributes), width)), np.ones(len(attributes), bool)
    rows = feature_rows(model.version, ids, features, *of_none)
    source = tables.spark.createDataFrame(rows).alias("new")
    same = f"stored.{MODEL_VERSION} = {model.version} AND stored.{INPUT_ID} = new.{INPUT_ID}"
    # Again where another's came between: then it inserts what that one did not.
    persistently(
        lambda: tables.delta(schema.FEATURES).alias("stored").merge(source, same).whenNotMatchedInsertAll().execute()
    )
