"""XGBoost and LightGBM as oracles: their scikit-learn interfaces, quiet and on one thread unless told otherwise."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.oracle.scikit import scikit_oracle
from mtl.regressors import Oracle, Regressor


@dataclass(frozen=True)
class _Booster:
    regressor: str
    defaults: Mapping[str, Any]
    fewest_rows: int  # that it deigns to fit


_BOOSTERS = {
    # Inputs are few, weighted and many times told of: what limits a leaf is its weight (mean 1), not its rows.
    "xgboost": _Booster("XGBRegressor", {"n_jobs": 1, "verbosity": 0, "random_state": 0}, 1),
    "lightgbm": _Booster(
        "LGBMRegressor",
        {"n_jobs": 1, "verbosity": -1, "random_state": 0, "min_child_samples": 1, "min_child_weight": 1.0},
        2,
    ),
}
KINDS = tuple(_BOOSTERS)


def booster_oracle(kind: str, params: Mapping[str, Any]) -> Oracle:
    """The oracle of kind "xgboost" or "lightgbm" with its own parameters.

    Raises:
        ConfigError: the package is not installed, or does not take a parameter.
    """
    booster = _BOOSTERS[kind]
    try:
        factory = getattr(importlib.import_module(kind), booster.regressor)
    except ImportError as error:
        raise ConfigError(f"oracle.kind {kind}: pip install 'oracle-mtl[{kind}]' ({error})") from None
    params = {**booster.defaults, **params}
    _try(kind, factory, params)
    fit_rows = scikit_oracle(factory, params)

    def fit(attributes: Array, target: Array, weight: Array) -> Regressor:
        if len(target) < booster.fewest_rows:
            times = booster.fewest_rows
            attributes, target, weight = attributes.repeat(times, axis=0), target.repeat(times), weight.repeat(times)
        return fit_rows(attributes, target, weight)

    return fit


def _try(kind: str, factory: Any, params: Mapping[str, Any]) -> None:
    """One fit to four rows: both packages pass over a misspelt name with a warning, if that."""
    talkative = {**params, "verbosity": {"xgboost": 1, "lightgbm": 0}[kind]}
    said = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
            warnings.simplefilter("always")
            factory(**talkative).fit(np.arange(8.0).reshape(4, 2), np.arange(4.0), sample_weight=np.ones(4))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"oracle.params do not fit {factory.__name__}: {reason}") from None
    text = said.getvalue() + "".join(str(warning.message) for warning in warned)
    unknown = re.findall(r"Unknown parameter: (\S+)", text) + re.findall(r"Parameters: \{ (.*) \} are not used", text)
    if unknown:
        raise ConfigError(f"oracle.params do not fit {factory.__name__}: it knows no {unknown[0]}")
