"""DataFrames of one's own as ids and attributes: what the estimator and the model of :mod:`mtl.ml` have in common."""

from __future__ import annotations

from typing import Any, TypeVar

from pyspark.ml.param import Param
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.attributes import attribute
from mtl.errors import InputError
from mtl.params import Columns, Saved
from mtl.parse import text_id
from mtl.read import quoted
from mtl.schema import INPUT_ID, USER_ID

D = TypeVar("D", bound="Described")

_COUNT = "_mtl_count"  # beside attributes of any name


class Described(Columns, Saved):
    """Attributes of users and items beside the events, as DataFrames: carried by copies, saved with the instance."""

    _itemAttributes: DataFrame | None = None
    _userAttributes: DataFrame | None = None

    def setItemAttributes(self: D, dataset: DataFrame | None) -> D:
        """Sets the attributes of items: a column ``itemCol`` and any others, one row an item."""
        self._itemAttributes = dataset
        return self

    def setUserAttributes(self: D, dataset: DataFrame | None) -> D:
        """Sets the attributes of users: a column ``userCol`` and any others, one row a user."""
        self._userAttributes = dataset
        return self

    def _item_attributes(self) -> DataFrame | None:
        return None if self._itemAttributes is None else self._attributes(self._itemAttributes, self.itemCol, INPUT_ID)

    def _user_attributes(self) -> DataFrame | None:
        return None if self._userAttributes is None else self._attributes(self._userAttributes, self.userCol, USER_ID)

    def _attributes(self, dataset: DataFrame, param: Param[str], key: str) -> DataFrame:
        """Rows as the tables of attributes have them: ``key`` and attributes."""
        identity, kind = self._column(dataset, param)
        lower = [name.lower() for name in dataset.columns]
        if alike := [name for name in dataset.columns if lower.count(name.lower()) > 1]:
            raise InputError(
                f"attributes by {param.name}: columns {', '.join(alike)} have the same name but for its case"
            )
        values = [
            attribute(quoted(field.name), field.dataType, f"attributes by {param.name}: column {field.name}").alias(
                field.name
            )
            for field in dataset.schema
            if field.name != identity
        ]
        if key in dataset.columns and identity != key:
            raise InputError(f"attributes by {param.name}: call the column {key!r} anything else, that name is ours")
        rows = dataset.select(text_id(quoted(identity), kind).alias(key), *values)
        twice = (
            rows.groupBy(key).agg(F.count("*").alias(_COUNT)).where((F.col(_COUNT) > 1) | F.col(key).isNull()).head()
        )
        if twice:
            raise InputError(
                f"attributes by {param.name}: {twice[_COUNT]} rows of {identity} = {twice[key]}; one row an id is wanted"
            )
        return rows

    def _column(self, dataset: DataFrame, param: Param[str]) -> tuple[str, T.DataType]:
        """Name and type of the column that ``param`` names.

        Raises:
            InputError: there is none, or one that cannot hold ids.
        """
        name = self.getOrDefault(param)
        return name, self._kind(dataset, name, param.name)

    def _kind(self, dataset: DataFrame, name: str, param: str) -> T.DataType:
        """Type of a column that a Param names."""
        if dataset.columns.count(name) != 1:
            raise InputError(
                f"the DataFrame has {dataset.columns.count(name) or 'no'} columns {name!r} ({param}); it has "
                f"{', '.join(dataset.columns)}"
            )
        kind = dataset.schema[name].dataType
        if not isinstance(kind, T.AtomicType) or isinstance(kind, T.BinaryType):
            raise InputError(f"column {name!r} ({param}) has the type {kind.simpleString()}, not an atomic one")
        return kind

    def _frames(self) -> dict[str, DataFrame]:
        frames = {"itemAttributes": self._itemAttributes, "userAttributes": self._userAttributes}
        return {name: frame for name, frame in frames.items() if frame is not None}

    def _restore(self, frames: dict[str, DataFrame], metadata: dict[str, Any]) -> None:
        self._itemAttributes, self._userAttributes = frames.get("itemAttributes"), frames.get("userAttributes")
