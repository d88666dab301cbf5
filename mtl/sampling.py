"""Which events the shared part is trained on; every user's own weights always see all of them.

Deterministic: an event's role is a function of its user's events, its batch and the settings, whatever the order or the
partitions.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from mtl.blocks import CAPPED, EARLIER, HELD_OUT, TRAINED
from mtl.schema import BATCH, EVENT_ID, EVENT_TIME, INPUT_ID, LABEL, USER_ID, WEIGHT

ROLE = "_role"
_EARLIER = "_earlier"

_GRAINS = 10_000


def with_roles(events: DataFrame, holdout: float, cap: int, earlier: DataFrame | None = None) -> DataFrame:
    """``events`` with a column of roles, where not all of them are trained on.

    Args:
        events: user_id, input_id and other columns, among them batch where there are earlier ones.
        holdout: fraction held out to measure the loss on, 0 for none.
        cap: events of one user at most that are trained on, 0 for all.
        earlier: the batches whose events an earlier version was trained on, where θ is trained on the others.
    """
    if earlier is not None:
        trained = F.broadcast(earlier.select(F.col(BATCH).alias(_EARLIER)).withColumn(ROLE, F.lit(EARLIER)))
        marked = events.join(trained, F.col(BATCH).eqNullSafe(F.col(_EARLIER)), "left").drop(_EARLIER)
        others = with_roles(marked.where(F.col(ROLE).isNull()).drop(ROLE), holdout, cap)
        others = others if ROLE in others.columns else others.withColumn(ROLE, F.lit(TRAINED))
        return others.unionByName(marked.where(F.col(ROLE).isNotNull()))
    if not holdout and not cap:
        return events
    pair = F.xxhash64(USER_ID, INPUT_ID)
    held = F.pmod(pair, F.lit(_GRAINS)) < holdout * _GRAINS
    role = F.when(held, HELD_OUT).otherwise(TRAINED)
    if cap:
        # Another hash, or the cap would favour what is not held out.
        order = F.xxhash64(INPUT_ID, USER_ID, F.lit(1))
        among = [name for name in (EVENT_ID, EVENT_TIME, LABEL, WEIGHT) if name in events.columns]  # of one input
        place = F.row_number().over(Window.partitionBy(USER_ID, held).orderBy(order, INPUT_ID, *among))
        role = F.when(~held & (place > cap), CAPPED).otherwise(role)
    return events.withColumn(ROLE, role)
