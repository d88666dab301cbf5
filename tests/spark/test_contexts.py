"""Offsets and contexts from files through training, stream and audit to evaluation, estimator and server."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import OracleMTL, OracleMTLModel, schema
from mtl.audit import audit
from mtl.config import Settings, load_settings
from mtl.effects import of_one
from mtl.errors import ConfigError, InputError
from mtl.evaluate import evaluate
from mtl.explain import explain
from mtl.ingest import ingest_events
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.portable import load_portable, save_portable
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, USERS, WEIGHT
from mtl.score import PREDICTION, STD, score
from mtl.serving import scorer
from mtl.serving.observations import Event
from mtl.serving.overlay import open_overlay
from mtl.serving.refresh import Refresher
from mtl.serving.source import Source
from mtl.serving.store import Store
from mtl.serving.view import open_view
from mtl.tables import Tables
from mtl.update import update

PROBLEM = planted(6, users=15, inputs=10, k=1, events=600)
TRAINED, STREAMED = 350, 500  # then those to evaluate on
HOURS = {"6": -1.5, "12": 0.5, "18": 1.5}
CONTEXTS = 'model.contexts=["hour", "device"]'


def settings(*assignments: str) -> Settings:
    common = ["tables.root=unused", "model.k=1", "train.iterations=4", "update.max_files_per_trigger=1"]
    return load_settings([], [*common, "encode.min_category_count=1", *assignments])


def everything(loss: str = "squared") -> pd.DataFrame:
    """Events with an hour (a number, as text or not, sometimes missing), a device without an effect, and an offset."""
    random, n = np.random.default_rng(1), len(PROBLEM)
    hour, offset = random.choice([*HOURS], n), random.normal(size=n)
    h = PROBLEM.label - 3 + offset + np.array([HOURS[one] for one in hour])
    label = {"squared": h + 3, "logistic": (h > 0) * 1.0, "poisson": np.floor(np.exp(np.clip(h / 2, -3, 3)))}[loss]
    return pd.DataFrame(
        {
            EVENT_ID: [f"e{i}" for i in range(n)],
            USER_ID: [f"u{i}" for i in PROBLEM.user],
            INPUT_ID: [f"x{i}" for i in PROBLEM.input],
            LABEL: label,
            WEIGHT: PROBLEM.weight,
            "offset": offset,
            "hour": pd.array([int(one) for one in hour], "Int64"),
            "device": random.choice(["tv", "phone", None], n),
        }
    )


def ingest(tables: Tables, folder: Path, events: pd.DataFrame, chosen: Settings, ending: str = "parquet") -> None:
    path = folder / f"{tables.version(schema.EVENTS) if tables.exists(schema.EVENTS) else 0}.{ending}"
    if ending == "csv":
        events.to_csv(path, index=False)
    else:
        events.to_parquet(path)
    report = ingest_events(tables, chosen, str(path), {})
    assert (report.accepted, report.quarantined) == (len(events), 0)


@pytest.mark.parametrize(
    "loss", ["squared", *(pytest.param(loss, marks=pytest.mark.long) for loss in ("logistic", "poisson"))]
)
def test_training_stream_audit_and_evaluation_know_offsets_and_contexts(
    spark: SparkSession, tmp_path: Path, loss: str
) -> None:
    tables, now = Tables(spark, str(tmp_path / "tables")), settings(f"model.loss={loss}", CONTEXTS)
    events = everything(loss)
    tables.create(*SCHEMAS)
    ingest(tables, tmp_path, events[:TRAINED], now)
    objective = retrain(tables, now)["objective"]
    assert max(np.diff(objective)) <= 1e-8 * abs(objective[0])
    for part in np.array_split(np.arange(TRAINED, STREAMED), 2):
        ingest(tables, tmp_path, events.iloc[part], now, "csv")
    assert update(tables, now)["events"] == STREAMED - TRAINED
    checks = audit(tables, now)
    assert checks["broken"] == []
    found = {effect.name: dict(zip(effect.values.to_pylist(), effect.mean, strict=False)) for effect in effects(tables)}
    assert found["hour"].keys() == HOURS.keys()
    assert found["device"].keys() == {"phone", "tv"}
    assert found["hour"]["6"] < found["hour"]["12"] < found["hour"]["18"]
    assert abs(found["device"]["tv"]) < 0.4
    rest = tmp_path / "rest.csv"
    events[STREAMED:].to_csv(rest, index=False)
    with_contexts = evaluate(tables, now, str(rest))
    retrain(tables, settings(f"model.loss={loss}"), promote=True)
    without = evaluate(tables, now, str(rest))
    measure = "log_loss" if loss == "logistic" else "mae"
    assert with_contexts[measure] < without[measure]


def effects(tables: Tables):
    return load_model(tables).artefact.effects


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("contexts")
    tables = Tables(spark, str(folder / "tables"))
    tables.create(*SCHEMAS)
    ingest(tables, folder, everything()[:TRAINED], settings(CONTEXTS))
    retrain(tables, settings(CONTEXTS))
    return tables


ASKED = "user_id string, input_id string, offset double, context string"


def test_a_score_is_shifted_by_offset_and_effects_whose_variance_it_has(trained: Tables, tmp_path: Path) -> None:
    model, pair = load_model(trained), ("u1", "x1")
    plain = score(trained, model, trained.spark.createDataFrame([pair], [USER_ID, INPUT_ID])).first()
    of = {effect.name: dict(zip(effect.values.to_pylist(), effect.mean, strict=False)) for effect in effects(trained)}
    both = '{"device":"tv","hour":"6"}'
    shifts = {
        (None, None): 0.0,
        (0.5, None): 0.5,
        (None, '{"hour":"6"}'): of["hour"]["6"],
        (0.5, both): 0.5 + of["hour"]["6"] + of["device"]["tv"],
        (None, '{"hour":"7"}'): 0.0,
    }
    told = score(trained, model, trained.spark.createDataFrame([(*pair, *one) for one in shifts], ASKED))
    assert told.columns == [USER_ID, INPUT_ID, "offset", "context", PREDICTION, STD]
    found = {(row["offset"], row["context"]): row for row in told.collect()}
    for one, shift in shifts.items():
        assert found[one][PREDICTION] - plain[PREDICTION] == pytest.approx(shift, abs=1e-12)
    assert found[(0.5, both)][STD] < plain[STD]
    answer = explain(trained, *pair, datetime.now(timezone.utc), 0.5, {"hour": "6", "device": "tv"})
    assert answer[PREDICTION] == found[(0.5, both)][PREDICTION]
    assert sum(addend["value"] for addend in answer["addends"]) == pytest.approx(answer[PREDICTION], abs=1e-9)
    save_portable(trained, model, tmp_path / "model")
    rows = pd.DataFrame([(*pair, 0.5, "tv", "6"), (*pair, None, None, "7")])
    rows.columns = [USER_ID, INPUT_ID, "offset", "device", "hour"]
    portable = load_portable(tmp_path / "model").predict(rows)[PREDICTION]
    assert portable.tolist() == [found[(0.5, both)][PREDICTION], plain[PREDICTION]]
    with pytest.raises(ConfigError, match="no context month"):
        explain(trained, *pair, datetime.now(timezone.utc), None, {"month": "6"})


def test_the_server_answers_and_learns_in_context_as_the_tables_do(trained: Tables, tmp_path: Path) -> None:
    store, overlay = Store(tmp_path / "store", 1), open_overlay(tmp_path / "store", [])
    Refresher(Source(trained.root), store, overlay).refresh()
    view = open_view(store, overlay, load_settings().serve, None)
    assert view is not None
    model, context = view.model, {"hour": "18", "device": "phone"}
    user = view.weights_of("u1")
    assert user is not None
    told = view.score(
        scorer.moved(user, *of_one(0.25, context, model.artefact.effects)), view.rows_of(["x1", "x2"]).rows
    )
    rows = [("u1", x, 0.25, '{"device":"phone","hour":"18"}') for x in ("x1", "x2")]
    asked = trained.spark.createDataFrame(rows, ASKED)
    wanted = score(trained, model, asked).toPandas().set_index(INPUT_ID)
    np.testing.assert_allclose(told[0], wanted.loc[["x1", "x2"], PREDICTION], atol=1e-9)
    np.testing.assert_allclose(told[1], wanted.loc[["x1", "x2"], STD], atol=1e-9)
    # What a context explains of a label says nothing of the user.
    shift, _ = of_one(None, context, model.artefact.effects)
    seen = [("new1", 4.0, {}), ("new2", 4.0 + shift, context)]
    events = (Event(f"o-{u}", u, "x3", y, 1.0, "2026-01-01T00:00:00+00:00", None, given) for u, y, given in seen)
    overlay.insert([(event, False) for event in events])
    one, other = (view.weights_of(u) for u, _, _ in seen)
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-12)
    assert abs(one.mean - view.unknown_weights.mean).max() > 0.01
    store.close()
    overlay.close()


def test_the_estimator_takes_columns_of_offsets_and_contexts(spark: SparkSession, tmp_path: Path) -> None:
    events = everything().rename(columns={"offset": "given"})
    frame, rest = (spark.createDataFrame(part) for part in (events[:STREAMED], events[STREAMED:]))
    fast = {"train.iterations": 4, "encode.min_category_count": 1}
    columns = {"userCol": USER_ID, "itemCol": INPUT_ID, "labelCol": LABEL, "weightCol": WEIGHT, "settings": fast}
    model = OracleMTL(**columns, rank=1, offsetCol="given", contextCols=["hour", "device"]).fit(frame)
    plain = OracleMTL(**columns, rank=1).fit(frame)

    def error(of: OracleMTLModel) -> float:
        return of.transform(rest).agg(F.mean(F.abs(F.col(LABEL) - F.col("prediction")))).first()[0]

    assert error(model) < 0.7 * error(plain)
    model.write().save(str(tmp_path / "model"))
    again = OracleMTLModel.load(str(tmp_path / "model"))
    assert error(again) == pytest.approx(error(model))
    with pytest.raises(InputError, match="no columns 'hour' \\(contextCols\\)"):
        model.transform(rest.drop("hour"))
    with pytest.raises(InputError, match="no columns 'hours' \\(contextCols\\)"):
        OracleMTL(**columns, contextCols=["hours"]).fit(frame)


def test_contexts_that_cannot_be_are_refused(trained: Tables, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label is a column that events have anyway"):
        retrain(trained, settings('model.contexts=["label"]'))
    with pytest.raises(ConfigError, match="hour is named twice"):
        retrain(trained, settings('model.contexts=["hour", "hour"]'))
    with pytest.raises(ConfigError, match="no event has a value of month"):
        retrain(trained, settings('model.contexts=["month"]'))
    with pytest.raises(ConfigError, match="zeros have no context"):
        retrain(trained, settings(CONTEXTS, "model.implicit_weight=0.1"))
    with pytest.raises(ConfigError, match=r'contexts works with train\.reduction = "driver" only'):
        retrain(trained, settings(CONTEXTS, "train.reduction=distributed"))
    file = tmp_path / "events.csv"
    file.write_text("user_id,input_id,label,offset,hour\nu1,x1,1,much,6\nu1,x1,1,inf,6\nu1,x1,1,,6\n")
    report = ingest_events(trained, settings(CONTEXTS), str(file), {})
    assert (report.accepted, report.quarantined) == (1, 2)
    reasons = trained.read(schema.QUARANTINE).select(schema.REASON).toPandas()[schema.REASON]
    assert sorted(reasons) == ["offset is not a number", "offset is not finite"]
    again = ingest_events(trained, settings(CONTEXTS), str(file), {})
    assert (again.accepted, again.duplicates) == (0, 1)
    file.write_text("user_id,input_id,label,offset,hour\nu1,x1,1,,7\n")  # another event: its context tells them apart
    assert ingest_events(trained, settings(CONTEXTS), str(file), {}).accepted == 1


def test_offsets_are_trained_on_in_either_reduction(trained: Tables) -> None:
    reports = [retrain(trained, settings(f"train.reduction={where}")) for where in ("driver", "distributed")]
    np.testing.assert_allclose(*(report["objective"] for report in reports), rtol=1e-9)
    model = load_model(trained, reports[1]["model_version"])
    rows = [trained.read(USERS).where(F.col(schema.MODEL_VERSION) == report["model_version"]) for report in reports]
    one, other = (frame.toPandas().set_index(USER_ID).sort_index() for frame in rows)
    np.testing.assert_allclose(np.stack(one[schema.W]), np.stack(other[schema.W]), atol=1e-8)
    assert model.contexts == []
