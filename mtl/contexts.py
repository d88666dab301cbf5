"""The contexts of events in tables and Arrow batches: their values, and the events' offsets by them (:mod:`mtl.effects`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from mtl.blocks import index_of
from mtl.effects import Effect, Effects, Offsets, together
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.parse import check_contexts
from mtl.schema import CONTEXT, OFFSET

COLUMN = "_mtl_context_"  # begins the names of columns of values


def columns_of(events: DataFrame, names: Sequence[str]) -> list[Column]:
    """The values of the contexts ``names`` of events, as columns that :func:`offsets_of` finds."""
    context = F.col(CONTEXT) if CONTEXT in events.columns else F.lit(None).cast("string")
    return [F.get_json_object(context, f"$['{name}']").alias(COLUMN + name) for name in names]


def without_columns(rows: DataFrame, names: Sequence[str]) -> DataFrame:
    return rows.drop(*(COLUMN + name for name in names))


def start(events: DataFrame, names: Sequence[str], spread: float) -> Effects:
    """Effects of all values that there are, before anything is learnt of an h of this variance.

    The values pass through the driver.

    Raises:
        ConfigError: no event has a value of one of the contexts, or it has another column's name.
    """
    check_contexts(names)
    found = []
    for name, column in zip(names, columns_of(events, names), strict=True):
        values = events.select(column.alias("v")).distinct().where(F.col("v").isNotNull()).toArrow()["v"]
        if not len(values):
            raise ConfigError(
                f"model.contexts: no event has a value of {name}: ingest events, with this setting, from files with a column "
                "of that name"
            )
        found.append(Effect.start(name, values.combine_chunks().sort(), spread))
    return tuple(found)


def codes_of(events: pa.Table, effects: Effects) -> np.ndarray | None:
    """Place of each event's value among those of each effect, −1 where it is not there: (n, effects)."""
    codes = [index_of(events[COLUMN + effect.name], effect.values) for effect in effects]
    return np.stack(codes, 1).astype(np.int32) if codes else None


def given_offsets(events: pa.Table) -> Array | None:
    """The offsets that the events came with, (n,); None where none did."""
    if OFFSET not in events.column_names or events[OFFSET].null_count == len(events):
        return None
    return pc.fill_null(events[OFFSET], 0.0).to_numpy()


def offsets_of(events: pa.Table, effects: Effects) -> Offsets | None:
    """What is known of the events' h beside users and inputs; None where it is 0.

    Args:
        events: with a column ``offset``, where any has one, and the columns of :func:`columns_of`.
    """
    return together(given_offsets(events), codes_of(events, effects), effects)
