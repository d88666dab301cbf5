"""What the experiments share: one Spark session, a training without tables and scores of rows by pure functions, and
means of repeats with their intervals.

Data of unclear licence is no part of the project: each experiment reads a folder (``--data``, or MTL_DATA) with files in
our own columns, ``<name>/events.parquet`` (user_id, input_id, label) and ``<name>/inputs.parquet`` (input_id, attributes).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from scipy.stats import t as student

from mtl import features, schema, score
from mtl.config import Settings, load_settings
from mtl.contexts import COLUMN
from mtl.features import Features
from mtl.fitting import train
from mtl.gaussian import Array
from mtl.model import Model
from mtl.schema import CONTEXT, INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.session import open_session
from mtl.users import SharedInputs

SPARK = ("spark.master=local[2]", "spark.shuffle_partitions=2", "train.partitions=1")
_SESSION = load_settings((), SPARK).spark


def arguments(doc: str | None, repeats: int = 10) -> argparse.ArgumentParser:
    """The options of every experiment on data that the project does not carry."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("MTL_DATA"), help="folder of the data (default: MTL_DATA)")
    parser.add_argument("--repeats", type=int, default=repeats, help="random splits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first split; the next has the next")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="settings of the model")
    return parser


def read(folder: str | None, name: str, columns: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Events and inputs of a data set, or the end of the program with what is missing."""
    wanted = f"{name}/events.parquet (user_id, input_id, label) and {name}/inputs.parquet ({columns})"
    if not folder:
        sys.exit(f"this data is no part of the project: name with --data or MTL_DATA a folder that holds {wanted}")
    files = [Path(folder) / name / f"{part}.parquet" for part in ("events", "inputs")]
    if missing := [str(file) for file in files if not file.exists()]:
        sys.exit(f"there is no {missing[0]}: --data or MTL_DATA names a folder that holds {wanted}")
    events, inputs = map(pd.read_parquet, files)
    return events[[USER_ID, INPUT_ID, LABEL]], inputs


def session(name: str) -> SparkSession:
    return open_session(_SESSION, f"experiment {name}")


@dataclass(frozen=True)
class Fitted:
    """A model trained as :func:`mtl.retrain.retrain` trains it, with its rows in memory in place of tables."""

    model: Model
    features: SharedInputs  # of the inputs it was trained with
    states: pa.Table  # of the users, as scoring wants them
    report: dict[str, Any]

    def predict(self, rows: pd.DataFrame, inputs: pd.DataFrame) -> pd.DataFrame:
        """Prediction and standard deviation of ``rows`` (user_id, input_id and contexts), in their order.

        Args:
            inputs: attributes of inputs, for those that training did not see.
        """
        new = inputs[inputs[INPUT_ID].isin(rows[INPUT_ID]) & ~inputs[INPUT_ID].isin(self.features.ids.to_pandas())]
        frames = ([new.drop(columns=INPUT_ID)] if len(new) else []) + [pd.DataFrame(index=[0])]
        parts = [self.features.features, *map(self.model.features_of_new, frames)]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        ids = pa.concat_arrays([self.features.ids, pa.array(new[INPUT_ID], pa.string())])
        known = SharedInputs(ids, Features(*map(np.concatenate, columns)))
        numbered = pa.table(
            {
                USER_ID: pa.array(rows[USER_ID], pa.string()),
                INPUT_ID: pa.array(rows[INPUT_ID], pa.string()),
                "row": np.arange(len(rows)),
                **{COLUMN + name: pa.array(rows[name], pa.string()) for name in self.model.contexts},
            }
        )
        together = pa.concat_tables([numbered, self.states], promote_options="default")
        scored = score.add_scores(together, self.model, known).to_pandas().sort_values("row")
        return scored[[score.PREDICTION, score.STD]].reset_index(drop=True)


def fit(
    spark: SparkSession,
    events: pd.DataFrame,
    inputs: pd.DataFrame,
    assignments: Sequence[str],
    users: pd.DataFrame | None = None,
) -> Fitted:
    """Train on ``events`` (user_id, input_id, label and contexts, as text); nothing else of the data is seen.

    Args:
        inputs, users: attributes; those of inputs that are not to be known in training must be left out.
        assignments: ``section.key=value`` over the shipped defaults.
    """
    settings: Settings = load_settings((), (*SPARK, *assignments))
    started = time.perf_counter()
    users = pd.DataFrame({USER_ID: pd.Series(dtype=str)}) if users is None else users
    rows = events[[USER_ID, INPUT_ID, LABEL]].assign(**{WEIGHT: 1.0})
    if settings.model.contexts:
        values = events[sorted(settings.model.contexts)].to_dict("records")
        rows[CONTEXT] = [json.dumps(one) for one in values]
    frames = (_frame(spark, frame) for frame in (rows, inputs, users))
    trained = train(*frames, settings)
    try:
        model = trained.model(1, schema.LIVE, 0, 0)
        inputs_rows = trained.feature_rows(1).toArrow()
        user_rows = trained.user_rows(1).toArrow()
    finally:
        trained.engine.close()
    seconds = time.perf_counter() - started
    known = SharedInputs(inputs_rows[INPUT_ID].combine_chunks(), features.from_rows(inputs_rows, model.d))
    states = user_rows.select([USER_ID, *score.STATE]).rename_columns([USER_ID, *score.STATE.values()])
    return Fitted(model, known, states, {**trained.report, "seconds": round(seconds, 2)})


def _frame(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    return spark.createDataFrame(pa.Table.from_pandas(rows, preserve_index=False))


def encoded(fitted: Fitted, inputs: pd.DataFrame, ids: pd.Series) -> Array:
    """Attributes of inputs in the model's own encoding, fitted on its training inputs: what a baseline may see, too."""
    by_id = inputs.set_index(INPUT_ID).loc[ids].reset_index(drop=True)
    return fitted.model.artefact.input_encoder(by_id)


def summary(values: Sequence[float], tested: float = 0.0) -> dict[str, Any]:
    """Mean, standard deviation and 95% interval of the mean over repeats.

    Args:
        tested: size of a test part over that of its training part. Random splits overlap, and so does what they give:
            ``interval_corrected`` allows for it (Nadeau & Bengio 2003), ``interval`` is Student's.
    """
    a = np.asarray(values, float)
    mean, n = float(a.mean()), len(a)
    if n == 1:
        return {"mean": round(mean, 4)}
    sd, quantile = float(a.std(ddof=1)), float(student.ppf(0.975, n - 1))

    def interval(inflation: float) -> list[float]:
        return [round(mean + side * quantile * sd * inflation**0.5, 4) for side in (-1, 1)]

    plain = {"mean": round(mean, 4), "sd": round(sd, 4), "interval": interval(1 / n)}
    return {**plain, "interval_corrected": interval(1 / n + tested)} if tested else plain


def rmse(label: Array, prediction: Array, model: Model) -> float:
    """Of predictions clipped to the labels' range in training, as jobs/evaluate.py measures."""
    clipped = np.clip(prediction, model.label_min, model.label_max)
    return float(np.sqrt(np.mean((np.asarray(label) - clipped) ** 2)))
