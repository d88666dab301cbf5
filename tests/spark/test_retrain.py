"""Retraining from tables to tables: what is written, that it is right, and that a crash leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from problems import Problem, planted, user_ids
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from mtl import blocks, gaussian, schema
from mtl.arrow import matrix
from mtl.audit import audit
from mtl.blocks import EventBlock
from mtl.config import load_settings
from mtl.engine import SparkEngine
from mtl.errors import StateError
from mtl.features import Features, from_rows
from mtl.forms import Form
from mtl.layout import SCHEMAS
from mtl.materialize import materialize
from mtl.model import Model
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import (
    EVENT_ID,
    EVENTS,
    FEATURES,
    INPUT_ID,
    INPUTS,
    LABEL,
    MODELS,
    USER_ATTRIBUTES,
    USER_ID,
    USERS,
    WEIGHT,
)
from mtl.tables import Tables
from mtl.train import Schedule

PROBLEM = planted(0, users=25, inputs=15, k=2, events=300)
FAST = ("model.k=2", "train.iterations=3", "encode.min_category_count=1")


def event_rows(problem: Problem) -> pd.DataFrame:
    return pd.DataFrame(
        {
            EVENT_ID: [f"e{i}" for i in range(len(problem))],
            USER_ID: user_ids(problem.user).to_pylist(),
            INPUT_ID: [f"x{i}" for i in problem.input],
            LABEL: problem.label,
            WEIGHT: problem.weight,
        }
    )


def fill(tables: Tables, events: pd.DataFrame, inputs: pd.DataFrame | None, users: pd.DataFrame | None) -> Tables:
    spark = tables.spark
    tables.create(*SCHEMAS)
    typed = {field.name: field.dataType for field in SCHEMAS[EVENTS]}
    rows = spark.createDataFrame(events)
    missing = [F.lit(None).cast(kind).alias(name) for name, kind in typed.items() if name not in rows.columns]
    tables.append(EVENTS, rows.select("*", *missing).select(*typed))
    for table, attributes in ((INPUTS, inputs), (USER_ATTRIBUTES, users)):
        if attributes is not None:
            tables.append(table, spark.createDataFrame(attributes), evolve=True)
    return tables


def attributed(tables: Tables) -> Tables:
    """Inputs x0 … x16 of which x15 and x16 have no event, users u0 … u19 and u90, the others without attributes."""
    random = np.random.default_rng(1)
    genres = [["a"], ["a", "b"], [], None, ["c"]]
    inputs = pd.DataFrame(
        {
            INPUT_ID: [f"x{i}" for i in range(1, 17)],  # x0 has events and no row
            "year": random.normal(1990, 10, 16),
            "genres": [genres[i % 5] for i in range(16)],
        }
    )
    users = pd.DataFrame({USER_ID: [*(f"u{i}" for i in range(20)), "u90"], "age": random.normal(40, 9, 21)})
    return fill(tables, event_rows(PROBLEM), inputs, users)


def settings(*assignments: str):
    return load_settings(assignments=[*FAST, *assignments])


def of_version(tables: Tables, table: str, version: int) -> DataFrame:
    return tables.read(table).where(F.col(schema.MODEL_VERSION) == version)


@dataclass(frozen=True)
class Trained:
    tables: Tables
    report: dict

    @property
    def model(self) -> Model:
        return load_model(self.tables, self.report["model_version"])

    def features(self) -> tuple[list[str], Features, np.ndarray]:
        rows = of_version(self.tables, FEATURES, self.report["model_version"]).orderBy(INPUT_ID).toArrow()
        return rows[INPUT_ID].to_pylist(), from_rows(rows, self.model.d), matrix(rows[schema.RESIDUAL], self.model.d)


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tables = attributed(Tables(spark, str(tmp_path_factory.mktemp("trained"))))
    return Trained(tables, retrain(tables, settings()))


# --- The engine -------------------------------------------------------------------------------------------------------


def block_rows(spark: SparkSession, parts: list[EventBlock], partitions: int) -> DataFrame:
    rows = [[column[0].as_py() for column in blocks.to_arrow(part).columns] for part in parts]
    return spark.createDataFrame(rows, blocks.DDL).repartition(partitions).persist()


def assert_trains_the_same(problem: Problem, rows: DataFrame, loss: str = "squared", zero_weight: float = 0.0) -> None:
    local = problem.engine(2, loss=loss)
    local.specification = replace(local.specification, zero_weight=zero_weight)
    distributed = SparkEngine(rows, local.specification)
    fits = [problem.train(2, Schedule(3), engine=engine, loss=loss) for engine in (local, distributed)]
    distributed.close()
    np.testing.assert_allclose(fits[1].objective, fits[0].objective, rtol=1e-9)
    np.testing.assert_allclose(distributed.inputs.mean, local.inputs.mean, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(fits[1].users.covariance, fits[0].users.covariance, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("partitions", [1, 2, 3])
def test_users_in_spark_train_the_same_model_as_users_in_this_process(spark: SparkSession, partitions: int) -> None:
    users = np.arange(len(PROBLEM.user_attributes))
    parts = [PROBLEM.block(users[users % partitions == i]) for i in range(partitions)]
    assert_trains_the_same(PROBLEM, block_rows(spark, parts, partitions))


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_working_values_in_spark_are_those_of_this_process(spark: SparkSession, loss: str) -> None:
    counts = replace(PROBLEM, label=np.clip(np.round(PROBLEM.label - 2), 0, 1 if loss == "logistic" else None))
    users = np.arange(len(PROBLEM.user_attributes))
    assert_trains_the_same(counts, block_rows(spark, [counts.block(users[users % 2 == i]) for i in range(2)], 2), loss)


def test_zeros_of_all_pairs_in_spark_are_those_of_this_process(spark: SparkSession) -> None:
    users = np.arange(len(PROBLEM.user_attributes))
    rows = block_rows(spark, [PROBLEM.block(users[users % 2 == i]) for i in range(2)], 2)
    assert_trains_the_same(PROBLEM, rows, zero_weight=0.1)


def test_plans_of_logistic_passes_grow_by_a_pass_each_and_do_not_double(spark: SparkSession) -> None:
    labels = replace(PROBLEM, label=np.clip(np.round(PROBLEM.label - 2), 0, 1))
    adaptive = "spark.sql.adaptive.enabled"
    before = spark.conf.get(adaptive)
    spark.conf.set(adaptive, "true")  # Spark's own default
    try:
        engine = SparkEngine(block_rows(spark, [labels.block()], 1), labels.specification(1, "logistic"))
        lengths = []
        for _ in range(4):
            engine.update_users(labels.user_prior(1), 1.0)
            lengths.append(len(engine.state._jdf.queryExecution().toString()))
        engine.close()
        assert spark.conf.get(adaptive) == "true"
    finally:
        spark.conf.set(adaptive, before)
    grown = np.diff(lengths)
    assert grown[-1] < 1.5 * grown[0]


def test_partitions_without_users_and_blocks_without_events_change_nothing(spark: SparkSession) -> None:
    events = PROBLEM.take(PROBLEM.user < 24)
    rows = block_rows(spark, [events.block(np.arange(24)), events.block(np.array([24]))], 5)
    assert_trains_the_same(events, rows)


# --- What is written --------------------------------------------------------------------------------------------------


def test_the_first_version_is_live_and_reports_what_it_did(trained: Trained) -> None:
    report = trained.report
    assert (report["model_version"], report["status"], report["k"], report["iterations"]) == (1, schema.LIVE, 2, 3)
    assert (report["rows"], report["users"], report["inputs"]) == (300, 26, 17)
    assert len(report["objective"]) == 5
    model = trained.model
    assert model.status == schema.LIVE
    assert (model.form, model.loss, model.noise) == (Form(2), "squared", report["noise"])
    assert (model.label_min, model.label_max) == (PROBLEM.label.min(), PROBLEM.label.max())
    assert model.mu == pytest.approx(PROBLEM.mean_label)
    assert model.events_version == trained.tables.version(EVENTS)


def test_every_input_of_the_events_or_the_inputs_table_has_features(trained: Trained) -> None:
    ids, features, _ = trained.features()
    assert ids == sorted(f"x{i}" for i in range(17))
    for array in (features.offset, features.phi, features.second_moment, features.offset_phi):
        assert np.isfinite(array).all()
    np.testing.assert_array_equal(features.phi[:, 0], 1)


def test_every_user_with_events_or_attributes_has_a_row_equal_to_a_pass_over_its_events(trained: Trained) -> None:
    model, (ids, features, _) = trained.model, trained.features()
    rows = of_version(trained.tables, USERS, 1).toPandas().set_index(USER_ID)
    assert sorted(rows.index) == sorted({*(f"u{i}" for i in range(25)), "u90"})
    place = {name: i for i, name in enumerate(ids)}
    S = np.linalg.inv(model.artefact.users.covariance)
    for user, row in rows.iterrows():
        A, b, n = np.zeros((3, 3)), np.zeros(3), 0
        for u, x, y, c in zip(PROBLEM.user, PROBLEM.input, PROBLEM.label, PROBLEM.weight, strict=True):
            if f"u{u}" == user:
                i, n = place[f"x{x}"], n + 1
                A += c * gaussian.unpack(features.second_moment, 3)[i]
                b += c * (y * features.phi[i] - features.offset_phi[i])
        np.testing.assert_allclose(gaussian.unpack(np.array(row[schema.A]), 3), A, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(row[schema.B], b, rtol=1e-9, atol=1e-9)
        w = np.linalg.solve(S + A / model.noise, S @ row[schema.PRIOR_MEAN] + b / model.noise)
        np.testing.assert_allclose(row[schema.W], w, rtol=1e-8, atol=1e-9)
        assert row[schema.N_EVENTS] == n
    # By age and activity, nearly every user has a prior mean of its own.
    assert len({tuple(mean) for mean in rows[schema.PRIOR_MEAN]}) > 20


def test_features_are_what_the_stored_model_says_of_an_input_and_the_residual(trained: Trained) -> None:
    model, (ids, features, residual) = trained.model, trained.features()
    # Of inputs without events; those of the others count their events among the attributes.
    known = trained.tables.read(INPUTS).where(F.col(INPUT_ID).isin("x15", "x16")).orderBy(INPUT_ID).toPandas()
    rows = [ids.index("x15"), ids.index("x16")]
    said = model.input_basis(known) + residual[rows]
    np.testing.assert_allclose(features.phi[rows, 1:], said[:, 1:], atol=1e-9)
    np.testing.assert_allclose(features.offset[rows], said[:, 0] + model.mu, atol=1e-9)


def test_a_user_without_attributes_or_events_has_one_prior_mean_wherever_it_is_asked(trained: Trained) -> None:
    model = trained.model
    nobody = model.prior_mean_of_new(pd.DataFrame({"age": [np.nan]}))
    np.testing.assert_allclose(nobody, model.artefact.users.coefficients[:1])
    np.testing.assert_allclose(model.prior_mean_of_new(pd.DataFrame(index=[0])), nobody)


def test_a_crash_before_the_model_row_leaves_nothing_that_the_next_version_does_not_clear(trained: Trained) -> None:
    tables = trained.tables
    crashed = 1 + tables.read(MODELS).count()
    for table in (FEATURES, USERS):
        orphans = of_version(tables, table, 1).limit(7)
        tables.append(table, orphans.withColumn(schema.MODEL_VERSION, F.lit(crashed).cast("long")))
    report = retrain(tables, settings("model.k=1", "train.iterations=2", "train.partitions=3"))
    # Settings force rank and passes; a version after the first waits to be promoted.
    assert (report["model_version"], report["status"]) == (crashed, schema.CANDIDATE)
    assert (report["k"], report["iterations"], len(report["objective"])) == (1, 2, 3)
    assert load_model(tables).version == 1
    for table, key, n in ((FEATURES, INPUT_ID, 17), (USERS, USER_ID, 26)):
        rows = of_version(tables, table, crashed)
        assert rows.count() == rows.select(key).distinct().count() == n
        assert of_version(tables, table, 1).count() == n
    assert {len(row[schema.PHI]) for row in of_version(tables, FEATURES, crashed).collect()} == {2}


# --- What cannot be trained on ----------------------------------------------------------------------------------------


def test_no_events_and_labels_all_equal_are_told_and_leave_no_version(tables: Tables) -> None:
    with pytest.raises(StateError, match=r"there are no events to train on: run jobs/ingest\.py first"):
        retrain(tables, settings())
    same = PROBLEM.take(np.arange(5))
    fill(tables, event_rows(replace(same, label=np.full(5, 4.0))), None, None)
    with pytest.raises(StateError, match="all 5 events have the label 4"):
        retrain(tables, settings())
    assert tables.read(MODELS).isEmpty()


def test_a_holdout_that_leaves_nothing_is_told(tables: Tables) -> None:
    fill(tables, event_rows(PROBLEM.take(np.arange(5))), None, None)
    with pytest.raises(StateError, match=r"train\.holdout: all events are held out"):
        retrain(tables, settings("train.iterations=auto", "train.holdout=0.9999"))


# --- Oracles and bare data --------------------------------------------------------------------------------------------


def test_events_alone_are_enough_for_factorization(tables: Tables) -> None:
    fill(tables, event_rows(PROBLEM), None, None)
    report = retrain(tables, settings("oracle.kind=identity", "train.iterations=auto", "train.max_iterations=4"))
    trained = Trained(tables, report)
    assert report["iterations"] <= 4
    assert trained.model.artefact.input_encoder.width == 1
    assert len(trained.features()[0]) == len(np.unique(PROBLEM.input))
    # All that is known of a new input is the average of the others.
    new = trained.model.features_of_new(pd.DataFrame(index=[0]))
    assert np.isfinite(new.phi).all()


@pytest.mark.parametrize(
    "oracle",
    [
        ("oracle.kind=sklearn", "oracle.factory=sklearn.tree:DecisionTreeRegressor", "oracle.params={max_depth = 2}"),
        ("oracle.kind=spark", "oracle.factory=pyspark.ml.regression:LinearRegression", "oracle.residual=false"),
        ("oracle.kind=sklearn", "oracle.factory=sklearn.linear_model:Ridge", "train.algorithm=boosted"),
    ],
    ids=["sklearn", "pyspark", "boosted"],
)
def test_a_black_box_trains_and_its_stored_functions_predict_the_same(
    trained: Trained, oracle: tuple[str, ...]
) -> None:
    tables = trained.tables
    trained = Trained(tables, retrain(tables, settings(*oracle, "model.k=1", "train.iterations=2")))
    report, model = trained.report, trained.model
    assert np.isfinite(report["objective"]).all()
    assert report["damped_oracle_steps"] + report["refused_oracle_steps"] <= 4
    assert np.diff(report["objective"]).max() <= 1e-6
    ids, features, residual = trained.features()
    if "oracle.residual=false" in oracle:
        np.testing.assert_allclose(residual, 0, atol=1e-9)
    # x16 has no event: what was stored for it is the functions' prediction, here and when loaded anew.
    known = tables.read(INPUTS).where(F.col(INPUT_ID) == "x16").toPandas()
    i = ids.index("x16")
    np.testing.assert_allclose(residual[i], 0, atol=1e-9)
    np.testing.assert_allclose(model.input_basis(known)[0, 1:], features.phi[i, 1:], atol=1e-9)
    np.testing.assert_allclose(model.input_basis(known)[0, 0] + model.mu, features.offset[i], atol=1e-9)
    again = load_model(tables, model.version).features_of_new(known.assign(year=2024.0))
    np.testing.assert_array_equal(again.phi, model.features_of_new(known.assign(year=2024.0)).phi)


# --- Supervised features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignments", "arrived"),
    [
        ((), ["x15", "x16"]),
        *(
            pytest.param(assignments, arrived, marks=pytest.mark.long)
            for assignments, arrived in (
                (("model.form=multilevel",), ["x15", "x16"]),
                (("oracle.kind=identity",), ["x15", "x16"]),
                (("train.reduction=distributed",), ["x15", "x16"]),
                (("oracle.kind=sklearn", "oracle.factory=sklearn.tree:DecisionTreeRegressor"), ["x15", "x16"]),
                (("model.implicit_weight=0.1", "train.holdout=0"), []),  # zeros of every user are known of them
            )
        ),
    ],
)
def test_inputs_without_events_are_written_to_be_learnt_online(
    tables: Tables, assignments: tuple[str, ...], arrived: list[str]
) -> None:
    model = Trained(attributed(tables), retrain(tables, settings(*assignments))).model
    stored = of_version(tables, FEATURES, 1).where(F.col(schema.N_EVENTS).isNotNull()).orderBy(INPUT_ID).toArrow()
    assert stored[INPUT_ID].to_pylist() == arrived
    attributes = tables.read(INPUTS).where(F.col(INPUT_ID).isin(arrived)).orderBy(INPUT_ID).toPandas()
    if arrived:
        expected = model.features_of_new(attributes.drop(columns=INPUT_ID))
        np.testing.assert_allclose(
            matrix(stored[schema.SECOND_MOMENT], gaussian.packed_length(model.d)), expected.second_moment, atol=1e-9
        )
    assert audit(tables, settings())["checks"]["features_equal_oracle"]["materialized_since"] == 0


@pytest.mark.long
def test_supervised_features_are_stored_functions_that_new_inputs_without_labels_have_too(tables: Tables) -> None:
    attributed(tables)
    report = retrain(tables, settings('supervised.labels=["genres"]', "supervised.min_count=2", "model.k=auto"))
    model = Trained(tables, report).model
    encoder = model.artefact.input_encoder
    assert report["k"] == 0
    assert encoder.names == ("genres=a", "genres=b", "genres=c")
    assert model.form == Form(0, encoder.predicted)
    new = pd.DataFrame({INPUT_ID: ["new"], "year": [1990.0]})
    tables.append(INPUTS, tables.spark.createDataFrame(new), evolve=True)
    assert materialize(tables, model) == 1
    ids, features, _ = Trained(tables, report).features()
    expected = encoder(new)[0, encoder.predicted]
    np.testing.assert_allclose(features.phi[ids.index("new"), 1:], expected, atol=1e-12)
    checks = audit(tables, settings())["checks"]
    assert checks["features_equal_oracle"]["holds"]
    assert checks["features_equal_oracle"]["materialized_since"] == 1
    assert checks["users_equal_scratch"]["holds"]
