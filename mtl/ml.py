"""oracle-mtl as a pyspark.ml Estimator and its Model, for DataFrames of one's own in place of our tables.

What :mod:`mtl.retrain` does for tables this does for DataFrames, by the same functions: ``train`` to fit and ``score_rows``
to predict. Items are what the rest of the project calls inputs, in the words of pyspark.ml's ALS.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import StorageLevel, keyword_only
from pyspark.ml import Estimator
from pyspark.ml import Model as FittedModel
from pyspark.ml.param import Param
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DataType

from mtl import schema
from mtl.arrow import lists
from mtl.config import Settings
from mtl.described import Described
from mtl.errors import ConfigError, InputError, StateError
from mtl.fitting import train
from mtl.layout import SCHEMAS
from mtl.losses import LOSSES
from mtl.model import Model, model_of, model_row
from mtl.params import Training, with_accessors
from mtl.parse import checked_events, context, number, text_id
from mtl.read import quoted
from mtl.recommend import ID, RATING, RECOMMENDATIONS, VECTOR, recommend
from mtl.schema import CONTEXT, INPUT_ID, LABEL, OFFSET, REASON, USER_ID, WEIGHT
from mtl.score import PREDICTION, STD, score_rows
from mtl.users import weights_without_events

_VERSION = 1  # of the rows of a model that is in no table
_NO_ID = ""  # no id is blank text: an unknown user or item


@with_accessors
class OracleMTL(Described, Training, Estimator):
    """
    Personalized models: every user has a small model of its own on features that all users share.

    The features are fitted by any regressor (the *oracle*) on the items' attributes, with a free value per item beside it;
    users are Gaussian posteriors under priors learnt from all of them. There is no regularization to tune and no cold
    start strategy to choose: a user or an item without events has a prediction, by its attributes where there are any.

    Every setting of conf/default.toml that concerns a fit is a Param or goes by ``settings``. The rows of a DataFrame
    are events; they are read twice and kept in Spark's cache meanwhile, unless the DataFrame is cached.

    Raises
    ------
    InputError
        from ``fit``: a column is missing, or a row is no event.
    ConfigError
        from ``fit``: a Param or setting has a value that it cannot have.

    Notes
    -----
    Crankshaw, Wang, Gonzalez & Franklin, "Scalable Training and Serving of Personalized Models".

    Examples
    --------
    >>> from mtl import OracleMTL, OracleMTLModel
    >>> ratings = spark.createDataFrame(
    ...     [(0, 0, 4.0), (0, 1, 2.0), (1, 1, 3.0), (1, 2, 4.0), (2, 1, 1.0), (2, 2, 5.0)], ["user", "item", "rating"])
    >>> films = spark.createDataFrame([(0, "drama"), (1, "war"), (2, "drama"), (3, "drama")], ["item", "genre"])
    >>> mtl = OracleMTL(labelCol="rating", rank=1, settings={"encode.min_category_count": 1})
    >>> mtl.getRank()
    1
    >>> model = mtl.setItemAttributes(films).fit(ratings)
    >>> model.rank
    1
    >>> new = spark.createDataFrame([(0, 2), (7, 3)], ["user", "item"])
    >>> model.transform(new).columns
    ['user', 'item', 'prediction', 'std']
    >>> best = model.recommendForAllUsers(2)
    >>> best.dtypes
    [('user', 'bigint'), ('recommendations', 'array<struct<item:bigint,rating:double>>')]
    >>> sorted((row.user, len(row.recommendations)) for row in best.collect())
    [(0, 2), (1, 2), (2, 2)]
    >>> model.write().overwrite().save(folder + "/model")
    >>> again = OracleMTLModel.load(folder + "/model")
    >>> sorted(again.transform(new).collect()) == sorted(model.transform(new).collect())
    True
    """

    @keyword_only
    def __init__(
        self,
        *,
        userCol: str | None = None,
        itemCol: str | None = None,
        labelCol: str | None = None,
        weightCol: str | None = None,
        offsetCol: str | None = None,
        predictionCol: str | None = None,
        stdCol: str | None = None,
        rank: int | None = None,
        form: str | None = None,
        loss: str | None = None,
        perUser: Sequence[str] | None = None,
        perItem: Sequence[str] | None = None,
        contextCols: Sequence[str] | None = None,
        maxIter: int | None = None,
        tol: float | None = None,
        seed: int | None = None,
        oracle: str | None = None,
        oracleFactory: str | None = None,
        oracleParams: dict[str, Any] | None = None,
        residual: bool | None = None,
        settings: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._set(**self._input_kwargs)

    def setParams(self, **params: Any) -> OracleMTL:
        """Sets Params by the names of the constructor's arguments."""
        return self._set(**params)

    def _fit(self, dataset: DataFrame) -> OracleMTLModel:
        settings = self.read_settings()
        columns = [self._column(dataset, param) for param in (self.userCol, self.itemCol, self.labelCol)]
        weight = self.isDefined(self.weightCol) and self.getOrDefault(self.weightCol)
        weights = self._column(dataset, self.weightCol)[0] if weight else None
        (user, _), (item, _), (label, _) = columns
        offset = self._column(dataset, self.offsetCol)[0] if self.getOrDefault(self.offsetCol) else None
        contexts = settings.model.contexts
        for name in contexts:
            self._kind(dataset, name, "contextCols")
        events = checked_events(dataset, user, item, label, weights, settings.model.loss, offset, contexts)
        is_cached = dataset.storageLevel != StorageLevel.NONE
        if not is_cached:
            events = events.persist(StorageLevel.MEMORY_AND_DISK)
        try:
            theirs = {USER_ID: user, INPUT_ID: item, LABEL: label, WEIGHT: weights, OFFSET: offset}
            _check(events, {ours: str(name) for ours, name in theirs.items()})
            types = columns[0][1].simpleString(), columns[1][1].simpleString()
            fitted = _fit(events, self._item_attributes(), self._user_attributes(), settings, types)
        finally:
            if not is_cached:
                events.unpersist()
        model = OracleMTLModel(fitted)
        model._resetUid(self.uid)  # as pyspark.ml's own: the estimator's Params are the model's
        return self._copyValues(model)


@dataclass(frozen=True)
class _Fitted:
    """What a model and its copies share."""

    row: dict[str, Any] = field(repr=False)  # of the models table
    model: Model
    features: DataFrame  # rows of the features table, persisted
    users: DataFrame  # rows of the users table, persisted
    user_type: str  # of ids, as DDL has it
    item_type: str


@with_accessors
class OracleMTLModel(Described, FittedModel):
    """
    Model fitted by :class:`OracleMTL`.

    Predictions are the same for every way of asking: a known user by its posterior, a user without events by the prior mean
    of its attributes, and likewise for items. Attributes of users and items that came after training are given by
    :meth:`setUserAttributes` and :meth:`setItemAttributes`; of known ones they are not looked at.

    Rows of users and items are in Spark's cache until the model and its copies are gone; they are computed again from the
    events where executors are lost. A saved model is on its own. It holds pickled objects: load what you trust.
    """

    def __init__(self, fitted: _Fitted | None = None):
        super().__init__()
        self._of: _Fitted | None = fitted

    @property
    def rank(self) -> int:
        """Number of learnt basis functions."""
        return self._fitted.model.form.k

    @property
    def objective(self) -> list[float]:
        """The objective after every half-step but the first."""
        return list(self._fitted.row[schema.OBJECTIVE])

    @property
    def summary(self) -> dict[str, Any]:
        """Numbers of events, users and items, noise variance, passes, and what became of the oracle's steps."""
        return json.loads(self._fitted.row[schema.METRICS])

    @property
    def itemFactors(self) -> DataFrame:
        """(id, offset, features): h = offset + the item's features · the user's, and a prediction is the response to h."""
        ids = F.col(INPUT_ID).cast(self._fitted.item_type).alias(ID)
        return self._fitted.features.select(ids, schema.OFFSET, F.col(schema.PHI).alias("features"))

    @property
    def userFactors(self) -> DataFrame:
        """(id, features): the means of every user's weights, the intercept first."""
        ids = F.col(USER_ID).cast(self._fitted.user_type).alias(ID)
        return self._fitted.users.select(ids, F.col(schema.W).alias("features"))

    def recommendForAllUsers(self, numItems: int) -> DataFrame:
        """The ``numItems`` items of the largest predictions for every user, the best first.

        Under another loss than the squared one items are chosen by the mean of h, and their ratings are predictions.

        Returns
        -------
        DataFrame
            (userCol, recommendations), the latter an array of (itemCol, rating); items that the user has rated included.
        """
        return self._recommend(self._user_vectors(), self._item_vectors(), numItems, self._fitted.user_type, True)

    def recommendForUserSubset(self, dataset: DataFrame, numItems: int) -> DataFrame:
        """:meth:`recommendForAllUsers` for the distinct users of ``dataset``, those without events included."""
        wanted, kind = self._subset(dataset, self.userCol)
        return self._recommend(self._user_vectors(wanted), self._item_vectors(), numItems, kind, True)

    def recommendForAllItems(self, numUsers: int) -> DataFrame:
        """The ``numUsers`` users of the largest predictions for every item, the best first.

        Returns
        -------
        DataFrame
            (itemCol, recommendations), the latter an array of (userCol, rating).
        """
        return self._recommend(self._item_vectors(), self._user_vectors(), numUsers, self._fitted.item_type, False)

    def recommendForItemSubset(self, dataset: DataFrame, numUsers: int) -> DataFrame:
        """:meth:`recommendForAllItems` for the distinct items of ``dataset``, those without events included."""
        wanted, kind = self._subset(dataset, self.itemCol)
        return self._recommend(self._item_vectors(wanted), self._user_vectors(), numUsers, kind, False)

    @property
    def _fitted(self) -> _Fitted:
        if self._of is None:
            raise StateError("an OracleMTLModel comes from OracleMTL().fit or OracleMTLModel.load")
        return self._of

    def _transform(self, dataset: DataFrame) -> DataFrame:
        added = {PREDICTION: self.getOrDefault(self.predictionCol), STD: self.getOrDefault(self.stdCol)}
        taken = {name.lower() for name in dataset.columns}
        for name in added.values():
            if name.lower() in taken:
                raise InputError(f"transform: there is a column {name!r} already: set predictionCol or stdCol")
        # The DataFrame's own columns travel under numbers, for they may be called anything.
        own = [f"_{i}" for i in range(len(dataset.columns))]
        ids = []
        for param, key in ((self.userCol, USER_ID), (self.itemCol, INPUT_ID)):
            name, kind = self._column(dataset, param)
            text = text_id(F.col(own[dataset.columns.index(name)]), kind)
            ids.append(F.coalesce(text, F.lit(_NO_ID)).alias(key))
        scored = self._scored(dataset.toDF(*own).select(*own, *ids, *self._beside(dataset, own)))
        return scored.select(
            *(F.col(ours).alias(c.name, metadata=c.metadata) for ours, c in zip(own, dataset.schema, strict=True)),
            *(F.col(ours).alias(theirs) for ours, theirs in added.items() if theirs),
        )

    def _beside(self, dataset: DataFrame, own: list[str]) -> list[Column]:
        """Offset and contexts of the rows, whose columns go by the names ``own``."""

        def cell(name: str, param: str) -> tuple[Column, DataType]:
            kind = self._kind(dataset, name, param)
            return F.col(own[dataset.columns.index(name)]), kind

        values = {name: text_id(*cell(name, "contextCols")) for name in sorted(self._fitted.model.contexts)}
        offset = self.getOrDefault(self.offsetCol)
        return [
            context(values).alias(CONTEXT),
            *([number(*cell(offset, self.offsetCol.name)).alias(OFFSET)] if offset else []),
        ]

    def _scored(self, rows: DataFrame) -> DataFrame:
        of = self._fitted
        return score_rows(of.model, of.features, of.users, self._item_attributes(), self._user_attributes(), rows)

    def _recommend(self, queries: DataFrame, candidates: DataFrame, n: int, kind: str, for_users: bool) -> DataFrame:
        if n < 1:
            raise ConfigError(f"{'numItems' if for_users else 'numUsers'} = {n}: recommend at least 1")
        found = recommend(queries, candidates, n)
        if not LOSSES[self._fitted.model.loss].is_quadratic:
            found = self._with_predictions(found, for_users)
        query, candidate = (self.userCol, self.itemCol) if for_users else (self.itemCol, self.userCol)
        other = self._fitted.item_type if for_users else self._fitted.user_type

        def pair(found: Column) -> Column:
            return F.struct(found[ID].cast(other).alias(self.getOrDefault(candidate)), found[RATING].alias(RATING))

        return found.select(
            F.col(ID).cast(kind).alias(self.getOrDefault(query)),
            F.transform(RECOMMENDATIONS, pair).alias(RECOMMENDATIONS),
        )

    def _with_predictions(self, found: DataFrame, for_users: bool) -> DataFrame:
        """The recommendations with predictions as ratings, and in their order."""
        query, candidate = (USER_ID, INPUT_ID) if for_users else (INPUT_ID, USER_ID)
        pairs = found.select(F.col(ID).alias(query), F.explode(F.col(RECOMMENDATIONS)[ID]).alias(candidate))
        rating = F.struct(F.col(PREDICTION).alias(RATING), F.col(candidate).alias(ID))
        best = F.sort_array(F.collect_list(rating), asc=False)
        return self._scored(pairs).groupBy(F.col(query).alias(ID)).agg(best.alias(RECOMMENDATIONS))

    def _subset(self, dataset: DataFrame, param: Param[str]) -> tuple[DataFrame, str]:
        """Ids that there are in a column, and their type."""
        name, kind = self._column(dataset, param)
        ids = dataset.select(text_id(quoted(name), kind).alias(ID))
        return ids.where(F.col(ID).isNotNull()).distinct(), kind.simpleString()

    def _user_vectors(self, wanted: DataFrame | None = None) -> DataFrame:
        """(id, [1, w]) of ``wanted`` users, or of all with events or attributes."""
        of, attributes = self._fitted, self._user_attributes()
        known = of.users.select(F.col(USER_ID).alias(ID), F.col(schema.W).alias(VECTOR))
        if attributes is not None:
            new = weights_without_events(attributes.join(of.users, USER_ID, "left_anti"), of.model)
            known = known.unionAll(new)
        unknown = of.model.weights_without_events(of.model.prior_mean_of_unknown[None])[0]
        vectors = _of_wanted(wanted, known, unknown)
        return vectors.select(ID, F.concat(F.array(F.lit(1.0)), VECTOR).alias(VECTOR))

    def _item_vectors(self, wanted: DataFrame | None = None) -> DataFrame:
        """(id, [o, φ]) of ``wanted`` items, or of all with events or attributes."""
        of, attributes = self._fitted, self._item_attributes()
        vector = F.concat(F.array(schema.OFFSET), schema.PHI).alias(VECTOR)
        known = of.features.select(F.col(INPUT_ID).alias(ID), vector)
        if attributes is not None:
            new = attributes.join(of.features, INPUT_ID, "left_anti").toPandas()
            if len(new):
                ids = pa.array(new[INPUT_ID], pa.string())
                vectors = lists(_offset_and_phi(of.model, new.drop(columns=INPUT_ID)))
                known = known.unionAll(known.sparkSession.createDataFrame(pa.table({ID: ids, VECTOR: vectors})))
        return _of_wanted(wanted, known, _offset_and_phi(of.model, pd.DataFrame(index=[0]))[0])

    def _frames(self) -> dict[str, DataFrame]:
        of = self._fitted
        row = of.users.sparkSession.createDataFrame([of.row], SCHEMAS[schema.MODELS])
        frames = {schema.MODELS: row, schema.FEATURES: of.features, schema.USERS: of.users}
        return {**super()._frames(), **frames}

    def _metadata(self) -> dict[str, Any]:
        return {"userType": self._fitted.user_type, "itemType": self._fitted.item_type}

    def _restore(self, frames: dict[str, DataFrame], metadata: dict[str, Any]) -> None:
        super()._restore(frames, metadata)
        row = frames[schema.MODELS].collect()[0].asDict()
        self._of = _Fitted(
            row,
            model_of(row),
            frames[schema.FEATURES],
            frames[schema.USERS],
            metadata["userType"],
            metadata["itemType"],
        )


def _check(events: DataFrame, names: dict[str, str]) -> None:
    """Refuse events of which any is none, in the words of the DataFrame's own columns."""
    n, refused, reason = events.agg(F.count("*"), F.count(REASON), F.first(REASON, ignorenulls=True)).collect()[0]
    if refused:
        reason = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], reason)
        raise InputError(f"fit: {refused} of {n} rows cannot be used; the first: {reason}")
    if not n:
        raise InputError("fit: the DataFrame has no rows")


def _fit(
    events: DataFrame, items: DataFrame | None, users: DataFrame | None, settings: Settings, types: tuple[str, str]
) -> _Fitted:
    """Train, and keep what the rows of features and users say in Spark's cache."""
    spark = events.sparkSession
    inputs = spark.createDataFrame([], SCHEMAS[schema.INPUTS]) if items is None else items
    attributes = spark.createDataFrame([], SCHEMAS[schema.USER_ATTRIBUTES]) if users is None else users
    trained = train(events.drop(REASON), inputs, attributes, settings)
    try:
        model = trained.model(_VERSION, schema.LIVE, 0, 0)
        frames = [
            rows(_VERSION).persist(StorageLevel.MEMORY_AND_DISK) for rows in (trained.feature_rows, trained.user_rows)
        ]
        # Both before what they are computed from is given back.
        n_users = [frame.count() for frame in frames][1]
    finally:
        trained.engine.close()
    report = {**trained.report, "users": n_users}
    objective, n_events = trained.fit.objective, trained.catalogue.n_events
    row = model_row(model, settings.model.form, objective, n_events, report, settings)
    fitted = _Fitted(row, model, frames[0], frames[1], types[0], types[1])
    weakref.finalize(fitted, _give_back, frames).atexit = False
    return fitted


def _give_back(frames: list[DataFrame]) -> None:
    """Unpersist in a thread of its own: the garbage collector may have come in the middle of a call to the JVM."""

    def unpersist() -> None:
        with contextlib.suppress(Exception):  # the session may be gone, and the cache with it
            for frame in frames:
                frame.unpersist()

    threading.Thread(target=unpersist, daemon=True).start()


def _of_wanted(wanted: DataFrame | None, known: DataFrame, default: np.ndarray) -> DataFrame:
    """Vectors of ``wanted`` ids, ``default`` where they are not known; all known ones where none are named."""
    if wanted is None:
        return known
    vector = F.coalesce(VECTOR, F.array(*map(F.lit, default.tolist())))
    return wanted.join(known, ID, "left").select(ID, vector.alias(VECTOR))


def _offset_and_phi(model: Model, attributes: pd.DataFrame) -> np.ndarray:
    features = model.features_of_new(attributes)
    return np.column_stack([features.offset, features.phi])
