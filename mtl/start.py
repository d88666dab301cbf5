"""What a training begins from when there is an earlier version: its features, and how uncertain vectors were."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from mtl import blocks, gaussian, schema
from mtl.arrow import matrix
from mtl.catalogue import Catalogue
from mtl.features import from_rows
from mtl.forms import Form, Given
from mtl.gaussian import Array, Posterior
from mtl.model import Model
from mtl.prior import VectorPrior
from mtl.schema import INPUT_ID
from mtl.userstep import Known

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Live:
    """An earlier version that a training begins from, or keeps a part of."""

    model: Model
    features: DataFrame  # its rows

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


def from_covariance(prior: VectorPrior, covariance: Array, given: Given) -> VectorPrior:
    """``prior`` begun from an earlier version's covariance (d, d), where both have one."""
    learnt = covariance[np.ix_(given.learnt, given.learnt)]
    return replace(prior, covariance=learnt) if prior.covariance.any() and learnt.any() else prior  # type: ignore[type-var]
