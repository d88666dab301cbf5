"""Forgetting: an event counts 2^(−age/H), its age being the time from it to the last event of its user.

Users' sums stay plain sums about a *reference time* r, the time of the last event in them:

    A(r) = Σ c 2^(−(r − t)/H) E[φφᵀ]        A(r′) = 2^(−(r′ − r)/H) A(r) + Σ over new events, r′ the later of r and theirs

and b likewise: the same after any batches in any order; a late event only counts less. Times are whole microseconds since 1970.
Nothing is forgotten while a user does nothing: only news makes old events old.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from mtl.errors import ConfigError, StateError
from mtl.gaussian import Array
from mtl.schema import EVENT_TIME, USER_ID, WEIGHT

COUNTED = "_counted"  # what an event counts, from 0 to 1
NEVER = np.iinfo(np.int64).min  # the reference time of a user without events

_DAY = 86_400_000_000  # microseconds


def age(
    row: NDArray[np.integer], time: NDArray[np.int64], before: NDArray[np.int64], half_life_days: float
) -> tuple[NDArray[np.int64], Array, Array]:
    """What m new events make of n users' reference times, of their sums until now, and of themselves.

    Args:
        row: which user each event is of, (m,).
        time: of each event, µs, (m,).
        before: reference times of the users, µs, (n,); :data:`NEVER` where there is none.

    Returns:
        Reference times after, (n,); the factors of the sums there were, (n,), and of the events, (m,).
    """
    after = before.copy()
    np.maximum.at(after, row, time)
    of_sums = _factors(after - np.where(before == NEVER, after, before), half_life_days)
    return after, of_sums, _factors(after[row] - time, half_life_days)


def micros(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Timestamps as whole microseconds, nulls as :data:`NEVER`."""
    return pc.fill_null(column.cast(pa.int64()), NEVER).to_numpy()


def timestamps(micros: NDArray[np.int64]) -> pa.Array:
    """The inverse of :func:`micros`."""
    return pa.array(micros, mask=micros == NEVER).cast(pa.timestamp("us", tz="UTC"))


def _factors(ages: NDArray[np.int64], half_life_days: float) -> Array:
    return np.exp2(-ages / (half_life_days * _DAY))


def with_ages(events: DataFrame, half_life_days: float) -> DataFrame:
    """Events for a training: each one's weight times what its age leaves of it, which is the column :data:`COUNTED`.

    Args:
        events: user_id, weight, event_time and other columns; all that there are of their users.

    Raises:
        ConfigError: events have no times at all.
        StateError: an event has none.
    """
    if EVENT_TIME not in events.columns:
        raise ConfigError("model.half_life_days needs a time of every event, and these events have none")
    n, user = events.where(F.col(EVENT_TIME).isNull()).agg(F.count("*"), F.first(USER_ID)).collect()[0]
    if n:
        raise StateError(
            f"model.half_life_days needs a time of every event: {n} have none, one of them of user {user}; give them an "
            "event_time with jobs/erase.py --correct, or set model.half_life_days = 0"
        )
    time = F.unix_micros(EVENT_TIME)
    ages = F.max(time).over(Window.partitionBy(USER_ID)) - time
    counted = F.pow(F.lit(2.0), -ages / F.lit(half_life_days * _DAY))
    return events.withColumn(COUNTED, counted).withColumn(WEIGHT, F.col(WEIGHT) * F.col(COUNTED))


def last_times(events: DataFrame, name: str) -> DataFrame:
    """(user_id, ``name``): the time of every user's last event."""
    return events.groupBy(USER_ID).agg(F.max(EVENT_TIME).alias(name))
