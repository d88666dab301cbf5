"""Params of the pyspark.ml API: their names, our settings that they stand for, and how instances are saved.

A Param that is set overrides ``settings``, which override the layers of :mod:`mtl.config`; one that is not set leaves the
setting alone, so that defaults are said in conf/default.toml and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasLabelCol, HasMaxIter, HasPredictionCol, HasTol, HasWeightCol
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReadable, MLWritable
from pyspark.sql import DataFrame

from mtl.config import Settings, load_settings
from mtl.errors import ConfigError, InputError

SETTINGS = {
    "rank": "model.k",
    "form": "model.form",
    "loss": "model.loss",
    "perUser": "model.per_user",
    "perItem": "model.per_input",
    "contextCols": "model.contexts",
    "maxIter": "train.max_iterations",
    "tol": "train.tolerance",
    "seed": "train.seed",
    "oracle": "oracle.kind",
    "oracleFactory": "oracle.factory",
    "oracleParams": "oracle.params",
    "residual": "oracle.residual",
}
"""Param → the setting that it stands for."""

_SECTIONS = ("model", "train", "oracle", "encode", "function", "supervised")  # what a fit looks at
_OF_TABLES = (
    "train.warm_start",
    "train.incremental",
    "train.lock",
    "train.checkpoint",
    "model.half_life_days",
)  # of tables, which a fit has not
_FRAMES = "frames"

C = TypeVar("C", bound=type[Params])


def with_accessors(cls: C) -> C:
    """Give a class setX and getX for every Param that has none."""
    for name in dir(cls):
        if isinstance(getattr(cls, name, None), Param):
            for verb, make in (("set", _setter), ("get", _getter)):
                accessor = verb + name[0].upper() + name[1:]
                if not hasattr(cls, accessor):
                    setattr(cls, accessor, make(accessor, name))
    return cls


def _setter(accessor: str, name: str) -> Callable[[Any, Any], Any]:
    def set_param(self: Any, value: Any) -> Any:
        return self._set(**{name: value})

    set_param.__name__, set_param.__doc__ = accessor, f"Sets the value of :py:attr:`{name}`."
    return set_param


def _getter(accessor: str, name: str) -> Callable[[Any], Any]:
    def get_param(self: Any) -> Any:
        return self.getOrDefault(name)

    get_param.__name__, get_param.__doc__ = accessor, f"Gets the value of :py:attr:`{name}` or its default value."
    return get_param


def _param(name: str, doc: str, convert: Callable[[Any], Any]) -> Param:
    return Param(Params._dummy(), name, doc, typeConverter=convert)


def _to_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"Could not convert {value!r} to a dict of names and values")
    return value


class Columns(HasPredictionCol):
    """Params of the estimator and the model: names of columns."""

    userCol: Param[str] = _param("userCol", "column of user ids, of any atomic type.", TypeConverters.toString)
    itemCol: Param[str] = _param("itemCol", "column of item ids, of any atomic type.", TypeConverters.toString)
    stdCol: Param[str] = _param(
        "stdCol",
        "column for the standard deviation of a label about its prediction; empty: none.",
        TypeConverters.toString,
    )

    offsetCol: Param[str] = _param(
        "offsetCol",
        "column of a known part of h, such as the log of an exposure under Poisson loss; empty: none.",
        TypeConverters.toString,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(userCol="user", itemCol="item", stdCol="std", offsetCol="")


class Training(HasLabelCol, HasWeightCol, HasMaxIter, HasTol):
    """Params of the estimator alone; the setting in brackets has the default of one that is not set."""

    rank: Param[int] = _param(
        "rank",
        "number of learnt basis functions beside offset and intercept; not set: 20, or fewer with few users or items (model.k).",
        TypeConverters.toInt,
    )
    form: Param[str] = _param("form", "shared_basis or multilevel (model.form).", TypeConverters.toString)
    loss: Param[str] = _param("loss", "squared, logistic or poisson (model.loss).", TypeConverters.toString)
    perUser: Param[list[str]] = _param(
        "perUser",
        'attributes of items on which every user has a weight of its own; ["*"]: all (model.per_user).',
        TypeConverters.toListString,
    )
    perItem: Param[list[str]] = _param(
        "perItem",
        'attributes of users on which every item has a weight of its own; ["*"]: all (model.per_input).',
        TypeConverters.toListString,
    )
    contextCols: Param[list[str]] = _param(
        "contextCols",
        "columns of events of which every value has an effect of its own (model.contexts).",
        TypeConverters.toListString,
    )
    maxIter: Param[int] = _param(
        "maxIter",
        "largest number of passes over the events; fewer where the objective settles (train.max_iterations).",
        TypeConverters.toInt,
    )
    tol: Param[float] = _param(
        "tol",
        "training stops when a pass lowers the objective by less than this an event, in nats (train.tolerance).",
        TypeConverters.toFloat,
    )
    seed: Param[int] = _param("seed", "seed of the random start (train.seed).", TypeConverters.toInt)
    oracle: Param[str] = _param(
        "oracle",
        "what fits basis functions: identity (matrix factorization), linear, sklearn, xgboost, lightgbm or spark (oracle.kind).",
        TypeConverters.toString,
    )
    oracleFactory: Param[str] = _param(
        "oracleFactory",
        'sklearn, spark: the estimator, "package.module:Class" (oracle.factory).',
        TypeConverters.toString,
    )
    oracleParams: Param[dict[str, Any]] = _param(
        "oracleParams", "keyword arguments of the estimator (oracle.params).", _to_dict
    )
    residual: Param[bool] = _param(
        "residual",
        "add a free value per item to the oracle's; not set: where items have two events on average (oracle.residual).",
        TypeConverters.toBoolean,
    )
    settings: Param[dict[str, Any]] = _param(
        "settings",
        f"any other setting of conf/default.toml, section.key -> value; sections {', '.join(_SECTIONS)}.",
        _to_dict,
    )

    def read_settings(self) -> Settings:
        """All settings with those of this instance put in.

        Raises:
            ConfigError: an unknown setting or a value out of its range; names the Param that it came by.
        """
        values = dict(self.getOrDefault(self.settings)) if self.isSet(self.settings) else {}
        for key in values:
            if key.partition(".")[0] not in _SECTIONS:
                raise ConfigError(f"settings: {key!r} is no setting of a fit; its sections are {', '.join(_SECTIONS)}")
            if key in _OF_TABLES:
                raise ConfigError(f"settings: {key!r} is for model versions in tables: use jobs/retrain.py")
        ours = {name: key for name, key in SETTINGS.items() if self.isSet(name)}
        values |= {key: self.getOrDefault(name) for name, key in ours.items()}
        try:
            return load_settings(values=values)
        except ConfigError as error:
            named = [f"Param {name} is {key}" for name, key in ours.items() if f"setting {key} " in str(error)]
            raise ConfigError(f"{error} ({', '.join(named)})" if named else str(error)) from None


class Saved(MLWritable, MLReadable):
    """Instances with DataFrames beside their Params: each goes into a folder of its own, as Parquet."""

    def write(self) -> DefaultParamsWriter:
        """Returns an MLWriter instance for this ML instance."""
        return _Writer(self)

    @classmethod
    def read(cls) -> DefaultParamsReader:
        """Returns an MLReader instance for this class."""
        return _Reader(cls)

    def _frames(self) -> dict[str, DataFrame]:
        raise NotImplementedError

    def _metadata(self) -> dict[str, Any]:
        return {}

    def _restore(self, frames: dict[str, DataFrame], metadata: dict[str, Any]) -> None:
        raise NotImplementedError


class _Writer(DefaultParamsWriter):
    def save(self, path: str) -> None:
        files = [file for frame in self.instance._frames().values() for file in frame.inputFiles()]
        if self.shouldOverwrite and any(f"{path.rstrip('/')}/" in file for file in files):
            raise InputError(f"{path} holds the rows of what is to be saved there: save it elsewhere first")
        super().save(path)

    def saveImpl(self, path: str) -> None:
        frames = self.instance._frames()
        for name, frame in frames.items():
            frame.write.parquet(f"{path}/{name}")
        # Last, so that what a crash leaves behind does not load.
        extra = {_FRAMES: list(frames), **self.instance._metadata()}
        DefaultParamsWriter.saveMetadata(self.instance, path, self.sparkSession, extra)


class _Reader(DefaultParamsReader):
    def load(self, path: str) -> Any:
        instance = super().load(path)
        metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession)
        frames = {name: self.sparkSession.read.parquet(f"{path}/{name}") for name in metadata[_FRAMES]}
        instance._restore(frames, metadata)
        return instance
