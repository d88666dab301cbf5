"""Kafka to users with a real broker, which dies in the middle and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from broker import Broker, Unavailable
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import schema
from mtl.audit import audit
from mtl.config import Settings, load_settings
from mtl.errors import StateError
from mtl.ingest import ingest_files
from mtl.intake import Tally, ingest_stream
from mtl.retrain import retrain
from mtl.session import jars_folder
from mtl.tables import Tables
from mtl.update import update

PROBLEM = planted(7, users=20, inputs=12, k=2, events=400)
TOPIC = "events"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def broker(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if not any(jars_folder().glob("spark-sql-kafka-*.jar")):
        pytest.skip("Spark's Kafka connector is not installed: 'make setup' fetches it from Maven Central")
    java = spark._jvm.java.lang.System.getProperty("java.home") + "/bin/java"
    try:
        broker = Broker(java, tmp_path_factory.mktemp("broker"))
        broker.start()
    except Unavailable as error:
        pytest.skip(str(error))
    yield broker
    broker.kill()


def settings(broker: Broker, *assignments: str) -> Settings:
    fixed = ["model.k=2", "train.iterations=1", "source.kind=kafka", f"source.topic={TOPIC}"]
    fixed += [f"source.bootstrap_servers={broker.address}", "source.trigger_seconds=0.2", *assignments]
    return load_settings(assignments=fixed)


def value(i: int) -> str:
    event = {"event_id": f"e{i}", "user_id": f"u{PROBLEM.user[i]}", "input_id": f"x{PROBLEM.input[i]}"}
    return json.dumps({**event, "label": PROBLEM.label[i], "weight": PROBLEM.weight[i], "added": "later"})


def produce(spark: SparkSession, broker: Broker, values: list[str]) -> None:
    rows = spark.createDataFrame([(text,) for text in values], "value string")
    options = {"kafka.bootstrap.servers": broker.address, "topic": TOPIC}
    rows.write.format("kafka").options(**options).save()


def test_kafka_to_users_through_a_broker_restart(tables: Tables, broker: Broker, tmp_path: Path) -> None:
    spark = tables.spark
    (tmp_path / "base.jsonl").write_text("\n".join(value(i) for i in range(250)))
    ingest_files(tables, settings(broker), str(tmp_path / "base.jsonl"))
    retrain(tables, settings(broker))
    bad = ['{"user_id": "u1"', '{"user_id": "u1", "input_id": "x1", "label": "much"}', '["no object"]']
    produce(spark, broker, [value(i) for i in range(240, 300)] + bad)

    stop, results = threading.Event(), []
    limited = settings(broker, "source.max_events_per_trigger=80")

    def stream() -> None:
        try:
            results.append(ingest_stream(tables, limited, available_now=False, stop=stop))
        except Exception as error:
            results.append(error)

    def wait_for(n: int) -> None:
        deadline = time.monotonic() + 60
        while tables.read(schema.EVENTS).count() < n:
            assert thread.is_alive(), results
            assert time.monotonic() < deadline
            time.sleep(0.3)

    thread = threading.Thread(target=stream)
    thread.start()
    wait_for(300)
    broker.kill()
    time.sleep(2)
    broker.start()
    produce(spark, broker, [value(i) for i in range(290, 400)])
    wait_for(400)
    stop.set()
    thread.join(60)
    tally = results[0]
    assert isinstance(tally, Tally), tally
    rest = ingest_stream(tables, limited)
    assert tally.offered + rest.offered == 60 + 3 + 110
    assert tally.accepted + rest.accepted == 150
    assert tally.quarantined + rest.quarantined == 3
    assert tally.batches >= 3
    reasons = {row[schema.RAW]: row[schema.REASON] for row in tables.read(schema.QUARANTINE).collect()}
    assert [reasons[text].split(" JSON")[0] for text in bad] == ["malformed", "label is not a number", "malformed"]
    assert update(tables, settings(broker))["applied"] == 150
    assert audit(tables, settings(broker))["failed"] is False
    stored = tables.read(schema.EVENTS).orderBy(F.substring(schema.EVENT_ID, 2, 9).cast("int")).toPandas()
    np.testing.assert_array_equal(stored[schema.LABEL], PROBLEM.label)


def test_without_the_connector_the_source_says_what_is_missing(
    spark: SparkSession, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = type(spark.readStream)
    real = reader.format
    monkeypatch.setattr(reader, "format", lambda self, name: real(self, name.replace("kafka", "no_such_source")))
    assignments = ["source.kind=kafka", "source.topic=t", "source.bootstrap_servers=127.0.0.1:1"]
    with pytest.raises(StateError, match=r"Kafka's jars are not beside Spark's own: .*make setup"):
        ingest_stream(tables, load_settings(assignments=assignments))
