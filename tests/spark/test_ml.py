"""The pyspark.ml API: what tables would have given, wherever a fitted model is put, and recommendations by brute force."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark import StorageLevel
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import mtl.ml
from mtl import OracleMTL, OracleMTLModel, recommend, schema
from mtl.config import load_settings
from mtl.errors import ConfigError, InputError, StateError
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables

PROBLEM = planted(3, users=20, inputs=12, k=2, events=220)
FAST = {"train.iterations": 3, "encode.min_category_count": 1}


def ratings(text_ids: bool = False) -> pd.DataFrame:
    rows = pd.DataFrame({"user": PROBLEM.user, "item": PROBLEM.input, "rating": PROBLEM.label, "c": PROBLEM.weight})
    return rows.astype({"user": str, "item": str}) if text_ids else rows


def items() -> pd.DataFrame:
    """Items 0 … 14, of which 12, 13 and 14 have no event."""
    return pd.DataFrame({"item": range(15), "year": np.linspace(-1, 1, 15), "genre": [*"abc"] * 5})


def users() -> pd.DataFrame:
    return pd.DataFrame({"user": [*range(18), 90], "age": np.linspace(20, 60, 19)})


def estimator(spark: SparkSession, **params) -> OracleMTL:
    of = OracleMTL(**{"labelCol": "rating", "weightCol": "c", "rank": 2, "settings": FAST, **params})
    return of.setItemAttributes(spark.createDataFrame(items())).setUserAttributes(spark.createDataFrame(users()))


def pairs(spark: SparkSession) -> DataFrame:
    """Known and unknown users and items, with a column of every awkward name."""
    rows = pd.DataFrame({"user": [0, 1, 90, 777, 3, 777], "item": [0, 14, 3, 4, 555, 555]})
    return spark.createDataFrame(rows.assign(user_id=-1.5, **{"a.b `c`": [*"uvwxyz"]}))


@pytest.fixture(scope="module")
def model(spark: SparkSession) -> OracleMTLModel:
    return estimator(spark).fit(spark.createDataFrame(ratings()))


def sorted_rows(frame: DataFrame) -> list:
    return sorted(frame.collect(), key=str)


# --- The same as by tables --------------------------------------------------------------------------------------------


def test_fit_and_transform_are_retrain_and_score_of_tables(
    spark: SparkSession, tmp_path: Path, model: OracleMTLModel
) -> None:
    tables = Tables(spark, str(tmp_path))
    renamed = {"user": schema.USER_ID, "item": schema.INPUT_ID, "rating": schema.LABEL, "c": schema.WEIGHT}
    tables.append(schema.EVENTS, spark.createDataFrame(ratings(text_ids=True).rename(columns=renamed)))
    for table, frame, key in ((schema.INPUTS, items(), "item"), (schema.USER_ATTRIBUTES, users(), "user")):
        text = frame.astype({key: str}).rename(columns=renamed)
        tables.append(table, spark.createDataFrame(text), evolve=True)
    report = retrain(tables, load_settings(values={**FAST, "model.k": 2}))
    np.testing.assert_allclose(model.objective, report["objective"], rtol=1e-12)
    assert model.rank == report["k"]
    assert {name: report[name] for name in model.summary if name != "noise"} == {
        name: value for name, value in model.summary.items() if name != "noise"
    }

    asked = pairs(spark).select("user", "item")
    text = asked.select(F.col("user").cast("string").alias("user_id"), F.col("item").cast("string").alias("input_id"))
    expected = score(tables, load_model(tables), text).toPandas().sort_values(["user_id", "input_id"])
    found = model.transform(asked).toPandas().astype({"user": str, "item": str}).sort_values(["user", "item"])
    np.testing.assert_allclose(found[[PREDICTION, STD]], expected[[PREDICTION, STD]], rtol=1e-10)


def test_columns_of_any_name_and_type_come_back_as_they_were(spark: SparkSession, model: OracleMTLModel) -> None:
    asked = VectorAssembler(inputCols=["user", "item"], outputCol="vector").transform(pairs(spark))
    scored = model.transform(asked)
    assert scored.dtypes == [*asked.dtypes, (PREDICTION, "double"), (STD, "double")]
    assert scored.schema["vector"].metadata == asked.schema["vector"].metadata != {}
    assert sorted_rows(scored.select(*asked.columns[:3], "vector")) == sorted_rows(
        asked.select(*asked.columns[:3], "vector")
    )
    assert "std" not in model.copy({model.stdCol: ""}).transform(asked).columns


def test_a_missing_id_is_an_unknown_one(spark: SparkSession, model: OracleMTLModel) -> None:
    rows = spark.createDataFrame([(None, 3), (999, 3), (4, None), (4, 999)], "user long, item long")
    found = [row[PREDICTION] for row in model.transform(rows.orderBy("item", "user")).collect()]
    assert len({round(value, 12) for value in found}) == 2


@pytest.mark.parametrize("kind", ["string", "double"])
def test_ids_are_returned_in_the_type_they_came(spark: SparkSession, model: OracleMTLModel, kind: str) -> None:
    ids = [F.col(name).cast(kind).alias(name) for name in ("user", "item")]
    typed = estimator(spark).fit(spark.createDataFrame(ratings()).select(*ids, "rating", "c"))
    assert typed.objective == pytest.approx(model.objective, rel=1e-12)
    recommended = typed.recommendForAllUsers(1)
    assert recommended.dtypes[0] == ("user", kind)
    assert recommended.dtypes[1] == ("recommendations", f"array<struct<item:{kind},rating:double>>")
    assert dict(typed.itemFactors.dtypes)["id"] == dict(typed.userFactors.dtypes)["id"] == kind
    assert len(recommended.collect()) == 21


def test_a_weight_counts_as_that_many_events(spark: SparkSession) -> None:
    rows = ratings().assign(c=1.0 + (np.arange(220) % 3 == 0))
    once = {"labelCol": "rating", "rank": 1, "settings": {"train.iterations": 1}}
    fitted = OracleMTL(**once, weightCol="c").fit(spark.createDataFrame(rows))
    # The noise is per event, so of twice as many it is another one: compare what does not depend on it.
    twice = np.average(np.concatenate([rows.rating, rows.rating[rows.c == 2]]))
    assert fitted._fitted.model.mu == pytest.approx(twice, rel=1e-12)
    assert abs(rows.rating.mean() - twice) > 1e-6
    wanted = rows.groupby("user").c.sum()
    counted = {row.user_id: row.a[0] for row in fitted._fitted.users.collect()}  # Σ c φ₀², φ₀ = 1
    assert counted == pytest.approx({str(user): total for user, total in wanted.items()})


def test_attributes_of_newcomers_can_be_given_to_the_model(spark: SparkSession, model: OracleMTLModel) -> None:
    newcomers = spark.createDataFrame(pd.DataFrame({"item": [555], "year": [1.0], "genre": ["c"]}))
    older = spark.createDataFrame(pd.DataFrame({"user": [777], "age": [60.0]}))
    informed = model.copy().setItemAttributes(newcomers).setUserAttributes(older)
    asked = pairs(spark).where("user = 777 AND item = 555")
    plain, told = (of.transform(asked).first()[PREDICTION] for of in (model, informed))
    assert abs(plain - told) > 1e-3
    recommended = {row.user: row.recommendations for row in informed.recommendForAllUsers(99).collect()}
    assert 777 in recommended
    assert {pair.item for pair in recommended[777]} == {*range(15), 555}
    best = {pair.item: pair.rating for pair in recommended[777]}
    assert best[555] == pytest.approx(told, rel=1e-10)


# --- Saving, copying, composing ---------------------------------------------------------------------------------------


def test_a_saved_model_predicts_the_same_bits_in_another_process(
    spark: SparkSession, tmp_path: Path, model: OracleMTLModel
) -> None:
    path = str(tmp_path / "model")
    model.write().save(path)
    model.write().overwrite().save(path)
    asked = pairs(spark).select("user", "item")
    again = OracleMTLModel.load(path)
    expected = sorted_rows(model.transform(asked))
    assert sorted_rows(again.transform(asked)) == expected
    assert (again.uid, again.objective, again.summary) == (model.uid, model.objective, model.summary)
    assert again.extractParamMap() == model.extractParamMap()
    with pytest.raises(InputError, match="save it elsewhere first"):
        again.write().overwrite().save(path)
    script = f"""
from pyspark.sql import SparkSession
from mtl import OracleMTLModel
spark = SparkSession.builder.master("local[1]").config("spark.sql.shuffle.partitions", 1).config(
    "spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC").getOrCreate()
rows = spark.createDataFrame({[tuple(row) for row in asked.collect()]}, "user long, item long")
print(sorted(map(tuple, OracleMTLModel.load({path!r}).transform(rows).collect()), key=str))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    plain = sorted([tuple(row) for row in expected], key=str)
    assert eval(run.stdout.splitlines()[-1]) == plain


def test_a_saved_estimator_has_its_params_and_attributes(spark: SparkSession, tmp_path: Path) -> None:
    of = estimator(spark, maxIter=2, perUser=["year"])
    of.write().overwrite().save(str(tmp_path / "estimator"))
    again = OracleMTL.load(str(tmp_path / "estimator"))
    assert again.extractParamMap() == of.extractParamMap()
    for kept, given in ((again._itemAttributes, items()), (again._userAttributes, users())):
        pd.testing.assert_frame_equal(kept.toPandas().sort_values(given.columns[0], ignore_index=True), given)


def test_a_copy_has_params_of_its_own_and_the_same_attributes(spark: SparkSession, model: OracleMTLModel) -> None:
    of = estimator(spark)
    other = of.copy({of.rank: 1})
    assert (of.getRank(), other.getRank(), other.uid) == (2, 1, of.uid)
    assert other._itemAttributes is of._itemAttributes
    renamed = model.copy({model.predictionCol: "p"})
    assert renamed.transform(pairs(spark)).columns[-2:] == ["p", "std"]
    assert model.getPredictionCol() == PREDICTION


def test_a_pipeline_trains_and_is_saved_with_it(spark: SparkSession, tmp_path: Path) -> None:
    rows = spark.createDataFrame(ratings())
    trees = {
        "oracle": "sklearn",
        "oracleFactory": "sklearn.tree:DecisionTreeRegressor",
        "oracleParams": {"max_depth": 2},
    }
    pipeline = Pipeline(stages=[estimator(spark, **trees, residual=False)])
    pipeline.write().overwrite().save(str(tmp_path / "pipeline"))
    fitted = Pipeline.load(str(tmp_path / "pipeline")).fit(rows)
    fitted.write().overwrite().save(str(tmp_path / "fitted"))
    again = PipelineModel.load(str(tmp_path / "fitted"))
    asked = pairs(spark).select("user", "item")
    assert sorted_rows(again.transform(asked)) == sorted_rows(fitted.transform(asked))
    assert "refused_oracle_steps" in fitted.stages[0].summary


@pytest.mark.long
def test_tuning_keeps_attributes_and_chooses_among_ranks(spark: SparkSession, tmp_path: Path) -> None:
    of = estimator(spark, settings={**FAST, "train.iterations": 1})
    grid = ParamGridBuilder().addGrid(of.rank, [0, 2]).build()
    rows, measure = spark.createDataFrame(ratings()).cache(), RegressionEvaluator(labelCol="rating")
    tuned = CrossValidator(
        estimator=of, estimatorParamMaps=grid, evaluator=measure, numFolds=2, seed=1, parallelism=2
    ).fit(rows)
    assert tuned.avgMetrics[1] < tuned.avgMetrics[0]
    assert tuned.bestModel.rank == 2
    assert tuned.bestModel.itemFactors.count() == 15  # those without events come from the attributes
    tuned.write().overwrite().save(str(tmp_path / "tuned"))
    assert CrossValidatorModel.load(str(tmp_path / "tuned")).bestModel.objective == tuned.bestModel.objective
    split = TrainValidationSplit(estimator=of, estimatorParamMaps=grid[1:], evaluator=measure, seed=1).fit(rows)
    assert split.bestModel.rank == 2
    rows.unpersist()


def test_rows_leave_the_cache_with_the_last_copy_of_a_model(spark: SparkSession) -> None:
    fitted = estimator(spark).fit(spark.createDataFrame(ratings()))
    frame, other = fitted.copy()._fitted.users, fitted.copy()
    del fitted
    gc.collect()
    assert frame.storageLevel != StorageLevel.NONE
    scored = other.transform(pairs(spark))
    before = sorted_rows(scored)
    del other
    gc.collect()
    deadline = time.monotonic() + 10
    while frame.storageLevel != StorageLevel.NONE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert frame.storageLevel == StorageLevel.NONE
    assert sorted_rows(scored) == before


# --- Recommendations --------------------------------------------------------------------------------------------------


def by_brute_force(spark: SparkSession, model: OracleMTLModel, by: str, n: int) -> dict:
    """{id: the n best of the other side, best first}, from a prediction of every pair."""
    of, other = ("user", "item") if by == "user" else ("item", "user")
    ids = {"user": model.userFactors, "item": model.itemFactors}
    every = [frame.withColumnRenamed("id", name).select(name) for name, frame in ids.items()]
    rows = model.transform(every[0].crossJoin(every[1])).toPandas().sort_values(PREDICTION, ascending=False)
    return {key: list(zip(group[other][:n], group[PREDICTION][:n], strict=True)) for key, group in rows.groupby(of)}


@pytest.mark.parametrize("block_bytes", [1 << 28, 8 * 4 * 5])
@pytest.mark.parametrize(("by", "n"), [("user", 3), ("user", 100), ("item", 4)])
def test_recommendations_are_those_of_predicting_every_pair(
    spark: SparkSession, model: OracleMTLModel, monkeypatch: pytest.MonkeyPatch, by: str, n: int, block_bytes: int
) -> None:
    monkeypatch.setattr(recommend, "_BLOCK_BYTES", block_bytes)
    rows = model.recommendForAllUsers(n) if by == "user" else model.recommendForAllItems(n)
    expected = by_brute_force(spark, model, by, n)
    found = {row[0]: [tuple(pair) for pair in row.recommendations] for row in rows.collect()}
    assert found.keys() == expected.keys()
    assert len(found) == (21 if by == "user" else 15)
    for key, best in found.items():
        assert [name for name, _ in best] == [name for name, _ in expected[key]]
        np.testing.assert_allclose([value for _, value in best], [value for _, value in expected[key]], rtol=1e-10)


def test_subsets_are_those_asked_and_the_unknown_among_them(spark: SparkSession, model: OracleMTLModel) -> None:
    asked = spark.createDataFrame([(3, 1), (3, 2), (777, 2), (None, 1)], "user long, item long")
    everyone = {row.user: row.recommendations for row in model.recommendForAllUsers(2).collect()}
    found = {row.user: row.recommendations for row in model.recommendForUserSubset(asked, 2).collect()}
    assert found.keys() == {3, 777}
    assert [pair.item for pair in found[3]] == [pair.item for pair in everyone[3]]
    predicted = model.transform(spark.createDataFrame([(777, found[777][0].item)], ["user", "item"])).first()
    assert found[777][0].rating == pytest.approx(predicted[PREDICTION], rel=1e-10)
    assert {row.item for row in model.recommendForItemSubset(asked, 2).collect()} == {1, 2}


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "k"),
    [
        ({"train.algorithm": "first_order", "function.kind": "two_layer", "function.hidden": 3}, 2),
        ({"supervised.labels": ["genre"], "supervised.min_count": 1}, 2),
    ],
    ids=["function", "supervised"],
)
def test_settings_of_functions_and_of_labels_go_by_settings(spark: SparkSession, more: dict, k: int) -> None:
    rows = spark.createDataFrame(ratings())
    fitted = estimator(spark, settings={**FAST, **more}).fit(rows)
    scored = fitted.transform(rows).toPandas()
    assert fitted.rank == k
    assert np.corrcoef(scored[PREDICTION], scored.rating)[0, 1] > 0.5


@pytest.mark.long
def test_zeros_speak_of_users_without_events_in_recommendations_as_in_predictions(spark: SparkSession) -> None:
    rows = spark.createDataFrame(ratings().assign(rating=1.0))
    fitted = estimator(spark, weightCol=None, settings={**FAST, "model.implicit_weight": 0.1}).fit(rows)
    expected = by_brute_force(spark, fitted, "user", 15)
    unknown = spark.createDataFrame([(777, 1)], "user long, item long")
    found = {row.user: row.recommendations for row in fitted.recommendForAllUsers(15).collect()}
    assert set(found) - set(rows.toPandas().user)  # some have attributes alone
    for key, best in found.items():
        np.testing.assert_allclose([pair.rating for pair in best], [value for _, value in expected[key]], rtol=1e-9)
    (of_unknown,) = fitted.recommendForUserSubset(unknown, 3).collect()
    asked = spark.createDataFrame([(777, pair.item) for pair in of_unknown.recommendations], "user long, item long")
    predicted = fitted.transform(asked).toPandas().set_index("item")[PREDICTION]
    for pair in of_unknown.recommendations:
        assert pair.rating == pytest.approx(predicted[pair.item], rel=1e-9)


def test_logistic_predictions_and_ratings_are_the_same_numbers(spark: SparkSession) -> None:
    rows = spark.createDataFrame(ratings().assign(rating=(PROBLEM.label > PROBLEM.mean_label).astype(float)))
    fitted = estimator(spark, loss="logistic", weightCol=None).fit(rows)
    scored = fitted.transform(rows).toPandas()
    assert scored[PREDICTION].between(0, 1, inclusive="neither").all()
    assert np.corrcoef(scored[PREDICTION], scored.rating)[0, 1] > 0.5
    best = by_brute_force(spark, fitted, "user", 15)
    for row in fitted.recommendForAllUsers(15).collect():
        ours = [pair.rating for pair in row.recommendations]
        np.testing.assert_allclose(ours, [value for _, value in best[row.user]], rtol=1e-9)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"rank": -1}, ConfigError, r"setting model\.k = -1: .*\(Param rank is model\.k\)"),
        ({"loss": "hinge"}, ConfigError, r"'squared', 'logistic' or 'poisson'.*Param loss is model\.loss"),
        ({"settings": {"train.iteration": 3}}, ConfigError, "did you mean 'train.iterations'"),
        ({"settings": {"tables.root": "x"}}, ConfigError, "sections are model, train, oracle, encode"),
        ({"settings": {"train.lock": ["users"]}}, ConfigError, "'train.lock' is for model versions in tables"),
        ({"perUser": ["colour"]}, ConfigError, "no attribute 'colour'; there are year, genre"),
        ({"userCol": "who"}, InputError, r"no columns 'who' \(userCol\); it has user, item, rating, c"),
        ({"labelCol": "item", "loss": "logistic"}, InputError, "item is neither 0 nor 1"),
    ],
)
def test_a_wrong_param_is_told_by_its_name(spark: SparkSession, params: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        estimator(spark, **params).fit(spark.createDataFrame(ratings()))


def test_types_of_params_are_checked_when_they_are_set() -> None:
    with pytest.raises(TypeError, match="rank"):
        OracleMTL(rank="many")
    with pytest.raises(TypeError, match="settings"):
        OracleMTL(settings=["rank"])
    with pytest.raises(TypeError, match="unexpected keyword"):
        OracleMTL(inputCol="item")


def test_rows_that_are_no_events_are_told_in_the_words_of_the_data(spark: SparkSession, model: OracleMTLModel) -> None:
    rows = spark.createDataFrame([(1, 1, 1.0), (None, 1, 2.0)], "user long, item long, rating double")
    with pytest.raises(InputError, match="fit: 1 of 2 rows cannot be used; the first: user is missing"):
        OracleMTL(labelCol="rating").fit(rows)
    with pytest.raises(InputError, match="the DataFrame has no rows"):
        OracleMTL(labelCol="rating").fit(rows.limit(0))
    twice = spark.createDataFrame([(1, "a"), (1, "b")], ["item", "genre"])
    with pytest.raises(InputError, match="attributes by itemCol: 2 rows of item = 1"):
        OracleMTL(labelCol="rating").setItemAttributes(twice).fit(rows.limit(1))
    with pytest.raises(InputError, match="column 'prediction' already"):
        model.transform(pairs(spark).withColumn("prediction", F.lit(1)))
    with pytest.raises(ConfigError, match="numItems = 0"):
        model.recommendForAllUsers(0)
    with pytest.raises(StateError, match="comes from"):
        _ = OracleMTLModel().rank


def test_labels_of_which_sums_of_squares_tell_nothing_are_refused(spark: SparkSession) -> None:
    for constant, says in ((1e4, None), (1e9, "subtract a constant, such as 1e\\+09"), (1e11, "subtract a constant")):
        rows = spark.createDataFrame(ratings().assign(rating=PROBLEM.label + constant))
        if says is None:
            found = estimator(spark).fit(rows).transform(rows).toPandas()
            assert (found.rating - found.prediction).var() < PROBLEM.label.var()
            continue
        with pytest.raises(StateError, match=says):
            estimator(spark).fit(rows)


def test_counts_that_are_all_alike_tell_rates_where_exposures_differ(spark: SparkSession) -> None:
    exposure = np.random.default_rng(0).normal(size=len(ratings()))
    rows = spark.createDataFrame(ratings().assign(rating=1.0, exposure=exposure))
    poisson = estimator(spark, settings={**FAST, "model.loss": "poisson"})
    with pytest.raises(StateError, match="the label 1: there is nothing to learn"):
        poisson.fit(rows)
    found = poisson.setOffsetCol("exposure").fit(rows).transform(rows).toPandas()
    assert found[["exposure", "prediction"]].corr().iloc[0, 1] > 0.5


def test_attributes_with_one_name_twice_are_told(spark: SparkSession) -> None:
    rows = spark.createDataFrame(items()).toDF("item", "year", "Year")
    with pytest.raises(InputError, match="columns year, Year have the same name but for its case"):
        estimator(spark).setItemAttributes(rows).fit(spark.createDataFrame(ratings()))


def test_half_lives_want_times(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_MODEL__HALF_LIFE_DAYS", "3")
    with pytest.raises(ConfigError, match="needs a time of every event"):
        estimator(spark).fit(spark.createDataFrame(ratings()))


def test_params_and_settings_meet_in_one_place() -> None:
    of = OracleMTL(rank=3, settings={"model.k": 5, "train.iterations": 4, "oracle.params": {"max_depth": 2}})
    settings = of.read_settings()
    assert (settings.model.k, settings.train.iterations, settings.oracle.params) == (3, 4, {"max_depth": 2})
    assert OracleMTL().read_settings() == load_settings()
    assert "model.k" in of.explainParam("rank")
    assert of.setSeed(7).setOracle("identity").getSeed() == 7


def test_importing_the_package_does_not_import_pyspark() -> None:
    script = "import sys, mtl; assert 'pyspark' not in sys.modules; assert 'OracleMTL' in dir(mtl)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_examples_in_the_docstrings_run(spark: SparkSession, tmp_path: Path) -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    found = finder.find(mtl.ml.OracleMTL, globs={"spark": spark, "folder": str(tmp_path)})
    for example in found:
        runner.run(example)
    assert runner.summarize().attempted >= 10
    assert runner.summarize().failed == 0
