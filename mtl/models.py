"""Model versions: what one retraining learnt, which one is live, and how that is switched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from mtl import gaussian, schema
from mtl.config import Settings
from mtl.encode import Encoder, InputEncoder
from mtl.errors import StateError
from mtl.features import Features
from mtl.forms import Form
from mtl.gaussian import Array, Posterior
from mtl.prior import VectorPrior
from mtl.tables import Tables


@dataclass(frozen=True)
class Artefact:
    """The learnt functions of a model version, stored pickled: load only tables that you trust."""

    user_encoder: Encoder
    input_encoder: InputEncoder
    user_implicit: int  # columns after the encoded attributes that stand for training events (mtl.implicit)
    input_implicit: int
    users: VectorPrior
    inputs: VectorPrior


@dataclass(frozen=True)
class Model:
    """One model version, without its rows of features and users."""

    version: int
    status: str
    form: Form
    loss: str
    mean_label: float  # μ: the link of the mean label, on which h is centred
    noise: float
    label_min: float
    label_max: float
    events_version: int
    inputs_version: int
    artefact: Artefact = field(repr=False)

    @property
    def d(self) -> int:
        """Length of φ and w: the basis functions and the intercept."""
        return self.form.d

    def input_basis(self, attributes: pd.DataFrame) -> Array:
        """What the oracle says of inputs by their attribute rows alone: [o − μ, f_1 … f_k], (n, d)."""
        return self.artefact.inputs.mean(
            _encoded(self.artefact.input_encoder, attributes, self.artefact.input_implicit)
        )

    def features_of_new(self, attributes: pd.DataFrame) -> Features:
        """Features of inputs that no event is known of, from their attribute rows: g(z) with the residuals' covariance."""
        mean = self.input_basis(attributes)
        covariance = np.tile(gaussian.pack(self.artefact.inputs.covariance), (len(mean), 1))
        return Features.of(mean, covariance, self.mean_label)

    def prior_mean_of_new(self, attributes: pd.DataFrame) -> Array:
        """Prior means of users that no event was known of in training, (n, d)."""
        return self.artefact.users.mean(_encoded(self.artefact.user_encoder, attributes, self.artefact.user_implicit))

    @property
    def prior_mean_of_unknown(self) -> Array:
        """Prior mean of a user of whom nothing is known, (d,)."""
        return self.prior_mean_of_new(pd.DataFrame(index=[0]))[0]

    def user_posteriors(self, a: Array, b: Array, prior_mean: Array) -> Posterior:
        """Users' weights from their data sums (packed (n, ·) and (n, d)) and prior means (n, d)."""
        return self.artefact.users.conditional(a, b, prior_mean, self.noise)


def _encoded(encoder: InputEncoder, attributes: pd.DataFrame, implicit: int) -> Array:
    z = encoder(attributes)
    return np.column_stack([z, np.zeros((len(z), implicit))])


def load_model(tables: Tables, version: int | None = None) -> Model:
    """The model of a version, the live one by default.

    Raises:
        StateError: there is no such version, or none is live.
    """
    models = tables.read(schema.MODELS)
    wanted = F.col(schema.STATUS) == schema.LIVE if version is None else F.col(schema.MODEL_VERSION) == version
    rows = models.where(wanted).collect()
    if not rows:
        what = (
            "no model version is live: run jobs/retrain.py"
            if version is None
            else f"there is no model version {version}"
        )
        raise StateError(f"{what} (tables.root = {tables.root})")
    return model_of(rows[0])


def model_of(row: Row) -> Model:
    """The model of a row of the models table; its artefact is unpickled, so take only rows that you trust."""
    return Model(
        version=row[schema.MODEL_VERSION],
        status=row[schema.STATUS],
        form=Form(row[schema.K], tuple(row[schema.INPUT_COLUMNS]), tuple(row[schema.USER_COLUMNS])),
        loss=row[schema.LOSS],
        mean_label=row[schema.MEAN_LABEL],
        noise=row[schema.NOISE],
        label_min=row[schema.LABEL_MIN],
        label_max=row[schema.LABEL_MAX],
        events_version=row[schema.EVENTS_VERSION],
        inputs_version=row[schema.INPUTS_VERSION],
        artefact=cloudpickle.loads(row[schema.ARTEFACT]),
    )


def next_version(tables: Tables) -> int:
    """The number for a new version; rows that a retraining left behind when it died are cleared from under it."""
    last = tables.read(schema.MODELS).agg(F.max(schema.MODEL_VERSION)).collect()[0][0]
    version = (last or 0) + 1
    for table in (schema.FEATURES, schema.USERS):
        tables.delta(table).delete(F.col(schema.MODEL_VERSION) >= version)
    return version


def publish(tables: Tables, row: Mapping[str, Any]) -> None:
    """Append the row of a model (:func:`model_row`): from then on the version exists."""
    rows = tables.spark.createDataFrame([row], schema.SCHEMAS[schema.MODELS])
    promoted = F.current_timestamp() if row[schema.STATUS] == schema.LIVE else F.lit(None).cast("timestamp")
    tables.append(
        schema.MODELS,
        rows.withColumn(schema.CREATED_AT, F.current_timestamp()).withColumn(schema.PROMOTED_AT, promoted),
    )


def model_row(
    model: Model,
    form: str,
    objective: tuple[float, ...],
    n_events: int,
    metrics: Mapping[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """The model as a row of the models table, its times left out; :func:`model_of` is the way back."""
    return {
        schema.MODEL_VERSION: model.version,
        schema.STATUS: model.status,
        schema.FORM: form,
        schema.LOSS: model.loss,
        schema.K: model.form.k,
        schema.INPUT_COLUMNS: list(model.form.input_columns),
        schema.USER_COLUMNS: list(model.form.user_columns),
        schema.MEAN_LABEL: model.mean_label,
        schema.NOISE: model.noise,
        schema.LABEL_MIN: model.label_min,
        schema.LABEL_MAX: model.label_max,
        schema.PRIOR_COVARIANCE: gaussian.pack(model.artefact.users.covariance).tolist(),
        schema.ARTEFACT: cloudpickle.dumps(model.artefact),
        schema.EVENTS_VERSION: model.events_version,
        schema.INPUTS_VERSION: model.inputs_version,
        schema.N_EVENTS: n_events,
        schema.OBJECTIVE: list(objective),
        schema.METRICS: json.dumps(metrics),
        schema.SETTINGS: settings.model_dump_json(),
    }


def versions(tables: Tables) -> DataFrame:
    """(model_version, status, promoted_at) of every version."""
    return tables.read(schema.MODELS).select(schema.MODEL_VERSION, schema.STATUS, schema.PROMOTED_AT)


def has_live(tables: Tables) -> bool:
    return not versions(tables).where(F.col(schema.STATUS) == schema.LIVE).isEmpty()


def promote(tables: Tables, version: int | None = None) -> dict[str, int | None]:
    """Make a version live, the newest candidate by default, and retire the one that was; one commit.

    Raises:
        StateError: there is no such version, or no candidate.
    """
    rows = versions(tables).collect()
    live = next((row[schema.MODEL_VERSION] for row in rows if row[schema.STATUS] == schema.LIVE), None)
    if version is None:
        version = max(
            (row[schema.MODEL_VERSION] for row in rows if row[schema.STATUS] == schema.CANDIDATE), default=None
        )
        if version is None:
            raise StateError("there is no candidate to promote: run jobs/retrain.py, or name a version")
    elif version not in [row[schema.MODEL_VERSION] for row in rows]:
        raise StateError(
            f"there is no model version {version}: there are {sorted(row[schema.MODEL_VERSION] for row in rows)}"
        )
    if version != live:
        _flip(tables.delta(schema.MODELS), version)
    return {"live": version, "was": live}


def rollback(tables: Tables) -> dict[str, int | None]:
    """Make the version live again that was live before this one.

    Raises:
        StateError: no other version has been live.
    """
    retired = (
        versions(tables).where(F.col(schema.STATUS) == schema.RETIRED).where(F.col(schema.PROMOTED_AT).isNotNull())
    )
    before = retired.orderBy(F.col(schema.PROMOTED_AT).desc()).first()
    if before is None:
        raise StateError("no other version has been live: there is nothing to roll back to")
    return promote(tables, before[schema.MODEL_VERSION])


def _flip(models: DeltaTable, version: int) -> None:
    status, is_new = F.col(schema.STATUS), F.col(schema.MODEL_VERSION) == version
    models.update(
        is_new | (status == schema.LIVE),
        {
            schema.STATUS: F.when(is_new, schema.LIVE).otherwise(schema.RETIRED),
            schema.PROMOTED_AT: F.when(is_new, F.current_timestamp()).otherwise(F.col(schema.PROMOTED_AT)),
        },
    )
