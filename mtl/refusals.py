"""What a training refuses before it begins: settings that contradict each other, and labels that tell nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl.config import Settings
from mtl.errors import ConfigError, StateError
from mtl.losses import Loss

if TYPE_CHECKING:
    from mtl.catalogue import Catalogue  # whose modules import pyspark
    from mtl.start import Live

# Of the labels' squared mean: of a variance below it sums of squares in double precision have few digits.
_LEAST_SPREAD = 1e-11


def refuse_contradictions(settings: Settings, live: Live | None) -> None:
    """Settings that do not go together, or not with the live version of which a part is kept.

    Raises:
        ConfigError: names the settings.
    """
    model = settings.model
    if model.implicit_weight:
        if model.loss != "squared":
            raise ConfigError(f'model.implicit_weight is for model.loss = "squared", not {model.loss}')
        for name in ("holdout", "max_events_per_user"):
            if getattr(settings.train, name):
                raise ConfigError(
                    f"model.implicit_weight: set train.{name} = 0, for an event left out would count as a zero"
                )
        if model.half_life_days:
            raise ConfigError("model.half_life_days: set model.implicit_weight = 0, for zeros have no time to age from")
        if model.contexts:
            raise ConfigError("model.contexts: set model.implicit_weight = 0, for zeros have no context")
    sees_attributes = settings.oracle.kind != "identity" or settings.oracle.pipeline
    if not sees_attributes and (model.per_user or model.form == "multilevel"):
        raise ConfigError(
            'oracle.kind "identity" sees no attributes of inputs, which model.per_user and model.form = "multilevel" take: '
            "set another"
        )
    if settings.train.holdout and settings.train.iterations != "auto":
        raise ConfigError('train.holdout chooses the number of iterations: set train.iterations = "auto"')
    if live and model.loss != live.model.loss and (settings.train.lock or live.batches is not None):
        kept = "train.lock" if settings.train.lock else "train.incremental"
        raise ConfigError(f"{kept}: the live version's model.loss is {live.model.loss}, not {model.loss}")
    if live and live.batches is not None:
        for name in ("contexts", "implicit_weight", "half_life_days"):
            if getattr(model, name):
                raise ConfigError(f"train.incremental does not go with model.{name}")
        for name, had in (("half_life_days", live.model.half_life_days), ("contexts", live.model.contexts)):
            if had:
                raise ConfigError(
                    f"train.incremental: the live version has model.{name}, of which nothing would be left: train on all events"
                )
        if settings.train.lock:
            raise ConfigError("train.incremental: set train.lock = [], for locked parts learn nothing")


def refuse_labels(catalogue: Catalogue, loss: Loss, beside_zeros: bool) -> None:
    """Labels from which there is nothing to learn, or of which sums of squares would tell nothing.

    Raises:
        StateError: says which.
    """
    n, label, mean = catalogue.n_events, catalogue.label_max, catalogue.mean_label
    offers_rates = loss.name == "poisson" and catalogue.has_offsets and label > 0
    if label == catalogue.label_min and not (beside_zeros and label) and not offers_rates:
        raise StateError(f"all {n} events have the label {label:g}: there is nothing to learn")
    if loss.is_quadratic and not beside_zeros and catalogue.spread <= _LEAST_SPREAD * mean**2:
        raise StateError(
            f"labels of {catalogue.label_min:.12g} to {label:.12g} differ by too little beside their size for sums of their "
            f"squares to tell: subtract a constant, such as {mean:.6g}, before they are ingested"
        )
