"""What one retraining learnt: functions that need neither Spark nor tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd

from mtl import gaussian, schema
from mtl.config import Settings
from mtl.effects import Effects, names_of
from mtl.encode import Encoder, InputEncoder
from mtl.errors import StateError
from mtl.features import Features
from mtl.forms import Form
from mtl.gaussian import Array, Posterior
from mtl.prior import VectorPrior

# Probabilities and rates are kept this far from where one event could cost infinitely much.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Artefact:
    """The learnt functions of a model version, stored pickled: load only tables that you trust."""

    user_encoder: Encoder
    input_encoder: InputEncoder
    user_implicit: int  # columns after the encoded attributes that stand for training events (mtl.implicit)
    input_implicit: int
    users: VectorPrior
    inputs: VectorPrior
    effects: Effects = ()  # of the events' contexts


@dataclass(frozen=True)
class Model:
    """One model version, without its rows of features and users."""

    version: int
    status: str
    form: Form
    loss: str
    mu: float  # the link of the mean label less the mean offset: h is centred on it
    noise: float
    label_min: float
    label_max: float
    events_version: int
    inputs_version: int
    artefact: Artefact = field(repr=False)
    half_life_days: float = 0.0  # of an event in its user's sums (mtl.decay); 0: nothing is forgotten

    @property
    def d(self) -> int:
        """Length of φ and w: the basis functions and the intercept."""
        return self.form.d

    @property
    def prediction_range(self) -> tuple[float, float]:
        """How far out a prediction can be: the training labels' range where the loss is squared."""
        return {
            "squared": (self.label_min, self.label_max),
            "logistic": (_SMALLEST, 1 - _SMALLEST),
            "poisson": (_SMALLEST, math.inf),
        }[self.loss]

    @property
    def contexts(self) -> list[str]:
        """The contexts of events that have effects, by name."""
        return names_of(self.artefact.effects)

    def input_basis(self, attributes: pd.DataFrame) -> Array:
        """What the oracle says of inputs by their attribute rows alone: [o − μ, f_1 … f_k], (n, d)."""
        return self.artefact.inputs.mean(self.encoded_inputs(attributes))

    def encoded_inputs(self, attributes: pd.DataFrame) -> Array:
        """What the oracle sees of attribute rows of inputs that no event is known of, (n, p)."""
        return _encoded(self.artefact.input_encoder, attributes, self.artefact.input_implicit)

    def features_of_new(self, attributes: pd.DataFrame) -> Features:
        """Features of inputs that no event is known of, from their attribute rows: g(z) with the residuals' covariance."""
        return self.features_about(self.input_basis(attributes))

    def features_about(self, mean: Array) -> Features:
        """Features of inputs of which an oracle's prediction (n, d) is all that is known."""
        covariance = np.tile(gaussian.pack(self.artefact.inputs.covariance), (len(mean), 1))
        return Features.of(mean, covariance, self.mu)

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

    def user_weights(self, a: Array, b: Array, prior_mean: Array) -> Array:
        """The means of :meth:`user_posteriors` alone, (n, d)."""
        return self.artefact.users.conditional_mean(a, b, prior_mean, self.noise)

    def weights_without_events(self, prior_mean: Array) -> Array:
        """Means of the weights of users without events, (n, d): the prior's, but for the zeros that all users have."""
        n, d = prior_mean.shape
        return self.user_weights(np.zeros((n, gaussian.packed_length(d))), np.zeros((n, d)), prior_mean)


def _encoded(encoder: InputEncoder, attributes: pd.DataFrame, implicit: int) -> Array:
    z = encoder(attributes)
    return np.column_stack([z, np.zeros((len(z), implicit))])


def model_of(row: Mapping[str, Any]) -> Model:
    """The model of a row of the models table; its artefact is unpickled, so take only rows that you trust.

    Raises:
        StateError: it was made with a package that is not installed here.
    """
    try:
        artefact = cloudpickle.loads(row[schema.ARTEFACT])
    except ModuleNotFoundError as error:
        raise StateError(
            f"model version {row[schema.MODEL_VERSION]} needs {error.name}, which is not installed"
        ) from error
    return Model(
        version=row[schema.MODEL_VERSION],
        status=row[schema.STATUS],
        form=Form(row[schema.K], tuple(row[schema.INPUT_COLUMNS]), tuple(row[schema.USER_COLUMNS])),
        loss=row[schema.LOSS],
        mu=row[schema.MU],
        noise=row[schema.NOISE],
        label_min=row[schema.LABEL_MIN],
        label_max=row[schema.LABEL_MAX],
        events_version=row[schema.EVENTS_VERSION],
        inputs_version=row[schema.INPUTS_VERSION],
        artefact=artefact,
        half_life_days=row[schema.HALF_LIFE_DAYS],
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
        schema.MU: model.mu,
        schema.NOISE: model.noise,
        schema.LABEL_MIN: model.label_min,
        schema.LABEL_MAX: model.label_max,
        schema.PRIOR_COVARIANCE: gaussian.pack(model.artefact.users.covariance).tolist(),
        schema.ARTEFACT: cloudpickle.dumps(model.artefact),
        schema.EVENTS_VERSION: model.events_version,
        schema.INPUTS_VERSION: model.inputs_version,
        schema.N_EVENTS: n_events,
        schema.HALF_LIFE_DAYS: model.half_life_days,
        schema.OBJECTIVE: list(objective),
        schema.METRICS: json.dumps(metrics),
        schema.SETTINGS: settings.model_dump_json(),
    }
