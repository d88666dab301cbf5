"""Scoring and evaluation over tables, against plain loops and pandas; files that cannot be evaluated on."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from sklearn.linear_model import Ridge

from mtl import baselines, gaussian, schema
from mtl.arrow import lists
from mtl.baselines import DescribedInputs, with_als, with_independent, with_input_mean
from mtl.config import load_settings
from mtl.encode import Encoder
from mtl.errors import InputError, StateError
from mtl.evaluate import evaluate
from mtl.features import Features, feature_rows
from mtl.forms import Form
from mtl.model import Artefact, Model, model_row
from mtl.models import publish
from mtl.prior import Prior
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables

SETTINGS = load_settings(
    assignments=[
        "evaluate.als_ranks=[2]",
        "evaluate.als_regularization=[0.1, 0.3]",
        "evaluate.als_iterations=3",
        "evaluate.validation_fraction=0.2",
    ]
)
D = 3
WRITTEN = (schema.USERS, schema.FEATURES, schema.EVENTS, schema.INPUTS)
USERS, INPUTS = [f"u{i}" for i in range(8)], [f"x{i}" for i in range(10)]
ATTRIBUTES = pd.DataFrame(
    {
        "year": np.linspace(1950, 2000, 11),
        # Long enough to be read as text, whose encoder takes no empty frame.
        "title": [f"the one about the number {i}" for i in range(11)],
        "genres": [["a"], ["a", "b"], ["b"], [], ["a"]] * 2 + [["b"]],
    }
)
AGES = pd.DataFrame({"age": np.linspace(20.0, 60.0, 9)})


def spd(random: np.random.Generator) -> np.ndarray:
    root = random.normal(size=(D, D))
    return root @ root.T + np.eye(D)


@pytest.fixture(scope="module")
def model() -> Model:
    random = np.random.default_rng(3)
    encode = SETTINGS.encode
    encoders = Encoder.fit(AGES, encode), Encoder.fit(ATTRIBUTES, encode)
    priors = [Prior(np.eye(e.width), spd(random) / 9, random.normal(size=(e.width, D)) / 5) for e in encoders]
    return Model(1, schema.LIVE, Form(D - 1), "squared", 3.0, 0.7, 1.0, 5.0, 0, 0, Artefact(*encoders, 0, 0, *priors))


@pytest.fixture(scope="module")
def events() -> pd.DataFrame:
    random = np.random.default_rng(5)
    n = 60
    return pd.DataFrame(
        {
            EVENT_ID: [f"e{i}" for i in range(n)],
            USER_ID: random.choice(USERS, n),
            INPUT_ID: random.choice(INPUTS, n),
            LABEL: random.integers(1, 6, n).astype(float),
            WEIGHT: random.choice([1.0, 2.0], n),
        }
    )


@pytest.fixture(scope="module")
def known(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, model: Model, events: pd.DataFrame) -> Tables:
    """Tables with a live version; x10 has attributes and no features, u8 attributes and no state."""
    tables = Tables(spark, str(tmp_path_factory.mktemp("known")))
    random = np.random.default_rng(11)
    mean, covariance = random.normal(size=(10, D)) / 2, gaussian.pack(np.stack([spd(random) / 9 for _ in INPUTS]))
    features = Features.of(mean, covariance, model.mu)
    rows = feature_rows(1, pa.array(INPUTS), features, np.zeros((10, D)), np.zeros((10, 0)))
    tables.append(schema.FEATURES, spark.createDataFrame(rows))
    a, b = gaussian.pack(np.stack([spd(random) * 5 for _ in USERS])), random.normal(size=(8, D))
    prior_mean = random.normal(size=(8, D)) / 3
    states = {
        schema.MODEL_VERSION: pa.array([1] * 8, pa.int64()),
        USER_ID: USERS,
        schema.A: lists(a),
        schema.B: lists(b),
        schema.W: lists(model.user_posteriors(a, b, prior_mean).mean),
        schema.PRIOR_MEAN: lists(prior_mean),
        schema.N_EVENTS: pa.array([events[USER_ID].eq(user).sum() for user in USERS], pa.int64()),
    }
    tables.append(schema.USERS, spark.createDataFrame(pa.table(states)))
    other = states | {schema.MODEL_VERSION: pa.array([2] * 8, pa.int64()), schema.B: lists(b + 9)}
    tables.append(schema.USERS, spark.createDataFrame(pa.table(other)))
    described = ATTRIBUTES.assign(**{INPUT_ID: [*INPUTS, "x10"]})
    tables.append(schema.INPUTS, spark.createDataFrame(pa.Table.from_pandas(described)), evolve=True)
    aged = AGES.assign(**{USER_ID: [*USERS, "u8"]})
    tables.append(schema.USER_ATTRIBUTES, spark.createDataFrame(pa.Table.from_pandas(aged)), evolve=True)
    tables.append(schema.EVENTS, spark.createDataFrame(pa.Table.from_pandas(events)))
    publish(tables, model_row(model, "shared_basis", (1.0,), len(events), {}, load_settings()))
    return tables


Rows = dict[str, Any]


@pytest.fixture(scope="module")
def stored(known: Tables) -> Rows:
    """Rows of the live version's users and features, by id."""
    states = known.read(schema.USERS).where("model_version = 1").collect()
    return {row[USER_ID]: row for row in states} | {row[INPUT_ID]: row for row in known.read(schema.FEATURES).collect()}


def by_hand(stored: Rows, model: Model, user: str, x: str) -> tuple[float, float]:
    """Prediction and standard deviation from the tables' own rows, one pair at a time."""
    prior = np.linalg.inv(model.artefact.users.covariance)
    if user in stored:
        w = np.array(stored[user][schema.W])
        V = np.linalg.inv(prior + gaussian.unpack(np.array(stored[user][schema.A]), D) / model.noise)
    else:
        frame = AGES.iloc[[8]] if user == "u8" else pd.DataFrame(index=[0])
        w, V = model.prior_mean_of_new(frame)[0], np.linalg.inv(prior)
    if x in stored:
        offset, phi = stored[x][schema.OFFSET], np.array(stored[x][schema.PHI])
        M = gaussian.unpack(np.array(stored[x][schema.SECOND_MOMENT]), D)
        cross, spread = np.array(stored[x][schema.OFFSET_PHI]) - offset * phi, stored[x][schema.OFFSET_VARIANCE]
    else:
        new = model.features_of_new(ATTRIBUTES.iloc[[10]] if x == "x10" else pd.DataFrame(index=[0]))
        offset, phi, M = new.offset[0], new.phi[0], gaussian.unpack(new.second_moment[0], D)
        cross, spread = new.offset_phi[0] - offset * phi, new.offset_variance[0]
    variance = model.noise + phi @ V @ phi + np.trace((M - np.outer(phi, phi)) @ (V + np.outer(w, w)))
    variance += spread + 2 * w @ cross
    return offset + w @ phi, variance**0.5


def test_every_kind_of_user_and_input_scores_as_by_hand_and_other_columns_come_along(
    known: Tables, stored: Rows, model: Model
) -> None:
    pairs = [(user, x) for user in ("u0", "u5", "u8", "nobody") for x in ("x0", "x7", "x10", "never")]
    at = datetime(2026, 1, 2, 3, 4, 5)
    frame = pd.DataFrame(pairs, columns=[USER_ID, INPUT_ID]).assign(a=range(len(pairs)), event_time=at, tags=None)
    frame["tags"] = [["t", str(i)] for i in range(len(pairs))]
    rows = known.spark.createDataFrame(frame)
    scored = score(known, model, rows)
    assert scored.columns == [*rows.columns, PREDICTION, STD]
    back = {(row[USER_ID], row[INPUT_ID]): row for row in scored.collect()}
    assert len(back) == len(pairs)
    for i, pair in enumerate(pairs):
        row = back[pair]
        assert (row["a"], row["event_time"], row["tags"]) == (i, at, ["t", str(i)])
        assert (row[PREDICTION], row[STD]) == pytest.approx(by_hand(stored, model, *pair), rel=1e-9)


def test_baselines_are_those_of_pandas_and_scikit_learn(known: Tables, model: Model, events: pd.DataFrame) -> None:
    mean = float(np.average(events[LABEL], weights=events[WEIGHT]))
    train = known.spark.createDataFrame(events).persist()
    pairs = [(user, x) for user in ("u0", "u3", "nobody") for x in ("x0", "x4", "x10", "never")]
    rows = known.spark.createDataFrame(pd.DataFrame(pairs, columns=[USER_ID, INPUT_ID]))
    inputs = DescribedInputs.of(known, model)
    rows = with_independent(train, with_input_mean(train, rows, mean), inputs, mean, (1.0, 10.0))
    als = baselines._als(2, 0.1, 2, SETTINGS.evaluate)
    back = {(row[USER_ID], row[INPUT_ID]): row for row in with_als(als, train, rows).collect()}
    train.unpersist()
    encoder, place = model.artefact.input_encoder, {x: i for i, x in enumerate([*INPUTS, "x10"])}
    z = {x: encoder(ATTRIBUTES.iloc[[i]])[0] for x, i in place.items()}
    z["never"] = encoder(pd.DataFrame(index=[0]))[0]
    assert len(back) == len(pairs)
    for (user, x), row in back.items():
        of_input, of_user = events[events[INPUT_ID] == x], events[events[USER_ID] == user]
        expected = mean if of_input.empty else np.average(of_input[LABEL], weights=of_input[WEIGHT])
        assert row[baselines.INPUT_MEAN] == pytest.approx(expected)
        if of_user.empty or of_input.empty:
            assert row[baselines.ALS_BEST] == row[baselines.INPUT_MEAN]
        for strength, prediction in zip((1.0, 10.0), row[baselines.INDEPENDENT], strict=True):
            expected = mean
            if not of_user.empty:
                alone = Ridge(strength, fit_intercept=False, solver="cholesky")
                alone.fit([z[i] for i in of_user[INPUT_ID]], of_user[LABEL] - mean, of_user[WEIGHT])
                expected = mean + z[x] @ alone.coef_
            assert prediction == pytest.approx(expected, rel=1e-8)


def test_a_report_adds_up_and_clips_everyone_to_the_labels_range(
    known: Tables, stored: Rows, model: Model, events: pd.DataFrame, tmp_path: Path
) -> None:
    rows = pd.DataFrame({"who": ["u0", "u1", "u2", "nobody", "u1"], INPUT_ID: ["x0", "x1", "x2", "x3", "never"]})
    rows[LABEL] = [5.0, 1.0, 50.0, 3.0, 2.0]
    rows.to_csv(tmp_path / "test.csv", index=False)
    commits = {table: known.version(table) for table in WRITTEN}
    report = evaluate(known, SETTINGS, str(tmp_path / "test.csv"), {USER_ID: "who"}, with_baselines=True)
    assert {table: known.version(table) for table in WRITTEN} == commits
    assert not known.exists(schema.QUARANTINE)

    by_pair = [by_hand(stored, model, user, x) for user, x in zip(rows["who"], rows[INPUT_ID], strict=True)]
    error = rows[LABEL] - np.clip([prediction for prediction, _ in by_pair], 1, 5)
    assert (report["n"], report["model_version"]) == (5, 1)
    assert report["rmse"] == pytest.approx(float(np.sqrt((error**2).mean())))
    assert report["mae"] == pytest.approx(float(error.abs().mean()))
    within = [abs(y - p) <= 1.6448536 * s for y, (p, s) in zip(rows[LABEL], by_pair, strict=True)]
    assert report["coverage90"] == np.mean(within)

    mean = np.average(events[LABEL], weights=events[WEIGHT])
    assert report["baselines"]["global_mean"]["mae"] == pytest.approx((rows[LABEL] - mean).abs().mean())
    assert set(report["baselines"]) == set(baselines.NAMES)
    assert report["baselines"]["als"]["rank"] == 2
    assert report["baselines"]["als"]["regularization"] in (0.1, 0.3)
    assert report["baselines"]["independent"]["strength"] in baselines.RIDGE_STRENGTHS
    groups = report["by_user_events"]
    assert sum(group["n"] for group in groups) == 5
    assert (groups[0]["from"], groups[0]["to"], groups[0]["n"], groups[0]["users"]) == (0, 0, 1, 1)
    squared = sum(group["n"] * group["baselines"]["als"]["rmse"] ** 2 for group in groups)
    assert squared / 5 == pytest.approx(report["baselines"]["als"]["rmse"] ** 2)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["user_id,input_id,label", "u0,x0,5", "u0,,5", "u0,x1,NaN"],
            "2 of 3 rows cannot be used; the first: input_id",
        ),
        (["user_id,input_id,label"], "there is no event to evaluate on"),
        (["user_id,item,label", "u0,x0,5"], "say --columns input_id=item"),
        ([], "the file is empty"),
    ],
)
def test_a_file_that_ingest_would_not_take_whole_is_refused_in_one_line(
    known: Tables, tmp_path: Path, lines: list[str], reason: str
) -> None:
    file = tmp_path / "test.csv"
    file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError, match=reason) as raised:
        evaluate(known, SETTINGS, str(file))
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_rename_without_its_column_and_tables_without_a_model_are_refused(
    known: Tables, tables: Tables, tmp_path: Path
) -> None:
    file = tmp_path / "test.csv"
    file.write_text("user_id,input_id,label\nu0,x0,5\n")
    with pytest.raises(InputError, match="weight=w"):
        evaluate(known, SETTINGS, str(file), {WEIGHT: "w"})
    with pytest.raises(StateError, match=r"no model version is live: run jobs/retrain.py"):
        evaluate(tables, SETTINGS, str(file))


def test_the_job_ends_with_one_line_that_names_the_missing_file(tmp_path: Path) -> None:
    project = Path(__file__).resolve().parents[2]
    command = [sys.executable, "jobs/evaluate.py", "--events", str(tmp_path / "none.csv")]
    settings = [f"tables.root={tmp_path}/tables", "spark.master=local[1]", "spark.driver_memory=1g"]
    command += [word for assignment in settings for word in ("--set", assignment)]
    run = subprocess.run(
        command, cwd=project, env={**os.environ, "PYTHONPATH": str(project)}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == f"evaluate: {tmp_path}/none.csv: there is no such file or folder"
