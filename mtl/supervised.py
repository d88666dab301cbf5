"""Supervised features: known labels of inputs as basis functions, f_i(x) = P(label i | the other attributes of x).

Side information such as a topic or a genre is often known of most inputs and missing for the new ones. A classifier a label,
trained on the inputs that have it, makes a function of it that every input has; users then have a weight on each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mtl.config import SupervisedSettings
from mtl.encode import InputEncoder, categories
from mtl.errors import ConfigError, OracleError
from mtl.gaussian import Array
from mtl.oracle.imports import load_object

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Label:
    """One category of a label column, and which inputs have it."""

    name: str  # "genres=Drama"
    known: np.ndarray  # (n,): inputs of which it is known whether they have it
    holds: np.ndarray  # (n,), False where it is not known


@dataclass(frozen=True)
class Supervised:
    """Input attribute rows → (n, p + m): the ``encoder``'s columns, then the m labels' probabilities given these, centred.

    The probabilities are the same function of the attributes for every input, those that the classifiers were trained on
    included: what is told of an input itself is not among its features. An input without attributes is the average one.
    """

    encoder: InputEncoder  # of the attributes that are no labels
    names: tuple[str, ...]  # of the labels, (m,)
    classifiers: tuple[Any, ...]
    centre: Array  # (m,)

    @classmethod
    def fit(cls, frame: pd.DataFrame, encoder: InputEncoder, settings: SupervisedSettings) -> Supervised:
        """Train a classifier a label on the inputs of which it is known.

        Args:
            frame: attributes of all inputs, the label columns among them.
            encoder: fitted on the others.

        Raises:
            ConfigError: the classifier cannot be made or gives no probabilities, there is nothing to predict labels from,
                or none that can be learnt.
            OracleError: the classifier raised, or its probabilities are none.
        """
        make = _factory(settings)
        if encoder.width == 1:
            raise ConfigError("supervised.labels: there are no other attributes of inputs to predict them from")
        z = encoder(frame)
        labels = choose_labels(frame, settings)
        if not labels:
            raise ConfigError(
                f"supervised.labels = {settings.labels}: no label occurs in {settings.min_count} inputs or more "
                "(supervised.min_count) and is missing in another"
            )
        classifiers = []
        for label in labels:
            try:
                classifiers.append(make().fit(z[label.known, 1:], label.holds[label.known]))
            except Exception as error:
                raise OracleError(
                    f"the classifier of {label.name} cannot be trained ({type(error).__name__}: {error})"
                ) from error
        log.info("retrain: %d classifiers, %s", len(labels), ", ".join(label.name for label in labels))
        unfinished = cls(encoder, tuple(label.name for label in labels), tuple(classifiers), np.zeros(len(labels)))
        known = z[:, 1:].any(axis=1)
        centre = unfinished.probabilities(z[known] if known.any() else z).mean(0)
        return cls(encoder, unfinished.names, unfinished.classifiers, centre)

    @property
    def width(self) -> int:
        return self.encoder.width + len(self.names)

    @property
    def predicted(self) -> tuple[int, ...]:
        """Places of the probabilities."""
        return tuple(range(self.encoder.width, self.width))

    def linear(self, setting: str, names: Sequence[str]) -> tuple[int, ...]:
        """Places of the attributes that are no labels, see :meth:`mtl.encode.Encoder.linear`."""
        return self.encoder.linear(setting, names)

    def __call__(self, frame: pd.DataFrame) -> Array:
        z = self.encoder(frame)
        centred = np.zeros((len(z), len(self.names)))
        known = z[:, 1:].any(axis=1)
        if known.any():
            centred[known] = self.probabilities(z[known]) - self.centre
        return np.column_stack([z, centred])

    def probabilities(self, z: Array) -> Array:
        """P(label | encoded attributes) of n inputs, at least one: (n, p) → (n, m)."""
        return np.column_stack([_probability(f, name, z) for f, name in zip(self.classifiers, self.names, strict=True)])


def choose_labels(frame: pd.DataFrame, settings: SupervisedSettings) -> list[Label]:
    """The labels worth a classifier: the most frequent that enough inputs have, and not all.

    Raises:
        ConfigError: there is no such column.
    """
    found = [label for name in dict.fromkeys(settings.labels) for label in _labels_of(frame, name, settings)]
    return sorted(found, key=lambda label: -label.holds.sum())[: settings.max_labels]


def _labels_of(frame: pd.DataFrame, name: str, settings: SupervisedSettings) -> Iterator[Label]:
    if name not in frame.columns:
        raise ConfigError(
            f"supervised.labels: there is no attribute {name!r}; there are {', '.join(map(str, frame.columns)) or 'none'}"
        )
    known = frame[name].notna().to_numpy()
    first = next(iter(frame[name][known]), None)
    many = isinstance(first, (list, tuple, np.ndarray))
    rows = [frozenset(row) for row in categories(frame[name], many)]
    counts: Counter[Hashable] = Counter(category for row in rows for category in row)
    wanted = sorted(counts, key=lambda category: (-counts[category], str(category)))
    if len(wanted) == 2 and not many:
        wanted = wanted[1:]  # the other is the rest
    wanted = [category for category in wanted if settings.min_count <= counts[category] < known.sum()]
    for category in wanted[: settings.max_labels]:
        yield Label(f"{name}={category}", known, np.array([category in row for row in rows], bool))


def _factory(settings: SupervisedSettings) -> Any:
    """Makes one untrained classifier a call."""
    key, path = "supervised.classifier", settings.classifier
    factory = load_object(key, path)
    if not callable(factory):
        raise ConfigError(f"{key} = {path!r} is no class of classifiers")
    try:
        classifier = factory(**settings.params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"supervised.params do not fit {path}: {error}") from None
    if not (hasattr(classifier, "fit") and hasattr(classifier, "predict_proba")):
        raise ConfigError(f"{key} = {path!r} is no classifier with fit and predict_proba")
    return lambda: factory(**settings.params)


def _probability(classifier: Any, name: str, z: Array) -> Array:
    """P(the label holds) of n inputs, (n,)."""
    try:
        both = np.asarray(classifier.predict_proba(z[:, 1:]), float)
    except Exception as error:
        raise OracleError(f"the classifier of {name} cannot predict ({type(error).__name__}: {error})") from error
    if both.shape != (len(z), 2):
        raise OracleError(f"the classifier of {name} gave shape {both.shape} for {len(z)} rows: two columns are wanted")
    p = both[:, 1]  # columns are in the order of the classes: False, True
    if not (np.isfinite(p).all() and (np.abs(p - 0.5) <= 0.5 + 1e-9).all()):
        raise OracleError(f"the classifier of {name} gave values that are no probabilities")
    return p
