"""Oracles: the black boxes that fit a basis function. Each is given attributes, a target and a weight, and nothing else."""

from __future__ import annotations

from mtl.basis import Oracle
from mtl.config import OracleSettings
from mtl.errors import ConfigError
from mtl.oracle.imports import load_object
from mtl.oracle.linear import fit_ridge


def make_oracle(settings: OracleSettings) -> Oracle | None:
    """The configured oracle; None for the identity, whose free values are all residual.

    Raises:
        ConfigError: the factory is missing, cannot be imported, or refuses its parameters.
    """
    if settings.kind in ("identity", "linear"):
        if settings.factory:
            raise ConfigError(f"oracle.factory is for oracle.kind sklearn or spark, not {settings.kind}")
        if settings.kind == "identity" and not settings.residual:
            raise ConfigError("oracle.kind identity is a free value per input: it needs oracle.residual = true")
        return None if settings.kind == "identity" else fit_ridge
    if not settings.factory:
        raise ConfigError(f'oracle.kind {settings.kind} needs oracle.factory, such as "sklearn.linear_model:Ridge"')
    factory = load_object("oracle.factory", settings.factory)
    if not callable(factory):
        raise ConfigError(f"oracle.factory = {settings.factory!r} is no class of estimators")
    # Imported where it is wanted: a stored linear model must not cost its reader scikit-learn and pyspark.ml.
    if settings.kind == "sklearn":
        from mtl.oracle.scikit import scikit_oracle as make
    else:
        from mtl.oracle.spark import spark_oracle as make
    return make(factory, settings.params)
