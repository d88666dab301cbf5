"""Ingest: what is accepted, what is refused and why, and that a crash anywhere loses and doubles nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import ingest as module
from mtl import schema
from mtl.attributes import AttributeReport
from mtl.batches import IngestReport, recover
from mtl.command import parse_renames
from mtl.config import Settings, load_settings
from mtl.errors import InputError, StateError
from mtl.ingest import ingest_events, ingest_files
from mtl.layout import SCHEMAS
from mtl.parse import EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS, typed_events
from mtl.read import match, open_file
from mtl.schema import EVENTS, INPUTS, LEDGER, QUARANTINE, USER_ATTRIBUTES
from mtl.tables import Tables

SETTINGS = load_settings(assignments=["ingest.recover_after_minutes=0"])
COUNTS = ("offered", "accepted", "duplicates", "quarantined")


@pytest.fixture(scope="module")
def shared(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Tables for tests that look only at their own batch or attributes."""
    return Tables(spark, str(tmp_path_factory.mktemp("shared")))


def counts(report: IngestReport) -> tuple[int, ...]:
    return tuple(getattr(report, name) for name in COUNTS)


def ingest_inputs(tables: Tables, settings: Settings, path: str, columns: dict[str, str]) -> AttributeReport:
    return ingest_files(tables, settings, inputs=path, columns=columns)[1][INPUTS]


def text_file(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return str(folder / name)


def batch_of(tables: Tables, table: str, report: IngestReport) -> list[dict]:
    return [row.asDict() for row in tables.read(table).where(F.col(schema.BATCH) == report.batch).collect()]


def test_every_reason_of_refusal_is_kept_with_the_raw_row_and_offered_adds_up(shared: Tables, tmp_path: Path) -> None:
    cases = {
        ",i,1,,": "user_id is missing",
        "u,,1,,": "input_id is missing",
        "u,i,,,": "label is missing",
        "u,i,abc,,": "label is not a number",
        "u,i,1d,,": "label is not a number",
        "u,i,NaN,,": "label is not finite",
        "u,i,-Infinity,,": "label is not finite",
        "u,i,1,heavy,": "weight is not a number",
        "u,i,1,Infinity,": "weight is not finite",
        "u,i,1,0,": "weight is not above 0",
        "u,i,2e12,,": "label is beyond 1e+12",
        "u,i,1,1.7e18,": "weight is beyond 1e+12",
        "u,i,1,-2,": "weight is not above 0",
        "u,i,1,,yesterday": "event_time is not understood",
        "u,i,1,,12:30": "event_time is not understood",
        ",i,abc,-1,": "user_id is missing; label is not a number; weight is not above 0",
        "u,i,1": "malformed CSV",
        "u,i,1,,,surplus": "malformed CSV",
    }
    good = ["u,i,1,,", "u,i,2,0.5,2024-05-01T12:00:00Z", "u,i,1,,"]
    names = "user_id,input_id,label,weight,event_time"
    path = text_file(tmp_path, "events.csv", names, *cases, *good)
    report = ingest_events(shared, SETTINGS, path, {})
    assert counts(report) == (len(cases) + 3, 2, 1, len(cases))
    refused = batch_of(shared, QUARANTINE, report)
    assert Counter(row[schema.REASON] for row in refused) == Counter(cases.values())
    assert {row[schema.SOURCE] for row in refused} == {path}
    raw = {row[schema.REASON]: json.loads(row[schema.RAW]) for row in refused}
    assert raw["event_time is not understood"]["user_id"] == "u"
    assert raw["label is missing"] == {**dict.fromkeys(names.split(",")), "user_id": "u", "input_id": "i"}
    weights = {row[schema.LABEL]: row[schema.WEIGHT] for row in batch_of(shared, EVENTS, report)}
    assert weights == {1.0: 1.0, 2.0: 0.5}


def test_csv_parquet_and_json_of_the_same_rows_give_the_same_documented_ids(shared: Tables, tmp_path: Path) -> None:
    times = pd.to_datetime(["2024-05-01 12:00:00.25", "1999-12-31 23:59:59", "2024-05-01"], format="ISO8601")
    rows = pd.DataFrame(
        {"user_id": [7, 8, 9], "input_id": ["a", "b", "é"], "label": [0.1, -3, 1e10], "event_time": times}
    )
    rows.to_csv(tmp_path / "same.csv", index=False)
    rows.astype({"label": "float32", "user_id": float}).to_parquet(tmp_path / "same.parquet")
    rows.to_json(tmp_path / "same.jsonl", orient="records", lines=True, date_format="iso")
    first = ingest_events(shared, SETTINGS, str(tmp_path / "same.csv"), {})
    assert counts(first) == (3, 3, 0, 0)
    for ending in ("parquet", "jsonl", "csv"):
        assert counts(ingest_events(shared, SETTINGS, str(tmp_path / f"same.{ending}"), {})) == (3, 0, 3, 0), ending
    by_user = {row[schema.USER_ID]: row for row in batch_of(shared, EVENTS, first)}
    content = "7\x1fa\x1f0.1\x1f1.0\x1f1714564800250000"
    assert by_user["7"][schema.EVENT_ID] == hashlib.sha256(content.encode()).hexdigest()[:32]
    assert by_user["8"][schema.EVENT_TIME].replace(tzinfo=None) == datetime(1999, 12, 31, 23, 59, 59)


def test_an_epoch_is_read_in_seconds_milliseconds_microseconds_and_nanoseconds(
    spark: SparkSession, tmp_path: Path
) -> None:
    texts = ["1700000000.5", "1700000000500", "1700000000500000", "1700000000500000000", "2023-11-14T22:13:20.5Z"]
    path = text_file(tmp_path, "t.csv", "user_id,input_id,label,event_time", *(f"u,i,1,{text}" for text in texts))
    times = typed(spark, path).select(F.unix_micros(schema.EVENT_TIME)).collect()
    assert {row[0] for row in times} == {1_700_000_000_500_000}


def typed(spark: SparkSession, path: str, loss: str = "squared"):
    file = open_file(spark, path, SETTINGS.ingest, texts=None)
    return typed_events(file, match(file, {}, EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS), loss)


def test_logistic_loss_refuses_labels_other_than_0_and_1(spark: SparkSession, tmp_path: Path) -> None:
    path = text_file(tmp_path, "t.csv", "user_id,input_id,label", "u,i,0", "u,i,1", "u,i,0.5", "u,i,-1")
    for loss, refused in (("logistic", {0.5, -1.0}), ("squared", set())):
        rows = typed(spark, path, loss).where(F.col(schema.REASON).isNotNull()).collect()
        assert {row[schema.LABEL] for row in rows} == refused


def test_given_ids_count_once_and_empty_ones_are_derived_and_text_labels_do_not_stop_json(
    shared: Tables, tmp_path: Path
) -> None:
    lines = [
        '{"event_id": "given-1", "user_id": 1, "input_id": "i", "label": 5}',
        '{"event_id": "given-1", "user_id": 1, "input_id": "i", "label": 4}',
        '{"event_id": "", "user_id": 2, "input_id": "i", "label": 3}',
        '{"user_id": 3, "input_id": "i", "label": "good"}',
        '{"user_id": 3, "input_id": "i", "label": NaN}',
        '{"user_id": 3, "input_id":',
    ]
    report = ingest_events(shared, SETTINGS, text_file(tmp_path, "e.jsonl", *lines), {})
    assert counts(report) == (6, 2, 1, 3)
    labels = {row[schema.EVENT_ID]: row[schema.LABEL] for row in batch_of(shared, EVENTS, report)}
    assert labels.pop("given-1") == 4.0  # of rows that differ, the smallest, whatever their order
    assert list(labels.values()) == [3.0]
    assert all(re.fullmatch("[0-9a-f]{32}", derived) for derived in labels)
    reasons = {row[schema.REASON]: row[schema.RAW] for row in batch_of(shared, QUARANTINE, report)}
    assert set(reasons) == {"label is not a number", "label is not finite", "malformed JSON"}
    assert json.loads(reasons["malformed JSON"]) == {"malformed": lines[-1]}


def test_half_duplicates_of_a_renamed_folder_are_counted_and_numeric_ids_become_text(
    shared: Tables, tmp_path: Path
) -> None:
    n = 100
    rows = pd.DataFrame({"who": [float(i) for i in range(n)], "item": range(n), "stars": [1.5] * n})
    (tmp_path / "folder").mkdir()
    for part in ("a", "b"):
        rows.to_parquet(tmp_path / "folder" / f"{part}.parquet")
    renames = parse_renames("user_id=who, input_id=item,label=stars")
    report = ingest_events(shared, SETTINGS, str(tmp_path / "folder"), renames)
    assert counts(report) == (2 * n, n, n, 0)
    assert {row[schema.USER_ID] for row in batch_of(shared, EVENTS, report)} == {str(i) for i in range(n)}


def test_what_cannot_be_read_is_one_clear_line_and_leaves_no_table(tables: Tables, tmp_path: Path) -> None:
    good = text_file(tmp_path, "good.csv", "user_id,input_id,label,Weights", "u,i,1,1")
    folder = tmp_path / "none"
    folder.mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    text_file(mixed, "a.csv", "user_id,input_id,label", "u,i,1")
    text_file(mixed, "b.jsonl", "{}")
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    text_file(uneven, "a.csv", "user_id,input_id,label", "u,i,1")
    text_file(uneven, "b.csv", "input_id,user_id,label", "i,u,1")
    cases = [
        (
            text_file(tmp_path, "nolabel.csv", "user_id,input_id,labl", "u,i,1"),
            {},
            "no column label; .*nearest is labl; .*--columns",
        ),
        (text_file(tmp_path, "empty.csv"), {}, "begins with a header"),
        (text_file(tmp_path, "empty.jsonl"), {}, "one JSON object on each line"),
        (text_file(tmp_path, "empty.parquet"), {}, "cannot be read as parquet"),
        (text_file(tmp_path, "broken.parquet", "PAR1 no"), {}, "cannot be read as parquet"),
        (text_file(tmp_path, "data.xyz", "x"), {}, r"cannot tell its format from its ending '\.xyz'"),
        (text_file(tmp_path, "_hidden.csv", "user_id,input_id,label"), {}, "name begins with"),
        (str(tmp_path / "nowhere.csv"), {}, "no such file or folder"),
        (str(folder), {}, "holds no file"),
        (str(mixed), {}, "mixes formats"),
        (str(uneven), {}, "have other header lines"),
        (good, {"weight": "weihgts"}, "no column weihgts; .*nearest is Weights"),
        (good, {"label": "Weights"}, "has a column label as well"),
        (good, {"genre": "kind"}, "events have no column genre"),
    ]
    for path, columns, message in cases:
        with pytest.raises(InputError, match=message) as error:
            ingest_events(tables, SETTINGS, path, columns)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        ingest_files(tables, SETTINGS, events=good, inputs=str(tmp_path / "nowhere.csv"))
    with pytest.raises(InputError, match="nothing to ingest"):
        ingest_files(tables, SETTINGS)
    assert not any(tables.exists(table) for table in SCHEMAS)


@pytest.mark.parametrize("ending", ["csv", *(pytest.param(e, marks=pytest.mark.long) for e in ("jsonl", "parquet"))])
def test_a_name_of_a_file_is_no_pattern(shared: Tables, tmp_path: Path, ending: str) -> None:
    for name, user in (("events[1]", f"in {ending}"), ("events1", "beside it")):
        frame, path = (
            pd.DataFrame({"user_id": [user], "input_id": ["i"], "label": [1.0]}),
            tmp_path / f"{name}.{ending}",
        )
        if ending == "parquet":
            frame.to_parquet(path)
        elif ending == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
    assert ingest_events(shared, SETTINGS, str(tmp_path / f"events[1].{ending}"), {}).accepted == 1
    assert not shared.read(schema.EVENTS).where(F.col("user_id") == f"in {ending}").isEmpty()


def test_what_pandas_writes_is_read(shared: Tables, tmp_path: Path) -> None:
    """An index without a name, columns twice, line ends within quotes; nanoseconds, also before 1973."""
    frame = pd.DataFrame({"user_id": ["pandas", "pandas"], "input_id": ["i", "j"], "label": [1, 2]})
    frame["note"] = ["two\nlines", 'a "word"']
    frame.to_csv(tmp_path / "index.csv")
    assert counts(ingest_events(shared, SETTINGS, str(tmp_path / "index.csv"), {})) == (2, 2, 0, 0)
    twice = text_file(tmp_path, "twice.csv", "user_id,input_id,label,x,x", "pandas,k,1,2,3")
    assert counts(ingest_events(shared, SETTINGS, twice, {})) == (1, 1, 0, 0)
    other = tmp_path / "others"
    other.mkdir()
    text_file(other, "1.csv", "user_id,input_id,label", "u,i,1")
    text_file(other, "2.csv", "user_id,label,input_id", "u,1,i")
    with pytest.raises(InputError, match=r"1\.csv and .*2\.csv have other header lines"):
        ingest_events(shared, SETTINGS, str(other), {})
    times = pd.to_datetime(["1971-05-01T00:00:00.123456", "2024-05-01T12:00:00.000000"]).astype("datetime64[ns]")
    frame.assign(event_time=times, user_id="nanos").to_parquet(tmp_path / "nanos.parquet")
    report = ingest_events(shared, SETTINGS, str(tmp_path / "nanos.parquet"), {})
    found = sorted(row[schema.EVENT_TIME] for row in batch_of(shared, EVENTS, report))
    assert [at.isoformat() for at in found] == ["1971-05-01T00:00:00.123456", "2024-05-01T12:00:00"]
    inputs = pd.DataFrame({"input_id": ["nanos"], "joined": times[1:]})
    inputs.to_parquet(tmp_path / "inputs.parquet")
    ingest_inputs(shared, SETTINGS, str(tmp_path / "inputs.parquet"), {})
    days = shared.read(INPUTS).where("input_id = 'nanos'").first()["joined"]
    assert days == pytest.approx((times[1] - pd.Timestamp(0)).total_seconds() / 86400)


@pytest.mark.parametrize("delimiter", [";", "\t", "\\t", "||"])
def test_any_delimiter_that_spark_knows_is_one(shared: Tables, tmp_path: Path, delimiter: str) -> None:
    """Also two characters that stand for a tab, as a shell hands them on."""
    sep = delimiter.replace("\\t", "\t")
    for name in ("1", "2"):
        text_file(
            tmp_path,
            f"{name}.csv",
            sep.join(["user_id", "input_id", "label"]),
            sep.join([f"d{ord(delimiter[0])}", name, "1"]),
        )
    settings = load_settings([], [f"ingest.csv_delimiter={json.dumps(delimiter)}"])
    assert settings.ingest.csv_delimiter == delimiter
    assert counts(ingest_events(shared, settings, str(tmp_path), {})) == (2, 2, 0, 0)


@pytest.mark.parametrize("end", ["", "u5,i,5,y\n", 'u5,i,5,"fine"\n', 'u5,i,5,end"\nu6,i\n'])
def test_a_stray_quote_takes_no_other_row_in(shared: Tables, tmp_path: Path, end: str) -> None:
    stray = 'user_id,input_id,label,note\nu1,i,1,ok\nu2,i,2,"stray\nu3,i,3,a 5" pipe\nu4,i,4,x\n' + end
    (tmp_path / "stray.csv").write_text(stray)
    report = ingest_events(shared, SETTINGS, str(tmp_path / "stray.csv"), {})
    lines = stray.splitlines()[1:]
    assert report.offered == len(lines)
    there = {row[schema.USER_ID] for row in shared.read(EVENTS).collect()}
    assert there >= {"u1", "u3", "u4"}
    assert {line[:2] for line in lines} - there <= {"u2", "u6"}


def test_ids_are_what_the_files_say_or_are_refused(shared: Tables, tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("user_id,input_id,label\nJosé,i,5\nJosè,i,5\n".encode("latin-1"))
    report = ingest_events(shared, SETTINGS, str(tmp_path / "latin.csv"), {})
    assert counts(report) == (2, 0, 0, 2)
    assert {row[schema.REASON] for row in batch_of(shared, QUARANTINE, report)} == {"user_id is not UTF-8"}
    part = tmp_path / "parts" / "user_id=007"
    part.mkdir(parents=True)
    pd.DataFrame({"input_id": ["i"], "label": [1.0]}).to_parquet(part / "a.parquet")
    report = ingest_events(shared, SETTINGS, str(tmp_path / "parts"), {})
    assert [row[schema.USER_ID] for row in batch_of(shared, EVENTS, report)] == ["007"]


def test_a_rename_of_no_column_of_ours_says_which_is_nearest(shared: Tables, tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.csv", "user_id,input_id,label,ts", "u,i,1,2024-01-01")
    with pytest.raises(InputError, match="events have no column time, the nearest is event_time"):
        ingest_events(shared, SETTINGS, path, {"time": "ts"})


def test_a_parquet_file_without_rows_offers_none(shared: Tables, tmp_path: Path) -> None:
    rows = pd.DataFrame({"user_id": ["u"], "input_id": ["i"], "label": [1.0]})
    rows[:0].to_parquet(tmp_path / "none.parquet")
    assert counts(ingest_events(shared, SETTINGS, str(tmp_path / "none.parquet"), {})) == (0, 0, 0, 0)


class Crash(Exception):
    pass


def crash_after(step: str, monkeypatch: pytest.MonkeyPatch, tables: Tables, path: str) -> str:
    """Ingest ``path`` up to and with ``step``; returns the batch."""
    original, batches = getattr(module, step), []

    def crashing(tables, offered):
        original(tables, offered)
        batches.append(offered.plan.batch)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(module, step, crashing)
        with pytest.raises(Crash):
            ingest_events(tables, SETTINGS, path, {})
    return batches[0]


def final_states(tables: Tables) -> dict[str, dict]:
    rows = [row.asDict() for row in tables.read(LEDGER).collect()]
    closed = [row for row in rows if row[schema.STATE] != schema.PLANNED]
    assert len({row[schema.APPLICATION_ID] for row in closed}) == len(closed)  # a batch is closed once
    return {row[schema.APPLICATION_ID].removeprefix("ingest-"): row for row in closed}


def check_every_row_is_accounted_for(tables: Tables) -> None:
    kept = {
        table: Counter(row[0] for row in tables.read(table).select(schema.BATCH).collect())
        for table in (EVENTS, QUARANTINE)
    }
    done = {batch: row for batch, row in final_states(tables).items() if row[schema.STATE] == schema.DONE}
    for batch, row in done.items():
        assert row["accepted"] == kept[EVENTS][batch]
        assert row["quarantined"] == kept[QUARANTINE][batch]
        assert row["offered"] == row["accepted"] + row["duplicates"] + row["quarantined"]
    assert kept[EVENTS].keys() | kept[QUARANTINE].keys() <= done.keys()


def test_a_crash_after_any_step_is_recovered_and_loses_and_doubles_nothing(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"_plan": schema.ABANDONED, "_quarantine": schema.ABANDONED, "_insert": schema.DONE}
    crashed = {}
    for step in expected:
        path = text_file(
            tmp_path, f"after{step}.csv", "user_id,input_id,label", f"{step},i,1", f"{step},i,1", "u,i,bad"
        )
        crashed[step] = crash_after(step, monkeypatch, tables, path)
        # A running ingest of someone else is not to be disturbed.
        assert recover(tables, older_than_minutes=60) == []
        again = ingest_events(tables, SETTINGS, path, {})
        assert counts(again) == ((3, 0, 2, 1) if step == "_insert" else (3, 1, 1, 1))
    states = final_states(tables)
    assert {step: states[batch][schema.STATE] for step, batch in crashed.items()} == expected
    check_every_row_is_accounted_for(tables)
    assert Counter(row[0] for row in tables.read(EVENTS).select(schema.USER_ID).collect()) == dict.fromkeys(expected, 1)


def test_a_slow_ingest_that_was_declared_crashed_writes_nothing_and_says_so(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_file(tmp_path, "slow.csv", "user_id,input_id,label", "slow,i,1", "u,i,bad")
    plan = module._plan

    def overtaken(tables: Tables, offered) -> None:
        plan(tables, offered)
        assert recover(tables, older_than_minutes=0) == [offered.plan.batch]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_plan", overtaken)
        with pytest.raises(StateError, match=r"ingest .* again"):
            ingest_events(tables, SETTINGS, path, {})
    assert tables.read(EVENTS).count() == tables.read(QUARANTINE).count() == 0
    assert counts(ingest_events(tables, SETTINGS, path, {})) == (2, 1, 0, 1)
    check_every_row_is_accounted_for(tables)


def test_attributes_are_upserted_by_key_and_a_new_column_joins_without_touching_old_values(
    shared: Tables, tmp_path: Path
) -> None:
    settings = load_settings(assignments=['ingest.list_columns=["genres"]', "ingest.list_separator=|"])
    lines = [
        "item,genres,year,good,day,reason",
        "007,a|b,1999,true,1970-01-02,x",
        "8,b,2000,false,,y",
        "8,b,2000,false,,y",
    ]
    lines += ["9,c,1,true,,z", "9,c,2,true,,z", ",c,3,true,,z", "10,c"]
    first = text_file(tmp_path, "first.csv", *lines)
    report = ingest_inputs(shared, settings, first, {"input_id": "item"})
    assert (report.offered, report.upserted, report.duplicates, report.quarantined) == (7, 2, 1, 4)
    refused = shared.read(QUARANTINE).where(F.col(schema.BATCH) == report.batch).select(schema.REASON).collect()
    assert Counter(row[0] for row in refused) == {
        "conflicting attributes for input_id 9": 2,
        "input_id is missing": 1,
        "malformed CSV": 1,
    }
    version = shared.version(INPUTS)
    again = ingest_inputs(shared, settings, first, {"input_id": "item"})
    assert again.upserted == 0
    changes = shared.spark.read.option("readChangeFeed", "true").option("startingVersion", version + 1)
    if shared.version(INPUTS) > version:
        assert changes.table(shared.name(INPUTS)).count() == 0
    second = text_file(tmp_path, "second.jsonl", '{"input_id": 8, "year": 2001.5, "title": "T"}', '{"input_id": 11}')
    assert ingest_inputs(shared, settings, second, {}).upserted == 2
    stored = {row["input_id"]: row.asDict() for row in shared.read(INPUTS).collect()}
    columns = ("input_id", "genres", "year", "good", "day", "reason", "title")
    assert [stored["007"][name] for name in columns] == ["007", ["a", "b"], 1999.0, "true", 1.0, "x", None]
    assert [stored["8"][name] for name in columns] == ["8", ["b"], 2001.5, "false", None, "y", "T"]
    assert stored["11"]["year"] is None
    conflict = text_file(tmp_path, "conflict.csv", "input_id,year", "8,late")
    with pytest.raises(InputError, match="column year is string, but the table inputs holds it as double"):
        ingest_inputs(shared, settings, conflict, {})


def test_one_call_takes_all_three_files_and_each_rename_where_it_belongs(shared: Tables, tmp_path: Path) -> None:
    events = text_file(tmp_path, "events.csv", "usr,itm,stars", "ann,x1,1")
    inputs = text_file(tmp_path, "items.csv", "itm,stars", "x1,4.5")
    users = text_file(tmp_path, "users.csv", "usr,age", "ann,30")
    columns = parse_renames("user_id=usr,input_id=itm,label=stars")
    report, attributes = ingest_files(shared, SETTINGS, events, inputs, users, columns)
    assert counts(report) == (1, 1, 0, 0)
    assert {table: one.upserted for table, one in attributes.items()} == {INPUTS: 1, USER_ATTRIBUTES: 1}
    assert shared.read(USER_ATTRIBUTES).collect()[0].asDict() == {"user_id": "ann", "age": 30.0}
    assert shared.read(INPUTS).where("input_id = 'x1'").collect()[0]["stars"] == 4.5


@pytest.mark.parametrize("text", ["label", "label=", "label=a,label=b", "label=a,weight=a"])
def test_a_rename_that_is_not_ours_equals_theirs_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--columns"):
        parse_renames(text)
