"""Attributes of users and inputs as numbers: encodings made from the column types.

| a column of | becomes |
|---|---|
| numbers | its standardized value and square, and an indicator where values are missing |
| categories (text of few distinct values) | one column a frequent category, one for the others |
| lists of categories | one column a frequent category, 1 where the list holds it |
| longer text | the leading singular vectors of its character trigrams (TF-IDF) |

The first encoded column is the constant 1; the others are centred over the rows with any value that the encoder was
fitted on, so 0 is the average and stands for a row of which nothing is known. Indicators keep their natural scale: a
rare category then has few observations against its prior, and is shrunk the more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from mtl.config import EncodeSettings
from mtl.errors import ConfigError, InputError
from mtl.gaussian import Array

# A text column is categories while it has few distinct values for its rows, or short ones.
_TEXT_DISTINCT = 0.5
_TEXT_WORDS = 3


class ColumnEncoder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def linear(self) -> int:
        """How many of its first columns are the attribute itself, and not a transformation of it."""

    def __call__(self, values: pd.Series) -> Array:
        """One column of n values → (n, m) numbers."""


class InputEncoder(Protocol):
    """Attribute rows of inputs as numbers, the first of them the constant 1."""

    @property
    def width(self) -> int: ...

    def linear(self, setting: str, names: Sequence[str]) -> tuple[int, ...]: ...

    def __call__(self, frame: pd.DataFrame, /) -> Array: ...


@dataclass(frozen=True)
class Number:
    """(value, value², missing) with values standardized first, so that the square is one about the mean.

    Two values need no square, nor an attribute that is missing nowhere its indicator.
    """

    name: str
    centre: float
    scale: float
    is_curved: bool
    may_miss: bool
    linear = 1

    @classmethod
    def fit(cls, name: str, values: pd.Series) -> Number:
        known = _numbers(values)
        known = known[np.isfinite(known)]
        scale = float(known.std()) if len(known) else 0.0
        centre = float(known.mean()) if len(known) else 0.0
        if scale <= 1e-12 * abs(centre):
            scale = 1.0  # a constant, whose deviation from its rounded mean is no scale
        return cls(name, centre, scale, len(np.unique(known)) > 2, len(known) < len(values))

    def __call__(self, values: pd.Series) -> Array:
        z = (_numbers(values) - self.centre) / self.scale
        missing = ~np.isfinite(z)
        z = np.where(missing, 0.0, np.clip(z, -10, 10))
        return np.column_stack([z, *([z**2] if self.is_curved else []), *([missing] if self.may_miss else [])])


@dataclass(frozen=True)
class Categories:
    """One indicator a known category, and one for all others; ``many`` where a value is a list of categories."""

    name: str
    known: tuple[Hashable, ...]
    many: bool

    @property
    def linear(self) -> int:
        return len(self.known) + 1

    @classmethod
    def fit(cls, name: str, values: pd.Series, many: bool, settings: EncodeSettings) -> Categories:
        counts = Counter(category for row in categories(values, many) for category in row)
        frequent = sorted(counts, key=lambda category: (-counts[category], str(category)))[: settings.max_categories]
        return cls(name, tuple(c for c in frequent if counts[c] >= settings.min_category_count), many)

    def __call__(self, values: pd.Series) -> Array:
        place = {category: j for j, category in enumerate(self.known)}
        encoded = np.zeros((len(values), len(place) + 1))
        for i, row in enumerate(categories(values, self.many)):
            for category in row:
                encoded[i, place.get(category, -1)] = 1.0
        return encoded


@dataclass(frozen=True)
class Text:
    """Singular vectors of the text's trigrams, of variance 1 on average, as numbers have: or a ridge would bear more on text."""

    name: str
    vectorizer: Any  # a fitted scikit-learn Pipeline
    scale: float

    @property
    def linear(self) -> int:
        return self.vectorizer[-1].n_components

    @classmethod
    def fit(cls, name: str, values: pd.Series, settings: EncodeSettings) -> Text:
        # scikit-learn takes a second to import, and most workers never need it.
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        trigrams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), max_features=50_000, sublinear_tf=True)
        weighted = trigrams.fit_transform(_texts(values))
        svd = TruncatedSVD(min(settings.text_dimensions, values.nunique() - 1, weighted.shape[1]), random_state=0)
        with np.errstate(invalid="ignore"):  # its own account of the variance, where all texts are alike
            variance = svd.fit_transform(weighted).var(0).mean()
        return cls(name, make_pipeline(trigrams, svd), float(np.sqrt(variance)) or 1.0)

    def __call__(self, values: pd.Series) -> Array:
        return self.vectorizer.transform(_texts(values)) / self.scale


@dataclass(frozen=True)
class Encoder:
    """Attribute rows → (n, p) float64: the constant 1, then the centred encodings."""

    columns: tuple[ColumnEncoder, ...]
    centre: Array  # (p − 1,)

    @classmethod
    def fit(cls, frame: pd.DataFrame, settings: EncodeSettings) -> Encoder:
        """Choose and fit an encoding for every column of ``frame`` (the key column left out by the caller)."""
        columns = tuple(_column(name, frame[name], settings) for name in frame.columns if frame[name].notna().any())
        return cls(columns, _side_by_side(columns, frame)[_known(columns, frame)].mean(0) if columns else np.empty(0))

    @property
    def width(self) -> int:
        """p, the constant included."""
        return 1 + len(self.centre)

    def linear(self, setting: str, names: Sequence[str]) -> tuple[int, ...]:
        """Places of the encoded columns of the attributes ``names`` (["*"]: all), their squares and indicators left out.

        Raises:
            ConfigError: there is no such attribute; ``setting`` is the key that names it.
        """
        known = [column.name for column in self.columns]
        if unknown := [name for name in names if name != "*" and name not in known]:
            raise ConfigError(
                f"{setting}: there is no attribute {unknown[0]!r}; there are {', '.join(known) or 'none'}"
            )
        first, places = 1, list[int]()
        for column in self.columns:
            if "*" in names or column.name in names:
                places += range(first, first + column.linear)
            first += column(pd.Series([None], dtype=object)).shape[1]
        return tuple(places)

    def __call__(self, frame: pd.DataFrame) -> Array:
        """Encode ``frame``; a column that it lacks counts as missing, and a row without any value is the average."""
        encoded = _side_by_side(self.columns, frame) - self.centre
        encoded[~_known(self.columns, frame)] = 0.0
        return np.column_stack([np.ones(len(frame)), encoded])


@dataclass(frozen=True)
class Activity:
    """Standardized log-count of training events as an attribute; 0, the average, where there are none to know it from."""

    centre: float
    scale: float

    @classmethod
    def fit(cls, total: float, total_of_squares: float, n: int) -> Activity:
        """From Σ log(1+count), its squares' sum and the number of those with events."""
        centre = total / max(n, 1)
        return cls(centre, float(np.sqrt(max(total_of_squares / max(n, 1) - centre**2, 0.0))) or 1.0)

    def __call__(self, counts: np.ndarray) -> Array:
        return np.where(counts > 0, (np.log1p(counts) - self.centre) / self.scale, 0.0)


def _column(name: str, values: pd.Series, settings: EncodeSettings) -> ColumnEncoder:
    known = values.dropna()
    first = known.iloc[0]
    if isinstance(first, (list, tuple, np.ndarray)):
        return Categories.fit(name, values, True, settings)
    if isinstance(first, str):
        words = known.str.split().str.len().mean()
        if words >= _TEXT_WORDS and known.nunique() > max(1, _TEXT_DISTINCT * len(known)):
            return Text.fit(name, values, settings)
        return Categories.fit(name, values, False, settings)
    return Number.fit(name, values)


def _side_by_side(columns: Sequence[ColumnEncoder], frame: pd.DataFrame) -> Array:
    missing = pd.Series([None] * len(frame), dtype=object)
    parts = [np.asarray(column(frame.get(column.name, missing)), float) for column in columns]
    return np.concatenate([np.empty((len(frame), 0)), *parts], axis=1)


def _known(columns: Sequence[ColumnEncoder], frame: pd.DataFrame) -> np.ndarray:
    """(n,): which rows have a value in any of the columns."""
    return frame.reindex(columns=[column.name for column in columns]).notna().any(axis=1).to_numpy()


def _numbers(values: pd.Series) -> Array:
    return pd.to_numeric(values, errors="coerce").to_numpy(float)


def categories(values: pd.Series, many: bool) -> Iterable[Iterable[Hashable]]:
    """The categories of each row, none where the value is missing."""
    one: Callable = (
        # A missing list is None in a column and NaN after a join.
        (
            lambda value: (
                () if value is None or isinstance(value, float) else (value,) if isinstance(value, str) else value
            )
        )
        if many
        else _only
    )
    return map(one, values)


def _only(value: Any) -> Iterable[Hashable]:
    if isinstance(value, (list, tuple, np.ndarray)):
        raise InputError(f"an attribute has a list, {value!r}, and was one text or number when the model was trained")
    return () if pd.isna(value) else (value,)


def _texts(values: pd.Series) -> pd.Series:
    return values.fillna("").astype(str)
