"""What tasks share of the driver's, in a session with a context of its own and in one over Spark Connect, which has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class Shared(Protocol):
    """A value for tasks; a function that they run may close over it."""

    @property
    def value(self) -> Any: ...

    def destroy(self) -> None: ...


@dataclass(frozen=True)
class _Carried:
    """A value that travels with every function that closes over it."""

    value: Any

    def destroy(self) -> None:
        pass


def is_remote(spark: SparkSession) -> bool:
    """Whether the session is one of Spark Connect."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def share(spark: SparkSession, value: Any) -> Shared:
    """A broadcast; over Spark Connect, the value in the function's own pickle, which has to fit a message (128 MB)."""
    return _Carried(value) if is_remote(spark) else spark.sparkContext.broadcast(value)


def cores(spark: SparkSession) -> int:
    """How many tasks run at once; over Spark Connect, where nobody says, the partitions of a shuffle."""
    return (
        int(spark.conf.get("spark.sql.shuffle.partitions"))
        if is_remote(spark)
        else spark.sparkContext.defaultParallelism
    )
