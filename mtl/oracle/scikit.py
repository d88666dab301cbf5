"""Any regressor of scikit-learn's kind as an oracle: fit(X, y, sample_weight=…), predict(X)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.regressors import Oracle, Regressor


def scikit_oracle(factory: Any, params: Mapping[str, Any]) -> Oracle:
    """An oracle that fits ``factory(**params)``, with weights scaled to mean 1.

    Raises:
        ConfigError: the factory refuses the parameters, or its fit takes no sample_weight.
    """
    try:
        regressor = factory(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"oracle.params do not fit {factory.__name__}: {error}") from None
    if not hasattr(regressor, "fit"):
        raise ConfigError(f"oracle.factory: {factory.__name__} has no fit(X, y, sample_weight=…)")
    fit_parameters = inspect.signature(regressor.fit).parameters
    if "sample_weight" not in fit_parameters and not any(p.kind is p.VAR_KEYWORD for p in fit_parameters.values()):
        raise ConfigError(f"oracle.factory: {factory.__name__}.fit takes no sample_weight")

    def fit(attributes: Array, target: Array, weight: Array) -> Regressor:
        return factory(**params).fit(attributes, target, sample_weight=weight / weight.mean())

    return fit
