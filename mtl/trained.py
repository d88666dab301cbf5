"""A fitted model and the rows that a version of it is written as: the model's own, of inputs, and of users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import gaussian, schema
from mtl.arrow import lists
from mtl.blocks import CAPPED, EARLIER, HELD_OUT, EventBlock
from mtl.catalogue import Catalogue
from mtl.distributed import DistributedEngine
from mtl.effects import Effects, part_of
from mtl.encode import Encoder, InputEncoder
from mtl.engine import SparkEngine
from mtl.features import Features, feature_rows
from mtl.forms import Form
from mtl.gaussian import Posterior
from mtl.layout import SCHEMAS
from mtl.losses import Loss
from mtl.model import Artefact, Model
from mtl.schema import USER_ID
from mtl.sharing import share
from mtl.train import Fit
from mtl.working import settle

_ROUNDING = 1e-6  # of a prior's standard deviation


@dataclass(frozen=True)
class Trained:
    """A fitted model with all that its rows are written from; close its ``engine`` when they are."""

    engine: SparkEngine | DistributedEngine
    fit: Fit
    form: Form
    loss: Loss
    mu: float  # μ, what h is centred on
    catalogue: Catalogue
    user_encoder: Encoder
    input_encoder: InputEncoder
    user_implicit: int
    input_implicit: int
    half_life_days: float = 0.0
    last: DataFrame | None = None  # (user_id, reference_time) where old events are forgotten

    @cached_property
    def effects(self) -> Effects:
        return tuple(effect.learnt() for effect in self.engine.effects)

    @property
    def report(self) -> dict[str, Any]:
        """What there is to say of it in one line."""
        fit, catalogue = self.fit, self.catalogue
        return {
            "rows": catalogue.n_events,
            "rows_trained": catalogue.rows_trained,
            "inputs": len(catalogue.ids),
            "k": self.form.k,
            "noise": fit.noise,
            "iterations": fit.iterations,
            "damped_iterations": fit.damped,
            **fit.inputs.counts,
        }

    def model(self, version: int, status: str, events_version: int, inputs_version: int) -> Model:
        fit, catalogue = self.fit, self.catalogue
        return Model(
            version=version,
            status=status,
            form=self.form,
            loss=self.loss.name,
            mu=self.mu,
            noise=fit.noise,
            label_min=catalogue.label_min,
            label_max=catalogue.label_max,
            events_version=events_version,
            inputs_version=inputs_version,
            artefact=Artefact(
                self.user_encoder,
                self.input_encoder,
                self.user_implicit,
                self.input_implicit,
                fit.users,
                fit.inputs,
                self.effects,
            ),
            half_life_days=self.half_life_days,
        )

    def feature_rows(self, version: int) -> DataFrame:
        """Rows of the features table."""
        width = self.input_implicit
        shared = share(self.engine.rows.sparkSession, (self.catalogue.ids, self.catalogue.counts == 0))
        mu, prior = self.mu, self.fit.inputs

        def of_inputs(first: int, inputs: Posterior, attributes: np.ndarray) -> pa.Table:
            here = slice(first, first + len(attributes))
            ids, without_events = shared.value
            oracle, implicit = prior.mean(attributes), attributes[:, attributes.shape[1] - width :]
            arrived = without_events[here] & _is_as_given(inputs, oracle, prior.covariance)
            mean, covariance = inputs.mean.copy(), inputs.covariance.copy()
            mean[arrived], covariance[arrived] = oracle[arrived], gaussian.pack(prior.covariance)  # without rounding
            features = Features.of(mean, covariance, mu)
            return feature_rows(version, ids[here], features, mean - oracle, implicit, arrived)

        return self.engine.feature_rows(of_inputs, _ddl(schema.FEATURES))

    def user_rows(self, version: int) -> DataFrame:
        """Rows of the users table, from one more pass over the events under the final features."""
        arguments = (self.fit.users, self.fit.noise, self.loss, self.effects, version)
        users = self.engine.user_rows(_users_of_block, arguments, _ddl(schema.USERS, without=schema.REFERENCE_TIME))
        if self.last is None:
            return users.withColumn(schema.REFERENCE_TIME, F.lit(None).cast("timestamp"))
        return users.join(self.last, USER_ID, "left")


def _is_as_given(vectors: Posterior, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Of which vectors nothing is known beside their prior, (n,): no event, nor zeros, nor what an earlier version knew."""
    spread = np.sqrt(np.diag(covariance))
    is_mean = np.abs(vectors.mean - mean) <= _ROUNDING * spread
    sizes = gaussian.pack(np.outer(spread, spread))
    is_covariance = np.abs(vectors.covariance - gaussian.pack(covariance)) <= _ROUNDING * sizes
    return is_mean.all(1) & is_covariance.all(1)


def _users_of_block(block: EventBlock, features: Features, arguments: Any) -> Iterator[pa.Table]:
    """Sums and weights of the block's users under the final features."""
    prior, noise, loss, effects, version = arguments
    block = block.with_extra(HELD_OUT, CAPPED, EARLIER)
    offsets = block.offsets(effects)
    assert block.users is not None
    for part in block.parts():
        mean = prior.mean(block.attributes[part])
        posteriors = partial(prior.conditional, mean=mean, noise=noise)
        matrices = block.weight_matrix[part], block.label_matrix[part]
        of_part = part_of(offsets, block.entries(part))
        a, b = settle(*matrices, features, posteriors, loss, offsets=of_part)
        columns = {
            schema.MODEL_VERSION: pa.array(np.full(len(b), version)),
            schema.USER_ID: block.users[part],
            schema.A: lists(a),
            schema.B: lists(b),
            schema.W: lists(prior.conditional_mean(a, b, mean, noise)),
            schema.PRIOR_MEAN: lists(mean),
            schema.N_EVENTS: pa.array(block.n_events[part]),
        }
        yield pa.table(columns)


def _ddl(table: str, without: str = "") -> str:
    return ", ".join(f"{c.name} {c.dataType.simpleString()}" for c in SCHEMAS[table] if c.name != without)
