"""Oracles: the black boxes that fit a basis function. Each is given attributes, a target and a weight, and nothing else."""

from __future__ import annotations

from mtl.basis import Oracle
from mtl.config import OracleSettings
from mtl.errors import ConfigError
from mtl.oracle.imports import load_object
from mtl.oracle.linear import fit_ridge
from mtl.oracle.scikit import scikit_oracle
from mtl.oracle.spark import spark_oracle


def make_oracle(settings: OracleSettings) -> Oracle | None:
    """The configured oracle; None where the basis is linear with residuals, which is solved in closed form jointly.

    Raises:
        ConfigError: the factory is missing, cannot be imported, or refuses its parameters.
    """
    if settings.kind in ("identity", "linear"):
        if settings.factory:
            raise ConfigError(f"oracle.factory is for oracle.kind sklearn or spark, not {settings.kind}")
        if settings.kind == "identity" and not settings.residual:
            raise ConfigError("oracle.kind identity is a free value per input: it needs oracle.residual = true")
        return None if settings.residual else fit_ridge
    if not settings.factory:
        raise ConfigError(f'oracle.kind {settings.kind} needs oracle.factory, such as "sklearn.linear_model:Ridge"')
    factory = load_object("oracle.factory", settings.factory)
    if not callable(factory):
        raise ConfigError(f"oracle.factory = {settings.factory!r} is no class of estimators")
    make = scikit_oracle if settings.kind == "sklearn" else spark_oracle
    return make(factory, settings.params)
