"""What a training begins from when there is an earlier version: its features, and how uncertain vectors were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import blocks, gaussian, schema
from mtl.arrow import matrix
from mtl.blocks import EventBlock
from mtl.catalogue import Catalogue
from mtl.earlier import Evidence
from mtl.effects import part_of
from mtl.errors import ConfigError
from mtl.features import from_rows, residuals
from mtl.forms import Form, Given
from mtl.gaussian import Array, Posterior
from mtl.losses import LOSSES
from mtl.model import Model
from mtl.prior import VectorPrior
from mtl.schema import INPUT_ID
from mtl.userstep import Known
from mtl.working import settle

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Live:
    """An earlier version that a training begins from, or keeps a part of."""

    model: Model
    features: DataFrame  # its rows
    batches: DataFrame | None = None  # whose events it was trained on, where a training is on later ones alone

    def implicit(self, ids: pa.Array) -> Array:
        """The attributes that its training events were, of inputs; 0 for one that it has no features of."""
        rows, width = self.features.toArrow(), self.model.artefact.input_implicit
        found = np.vstack([matrix(rows[schema.IMPLICIT], width), np.zeros(width)])
        return found[blocks.index_of(ids, rows[INPUT_ID].combine_chunks())]

    def known(self, catalogue: Catalogue, form: Form, mu: float, described: np.ndarray, complete: bool) -> Known | None:
        """Its features as vectors to start from; None where its form is another.

        Args:
            described: attributes of all inputs of the catalogue in its own encoding, used where the start is to be
                ``complete``: an input without features then has what its oracle says.
        """
        if self.model.form != form:
            log.info("retrain: the live version has another form: a cold start")
            return None
        rows = self.features.toArrow()
        places = blocks.index_of(rows[INPUT_ID], catalogue.ids)
        order = np.argsort(places)
        order = order[places[order] >= 0]
        known = Posterior(*(part[order] for part in from_rows(rows, form.d).vectors(mu)))
        if not complete:
            return Known(places[order], known)
        prior = self.model.artefact.inputs
        n = len(described)
        covariance = np.tile(gaussian.pack(prior.covariance), (n, 1))
        vectors = Posterior(prior.mean(described), covariance, np.full(n, np.nan))
        for values, of_known in zip(vectors, known, strict=True):
            values[places[order]] = of_known
        return Known(np.arange(n), vectors)

    def of_inputs(self, ids: pa.Array, mu: float) -> Evidence:
        """What its training events said of the inputs ``ids``.

        Raises:
            ConfigError: its inputs are known exactly, by an oracle without residual.
        """
        form, prior = self.model.form, self.model.artefact.inputs
        rows = self.features.where(F.col(schema.N_EVENTS).isNull()).toArrow()  # arrivals have later events alone
        places = blocks.index_of(rows[INPUT_ID], ids)
        rows, places = rows.filter(pa.array(places >= 0)), places[places >= 0]
        vectors = from_rows(rows, form.d).vectors(mu)
        try:
            of_rows = Evidence.of(vectors, vectors.mean - residuals(rows, form.d), prior.covariance, form.inputs)
        except np.linalg.LinAlgError:
            raise ConfigError(
                "train.incremental needs a live version whose inputs have residuals (oracle.residual)"
            ) from None
        found = Evidence.none(len(ids), form.d)
        found.precision[places], found.information[places] = of_rows.precision, of_rows.information
        return found

    def of_users(self, ids: pa.Array) -> Callable[[EventBlock], EventBlock]:
        """Gives a block, which numbers the inputs as ``ids`` does, what its earlier events said of its users.

        That is by this version's features, whatever they are in training.
        """
        rows = self.features.toArrow()
        places = blocks.index_of(ids, rows[INPUT_ID].combine_chunks())
        features, model = from_rows(rows, self.model.d), self.model

        def with_evidence(block: EventBlock) -> EventBlock:
            of, loss = block.of_role(blocks.EARLIER), LOSSES[model.loss]
            found, prior_mean = Evidence.none(len(block), model.d), model.prior_mean_of_unknown
            for users in of.parts():
                posteriors = partial(
                    model.user_posteriors, prior_mean=np.tile(prior_mean, (users.stop - users.start, 1))
                )
                a, b = settle(
                    of.weight_matrix[users],
                    of.label_matrix[users],
                    features.take(places[of.inputs]),
                    posteriors,
                    loss,
                    offsets=part_of(of.offsets(()), of.entries(users)),
                )
                found.precision[users], found.information[users] = a / model.noise, b / model.noise
            return replace(block, earlier_precision=found.precision, earlier_information=found.information)

        return with_evidence


def from_covariance(prior: VectorPrior, covariance: Array, given: Given) -> VectorPrior:
    """``prior`` begun from an earlier version's covariance (d, d), where both have one."""
    learnt = covariance[np.ix_(given.learnt, given.learnt)]
    return replace(prior, covariance=learnt) if prior.covariance.any() and learnt.any() else prior  # type: ignore[type-var]
