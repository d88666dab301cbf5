"""Oracles: the black boxes that fit a basis function. Each is given attributes, a target and a weight, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl.basis import Boosting, FitAll, Refitting, Strategy
from mtl.config import OracleSettings
from mtl.errors import ConfigError
from mtl.oracle.imports import load_object
from mtl.oracle.linear import fit_ridge
from mtl.regressors import Oracle
from mtl.sharing import cores

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Below it a refit in tasks takes longer: on 2 cores 5.3 s for 3.2 s with 2,000 rows, 10.0 for 9.9 with 50,000.
_WORTH_CORES = 4


def make_oracle(settings: OracleSettings) -> Oracle | None:
    """The configured oracle; None for the identity, whose free values are all residual.

    Raises:
        ConfigError: the factory is missing, cannot be imported, or refuses its parameters.
    """
    if settings.kind not in ("sklearn", "spark"):
        if settings.factory:
            raise ConfigError(f"oracle.factory is for oracle.kind sklearn or spark, not {settings.kind}")
        # Imported where they are wanted: a stored linear model must not cost its reader scikit-learn and pyspark.ml.
        if settings.kind in ("xgboost", "lightgbm"):
            from mtl.oracle.boosters import booster_oracle

            return booster_oracle(settings.kind, settings.params)
        if settings.kind == "identity" and not settings.residual:
            raise ConfigError("oracle.kind identity is a free value per input: it needs oracle.residual = true")
        return None if settings.kind == "identity" else fit_ridge
    if not settings.factory:
        raise ConfigError(f'oracle.kind {settings.kind} needs oracle.factory, such as "sklearn.linear_model:Ridge"')
    factory = load_object("oracle.factory", settings.factory)
    if not callable(factory):
        raise ConfigError(f"oracle.factory = {settings.factory!r} is no class of estimators")
    if settings.kind == "sklearn":
        from mtl.oracle.scikit import scikit_oracle as make
    else:
        from mtl.oracle.spark import spark_oracle as make
    return make(factory, settings.params)


def make_strategy(algorithm: str, settings: OracleSettings) -> Strategy:
    """What ``train.algorithm`` does with the oracle.

    Raises:
        ConfigError: there is no oracle to boost.
    """
    if algorithm != "boosted":
        return Refitting()
    if settings.kind == "identity":
        raise ConfigError("train.algorithm boosted adds up what an oracle fits: oracle.kind identity has none")
    return Boosting(settings.shrinkage)


def make_fit_all(settings: OracleSettings, spark: SparkSession) -> FitAll | None:
    """Basis functions fitted at once as Spark tasks, where ``oracle.parallel`` wants it; None: one after the other.

    Raises:
        ConfigError: the oracle is not one that is fitted on one machine.
    """
    if settings.kind in ("identity", "spark"):
        if settings.parallel is True:
            raise ConfigError(f"oracle.parallel is for oracles fitted on one machine, not oracle.kind {settings.kind}")
        return None
    few = settings.kind == "linear" or cores(spark) < _WORTH_CORES
    if not settings.parallel or (settings.parallel == "auto" and few):
        return None
    from mtl.oracle.parallel import SparkFits

    return SparkFits(spark)
