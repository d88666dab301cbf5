"""A past prediction rebuilt: the tables as they were, through the code that predicts today."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import features, gaussian, schema
from mtl.arrow import matrix
from mtl.effects import of_one
from mtl.errors import ConfigError, StateError
from mtl.gaussian import Array
from mtl.ledger import ledger_of
from mtl.model import Model, model_of
from mtl.schema import INPUT_ID, USER_ID
from mtl.score import PREDICTION, STD, inputs_of, score_rows
from mtl.tables import Tables, as_long_as_kept

_READ = (schema.MODELS, schema.FEATURES, schema.USERS, schema.INPUTS, schema.USER_ATTRIBUTES, schema.LEDGER)
_BATCHES = 5  # of the ledger, the last ones, that an explanation shows


@dataclass(frozen=True)
class Past:
    """The tables at a moment, and the version that was live then."""

    tables: Tables
    at: datetime
    versions: dict[str, int]  # of each table
    model: Model

    @classmethod
    def of(cls, tables: Tables, at: datetime) -> Past:
        """The state at ``at``, in UTC.

        Raises:
            StateError: no model version was live then, or the logs do not reach back so far.
        """
        versions = {table: tables.version_at(table, at) for table in _READ}
        found = {table: version for table, version in versions.items() if version is not None}
        if schema.MODELS in found:
            models = tables.read(schema.MODELS, found[schema.MODELS])
            rows = models.where(F.col(schema.STATUS) == schema.LIVE).collect()
            if rows and (gone := {schema.FEATURES, schema.USERS} - found.keys()):
                raise StateError(_vacuumed(at) + f": the log of {', '.join(sorted(gone))} begins later")
            if rows:
                return cls(tables, at, found, model_of(rows[0].asDict()))
        raise StateError(f"no model version was live at {at.isoformat()} (tables.root = {tables.root})")

    def read(self, table: str) -> DataFrame | None:
        return self.tables.read(table, self.versions[table]) if table in self.versions else None

    @property
    def features(self) -> DataFrame:
        return self.tables.of_version(schema.FEATURES, self.model.version, self.versions[schema.FEATURES])

    @property
    def users(self) -> DataFrame:
        return self.tables.of_version(schema.USERS, self.model.version, self.versions[schema.USERS])

    def score(self, rows: DataFrame) -> DataFrame:
        """:func:`mtl.score.score_rows` as it would have answered then."""
        attributes = self.read(schema.INPUTS), self.read(schema.USER_ATTRIBUTES)
        return score_rows(self.model, self.features, self.users, *attributes, rows)


def explain(
    tables: Tables,
    user: str,
    input_id: str,
    at: datetime,
    offset: float | None = None,
    context: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What was predicted for a pair at a moment, and of what it was made.

    Args:
        offset: a known part of h that the question came with.
        context: and its contexts' values.

    Returns:
        prediction and std; the addends of h = o + w·φ, of which the response is the prediction; what was known of user
        and input; the ledger's last batches before; the table versions read.

    Raises:
        StateError: no version was live then, or the files of that state have been vacuumed.
    """
    kept = "a prediction can be rebuilt as long as old files are kept (delta.deletedFileRetentionDuration)"
    with as_long_as_kept(f"{_vacuumed(at)}: {kept}"):
        return _taken_apart(Past.of(tables, at), user, input_id, offset, context or {})


def _taken_apart(
    past: Past, user: str, input_id: str, offset: float | None, context: Mapping[str, str]
) -> dict[str, Any]:
    tables, model = past.tables, past.model
    for name in context:
        if name not in model.contexts:
            raise ConfigError(f"model version {model.version} has no context {name}: {model.contexts}")
    columns = f"{USER_ID} string, {INPUT_ID} string, {schema.OFFSET} double, {schema.CONTEXT} string"
    pair = tables.spark.createDataFrame([(user, input_id, offset, json.dumps(dict(context)))], columns)
    scored = past.score(pair).first()
    state = past.users.where(F.col(USER_ID) == user).toArrow()
    shared = past.features.where(F.col(INPUT_ID) == input_id).toArrow()
    of = inputs_of(model, past.features, past.read(schema.INPUTS), pair.select(INPUT_ID)).features
    weights, phi = _weights(past, state, user), of.phi[0]
    learnt = features.residuals(shared, model.d)[0] if len(shared) else np.zeros(model.d)
    return {
        "user": user,
        "input": input_id,
        "at": past.at.isoformat(),
        "model_version": model.version,
        PREDICTION: scored[PREDICTION],
        STD: scored[STD],
        "user_events": state[schema.N_EVENTS][0].as_py() if len(state) else 0,
        "input_has_features": bool(len(shared)),
        "addends": [
            {
                "of": "offset",
                "value": float(of.offset[0]),
                "from_attributes": float(of.offset[0] - learnt[0]),
                "from_residual": float(learnt[0]),
            },
            *([{"of": "given", "value": offset}] if offset else []),
            *(
                {"of": effect.name, "value": of_one(None, context, (effect,))[0], "context": context.get(effect.name)}
                for effect in model.artefact.effects
            ),
            {"of": "intercept", "value": float(weights[0])},
            *(
                {
                    "of": f"f_{i}",
                    "value": float(weights[i] * phi[i]),
                    "weight": float(weights[i]),
                    "f": float(phi[i]),
                    "from_attributes": float(weights[i] * (phi[i] - learnt[i])),
                    "from_residual": float(weights[i] * learnt[i]),
                }
                for i in range(1, model.d)
            ),
        ],
        "batches": _last_batches(past) if schema.LEDGER in past.versions else [],
        "tables": past.versions,
    }


def _vacuumed(at: datetime) -> str:
    return f"what the tables held at {at.isoformat()} has been vacuumed"


def _weights(past: Past, state: pa.Table, user: str) -> Array:
    """E[w_u], (d,): of the user's row, or the prior's where there is none."""
    model = past.model
    a: Array = np.zeros((1, gaussian.packed_length(model.d)))
    b: Array = np.zeros((1, model.d))
    mean: Array = model.prior_mean_of_unknown[None, :]
    if len(state):
        a, b = matrix(state[schema.A], a.shape[1]), matrix(state[schema.B], model.d)
        mean = matrix(state[schema.PRIOR_MEAN], model.d)
    else:
        attributes = past.read(schema.USER_ATTRIBUTES)
        rows = attributes.where(F.col(USER_ID) == user).drop(USER_ID).toPandas() if attributes is not None else []
        if len(rows):
            mean = model.prior_mean_of_new(rows)
    return model.user_posteriors(a, b, mean).mean[0]


def _last_batches(past: Past) -> list[dict[str, Any]]:
    rows = ledger_of(past.tables, past.model.version, commit=past.versions[schema.LEDGER])
    last = rows.orderBy(F.col(schema.CREATED_AT).desc()).limit(_BATCHES)
    columns = (schema.APPLICATION_ID, schema.BATCH_ID, schema.ACCEPTED, schema.CREATED_AT)
    return [
        {**row.asDict(), schema.CREATED_AT: row[schema.CREATED_AT].isoformat()}
        for row in last.select(*columns).collect()
    ]
