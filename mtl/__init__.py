"""oracle-mtl: personalized models on Spark and Delta Lake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl.ml import OracleMTL, OracleMTLModel

__version__ = "0.1.0"
__all__ = ["OracleMTL", "OracleMTLModel"]


def __getattr__(name: str) -> Any:
    # pyspark.ml takes a second to import, which workers and the pure modules do not need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtl import ml

    return getattr(ml, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
