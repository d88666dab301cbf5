"""The ingest stream: each event once, in any order of crashes, other ingests and damage; drift by setting."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from mtl import ingest, intake, schema
from mtl.audit import _ingest_adds_up
from mtl.batches import Batch, recover
from mtl.config import Settings, load_settings
from mtl.erase import erase
from mtl.errors import ConfigError, InputError, ReplayError, StateError
from mtl.ingest import ingest_events
from mtl.intake import Intake, Tally, ingest_stream
from mtl.known import KnownEvents
from mtl.schema import EVENT_ID, EVENTS, LEDGER, QUARANTINE
from mtl.source import Columns, Source
from mtl.tables import Tables

COUNTS = ("offered", "accepted", "duplicates", "quarantined")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder"  # with a space
    path.mkdir()
    return path


def settings(folder: Path | str, *assignments: str) -> Settings:
    fixed = [f"source.path={folder}", "source.max_files_per_trigger=1", "ingest.recover_after_minutes=0"]
    return load_settings(assignments=[*fixed, *assignments])


def rows(ids: range, **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({"event_id": [f"e{i}" for i in ids], "user_id": "u", "input_id": "i", "label": 1.0})
    return frame.assign(**columns)


def drop(folder: Path, name: str, frame: pd.DataFrame) -> str:
    """A file that appears in the folder at once."""
    hidden = folder / f".{name}"
    if name.endswith(".parquet"):
        frame.to_parquet(hidden)
    elif name.endswith(".csv"):
        frame.to_csv(hidden, index=False)
    else:
        frame.to_json(hidden, orient="records", lines=True)
    hidden.rename(folder / name)
    return str(folder / name)


def tally(report: Tally) -> tuple[int, ...]:
    return tuple(getattr(report, name) for name in COUNTS)


def kept(tables: Tables) -> Counter:
    return Counter(row[0] for row in tables.read(EVENTS).select(EVENT_ID).collect())


def once(ids: range) -> Counter:
    return Counter(f"e{i}" for i in ids)


def test_files_of_every_format_come_in_once_with_duplicates_within_and_across_batches(
    tables: Tables, folder: Path
) -> None:
    drop(folder, "a.parquet", rows(range(10)))
    drop(folder, "b.csv", pd.concat([rows(range(5, 15)), rows(range(14, 15)), rows(range(1), label="bad")]))
    first = ingest_stream(tables, settings(folder))
    assert tally(first) == (22, 15, 6, 1)
    assert first.batches == 2
    drop(folder, "c.jsonl", rows(range(12, 20)))
    drop(folder, "d.csv", rows(range(20, 22))[["label", "input_id", "user_id", "event_id"]])
    more = ingest_stream(tables, settings(folder, "source.max_files_per_trigger=9"))
    assert (tally(more), more.batches) == ((10, 7, 3, 0), 1)
    assert ingest_stream(tables, settings(folder)) == Tally()
    assert kept(tables) == once(range(22))
    audit = _ingest_adds_up(tables)
    assert audit["holds"]
    assert tuple(audit[name] for name in (*COUNTS, "batches")) == (32, 22, 9, 1, 3)
    done = tables.read(LEDGER).where(F.col(schema.STATE) == schema.DONE).orderBy(schema.BATCH_ID).collect()
    ranges = [json.loads(row[schema.OFFSETS]) for row in done]
    assert [one["end"] for one in ranges[:-1]] == [one["start"] for one in ranges[1:]]
    erase(tables, settings(folder), events=["e3", "e13", "e20"])
    assert kept(tables) == once(range(22)) - Counter(["e3", "e13", "e20"])
    assert _ingest_adds_up(tables)["holds"]


def test_a_file_ingested_both_ways_adds_nothing(tables: Tables, folder: Path) -> None:
    path = drop(folder, "a.csv", rows(range(10)).drop(columns="event_id").assign(user_id=range(10)))
    assert tally(ingest_stream(tables, settings(folder))) == (10, 10, 0, 0)
    assert ingest_events(tables, settings(folder), path, {}).duplicates == 10
    other = drop(folder, "b.csv", rows(range(10)))
    assert ingest_events(tables, settings(folder), other, {}).accepted == 10
    assert tally(ingest_stream(tables, settings(folder))) == (10, 0, 10, 0)
    assert _ingest_adds_up(tables)["holds"]


class Crash(Exception):
    pass


def crashing(monkeypatch: pytest.MonkeyPatch, where: object, step: str) -> None:
    real = getattr(where, step)

    def die(*arguments: object) -> None:
        real(*arguments)
        raise Crash

    monkeypatch.setattr(where, step, die)


STEPS = [(Intake, "_plan"), (intake, "quarantine"), (KnownEvents, "_append"), (KnownEvents, "_add"), (Intake, "_close")]


@pytest.mark.long
@pytest.mark.parametrize(("where", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_crash_after_any_step_loses_and_doubles_nothing(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch, where: object, step: str
) -> None:
    drop(folder, "a.csv", rows(range(6)))
    ingest_stream(tables, settings(folder))
    drop(folder, "b.csv", pd.concat([rows(range(4, 9)), rows(range(1), label="bad")]))
    with monkeypatch.context() as patch:
        crashing(patch, where, step)
        with pytest.raises(Crash):
            ingest_stream(tables, settings(folder))
    drop(folder, "c.csv", rows(range(8, 12)))
    assert tally(ingest_stream(tables, settings(folder))) == (10, 6, 3, 1)
    assert kept(tables) == once(range(12))
    audit = _ingest_adds_up(tables)
    assert audit["holds"]
    assert tuple(audit[name] for name in COUNTS) == (16, 12, 3, 1)


@pytest.mark.long
def test_an_index_that_is_lost_damaged_or_behind_is_brought_up_to_the_table(tables: Tables, folder: Path) -> None:
    drop(folder, "a.csv", rows(range(6)))
    ingest_stream(tables, settings(folder))
    index = next(Path(tables.root, "_checkpoints").glob("*-ids"))
    old = shutil.copytree(index, index.with_name("old"))
    drop(folder, "b.csv", rows(range(4, 9)))
    ingest_stream(tables, settings(folder))
    tables.delta(EVENTS).optimize().executeCompaction()
    known = KnownEvents(tables, str(index))
    known.refresh()
    assert (known.version, len(known.ids)) == (tables.version(EVENTS), 9)  # a compacted file has no new ids
    for i, damage in enumerate(("lost", "behind", "torn")):
        if damage != "torn":
            shutil.rmtree(index)
        if damage == "behind":
            shutil.copytree(old, index)
        if damage == "torn":
            next(index.glob("*.npy")).write_bytes(b"torn")
        drop(folder, f"{damage}.csv", rows(range(i, 10 + i)))
        assert tally(ingest_stream(tables, settings(folder))) == (10, 1, 9, 0), damage
    assert kept(tables) == once(range(12))


@pytest.mark.long
def test_an_index_that_misses_ids_doubles_events_and_the_audit_sees_it(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(folder, "a.csv", rows(range(6)))
    ingest_stream(tables, settings(folder))
    monkeypatch.setattr(KnownEvents, "refresh", lambda self: self.ids.clear())
    drop(folder, "b.csv", rows(range(4, 9)))
    ingest_stream(tables, settings(folder))
    assert _ingest_adds_up(tables)["repeated_event_ids"] == 2


@pytest.mark.long
@pytest.mark.parametrize("guarded", [True, False])
def test_files_ingested_between_look_up_and_append_do_not_come_twice(
    tables: Tables, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    drop(folder, "a.csv", rows(range(6)))
    path = str(tmp_path / "same.csv")
    rows(range(3, 9)).to_csv(path, index=False)
    append, reports = KnownEvents._append, []

    def overtaken(self: KnownEvents, events: object, batch: object) -> None:
        if not guarded:
            monkeypatch.setattr(ingest, "fence_streams", lambda tables, application: None)
        reports.append(ingest_events(tables, settings(folder), path, {}))
        append(self, events, batch)

    monkeypatch.setattr(KnownEvents, "_append", overtaken)
    streamed = ingest_stream(tables, settings(folder))
    if guarded:
        assert reports[0].accepted == 6
        assert tally(streamed) == (6, 3, 3, 0)
        assert kept(tables) == once(range(9))
    assert _ingest_adds_up(tables)["holds"] == guarded


@pytest.mark.long
@pytest.mark.parametrize("guarded", [True, False])
def test_a_batch_that_comes_while_files_are_being_merged_does_not_come_twice(
    tables: Tables, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The MERGE has read the table and not committed when the stream, which does not see it open, appends."""
    drop(folder, "a.csv", rows(range(6)))
    path = str(tmp_path / "same.csv")
    rows(range(3, 9)).to_csv(path, index=False)
    tables.create(EVENTS, QUARANTINE, LEDGER)
    reached, go_on = str(tmp_path / "reached"), str(tmp_path / "go_on")
    distinct = ingest.distinct_events

    def slow(valid, ids_given):
        events = distinct(valid, ids_given)

        def wait(batches):
            import os
            import time

            open(reached, "w").close()
            while not os.path.exists(go_on):
                time.sleep(0.05)
            yield from batches

        return events.coalesce(1).mapInArrow(wait, events.schema)  # the other core is the stream's

    monkeypatch.setattr(ingest, "distinct_events", slow)
    if not guarded:
        monkeypatch.setattr(ingest, "persistently", lambda write: write())
    results: list[object] = []

    def files() -> None:
        try:
            results.append(ingest_events(tables, settings(folder), path, {}))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=files)
    thread.start()
    while not Path(reached).exists():
        thread.join(0.05)
        assert thread.is_alive(), results
    monkeypatch.setattr(intake, "open_batches", lambda tables, application: [])  # the worst: it looks too early
    streamed = ingest_stream(tables, settings(folder, "ingest.recover_after_minutes=60"))
    Path(go_on).touch()
    thread.join()
    assert tally(streamed) == (6, 6, 0, 0)
    if guarded:
        assert results[0].accepted == 3
        assert kept(tables) == once(range(9))
        assert _ingest_adds_up(tables)["holds"]
    else:
        assert "Concurrent" in type(results[0]).__name__


@pytest.mark.long
def test_a_batch_is_merged_while_files_are_open_in_the_ledger(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = drop(folder, "a.csv", rows(range(6)))
    with monkeypatch.context() as patch:
        crashing(patch, ingest, "_insert")
        with pytest.raises(Crash):
            ingest_events(tables, settings(folder, "ingest.recover_after_minutes=60"), path, {})
    monkeypatch.setattr(KnownEvents, "_append", lambda *_: pytest.fail("appended"))
    assert tally(ingest_stream(tables, settings(folder, "ingest.recover_after_minutes=60"))) == (6, 0, 6, 0)
    assert kept(tables) == once(range(6))


def test_a_second_stream_is_refused_and_sigterm_stops_within_a_batch(tables: Tables, folder: Path) -> None:
    drop(folder, "a.csv", rows(range(6)))
    stop, results = threading.Event(), []
    continuous = settings(folder, "source.trigger_seconds=0.1")
    thread = threading.Thread(
        target=lambda: results.append(ingest_stream(tables, continuous, available_now=False, stop=stop))
    )
    thread.start()
    done = Path(tables.root, "_checkpoints")
    while not list(done.glob("ingest-folder-*/commits/0")):
        thread.join(0.1)
        assert thread.is_alive()
    with pytest.raises(StateError, match=r"the ingest stream is run by process \d+ on .*: stop that one first"):
        ingest_stream(tables, settings(folder))
    stop.set()
    thread.join(60)
    assert tally(results[0]) == (6, 6, 0, 0)


@pytest.mark.long
def test_a_damaged_checkpoint_is_refused_and_a_new_one_counts_nothing_twice(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(folder, "a.csv", rows(range(6)))
    with monkeypatch.context() as patch:
        crashing(patch, KnownEvents, "_append")
        with pytest.raises(Crash):
            ingest_stream(tables, settings(folder))
    checkpoint = next(
        path for path in Path(tables.root, "_checkpoints").glob("ingest-folder-*") if (path / "metadata").exists()
    )
    drop(folder, "b.csv", rows(range(6, 9)))
    for part in ("offsets", "sources"):  # Spark then plans both files as batch 0
        shutil.move(checkpoint / part, checkpoint.with_name(part))
    with pytest.raises(ReplayError, match="has lost batch 0"):
        ingest_stream(tables, settings(folder))
    with monkeypatch.context() as patch:
        patch.setattr(Intake, "start", lambda self: None)
        with pytest.raises(ReplayError, match=r"damaged.*nothing was ingested.*remove it"):
            ingest_stream(tables, settings(folder, "source.max_files_per_trigger=2"))
    assert kept(tables) == once(range(6))
    shutil.rmtree(checkpoint)
    assert tally(ingest_stream(tables, settings(folder))) == (9, 3, 6, 0)
    assert kept(tables) == once(range(9))
    assert _ingest_adds_up(tables)["holds"]


def test_an_added_column_passes_and_a_removed_or_retyped_one_goes_to_quarantine_or_stops(
    tables: Tables, folder: Path
) -> None:
    drop(folder, "a.parquet", rows(range(3), weight=1.0))
    drop(folder, "a.csv", rows(range(3)))
    ingest_stream(tables, settings(folder))
    drop(folder, "b.parquet", rows(range(3, 6), weight=2, extra="new"))
    assert tally(ingest_stream(tables, settings(folder))) == (3, 3, 0, 0)
    cases = {
        "c.parquet": (rows(range(6, 8), weight=1.0, label="1"), r"label \(label\) was number and is text \(string\)"),
        "d.parquet": (rows(range(6, 8)).drop(columns="input_id"), r"column input_id \(text\) is missing; .*weight"),
        "e.csv": (rows(range(6, 8)).drop(columns="event_id"), r"column event_id \(text\) is missing"),
        "f.parquet": (rows(range(6, 8), weight=1.0).assign(label=[[1.0]] * 2), "label .* has the type array<double>"),
    }
    for name, (frame, _) in cases.items():
        drop(folder, name, frame)
    whole = "source.max_files_per_trigger=9"
    with pytest.raises(
        InputError, match=r"[ce]\.\w+: column .*; where this is meant to be, remove .*-columns\.json"
    ) as error:
        ingest_stream(tables, settings(folder, whole, "source.drift=stop"))
    assert "\n" not in str(error.value)
    assert tally(ingest_stream(tables, settings(folder, whole))) == (8, 0, 0, 8)
    for _, reason in cases.values():
        refused = tables.read(QUARANTINE).where(F.col(schema.REASON).rlike(reason)).collect()
        assert [json.loads(row[schema.RAW])["user_id"] for row in refused] == ["u", "u"], reason
    assert kept(tables) == once(range(6))
    assert _ingest_adds_up(tables)["holds"]


@pytest.mark.long
def test_a_file_that_cannot_be_read_is_one_row_of_quarantine_or_stops(tables: Tables, folder: Path) -> None:
    drop(folder, "good.csv", rows(range(3)))
    drop(folder, "good.parquet", rows(range(3, 5)))
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    (folder / "empty.csv").write_text("\n")
    (folder / "what.xyz").write_text("what")
    (folder / "nothing.csv").touch()  # Spark passes over files of no bytes, and so do we
    with pytest.raises(InputError, match=r"bad\.parquet: cannot be read as parquet"):
        ingest_stream(tables, settings(folder, "source.drift=stop", "source.max_files_per_trigger=9"))
    report = ingest_stream(tables, settings(folder, "source.max_files_per_trigger=9"))
    assert tally(report) == (8, 5, 0, 3)
    raw = {json.loads(row[schema.RAW])["file"] for row in tables.read(QUARANTINE).collect()}
    assert {Path(file).name for file in raw} == {"bad.parquet", "empty.csv", "what.xyz"}


@pytest.mark.long
def test_a_source_table_comes_in_by_its_appends_and_a_new_column_passes(tables: Tables, tmp_path: Path) -> None:
    path, spark = str(tmp_path / "others"), tables.spark

    def append(frame: pd.DataFrame) -> None:
        new = spark.createDataFrame(pa.Table.from_pandas(frame, preserve_index=False))
        new.write.format("delta").mode("append").option("mergeSchema", "true").save(path)

    append(rows(range(6)).rename(columns={"label": "stars"}))
    delta = settings(path, "source.kind=delta")
    columns = {"label": "stars"}
    assert tally(ingest_stream(tables, delta, columns)) == (6, 6, 0, 0)
    append(rows(range(4, 8)).rename(columns={"label": "stars"}))
    append(rows(range(8, 9), extra=1).rename(columns={"label": "stars"}))
    assert tally(ingest_stream(tables, delta, columns)) == (5, 3, 2, 0)
    assert kept(tables) == once(range(9))
    assert _ingest_adds_up(tables)["holds"]
    retyped = spark.createDataFrame(pa.Table.from_pandas(rows(range(9, 10), stars="1").drop(columns="label")))
    retyped.write.format("delta").mode("overwrite").option("overwriteSchema", "true").save(path)
    with pytest.raises(InputError, match=r"column stars \(label\) was number and is text \(string\)"):
        ingest_stream(tables, delta, columns)


@pytest.mark.long
def test_a_column_that_comes_while_the_stream_runs_starts_it_again(tables: Tables, tmp_path: Path) -> None:
    path, stop = str(tmp_path / "others"), threading.Event()

    def append(frame: pd.DataFrame) -> None:
        new = tables.spark.createDataFrame(pa.Table.from_pandas(frame, preserve_index=False))
        new.write.format("delta").mode("append").option("mergeSchema", "true").save(path)

    append(rows(range(4)))
    now = settings(path, "source.kind=delta", "source.trigger_seconds=0.2")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ingest_stream, tables, now, None, False, stop)
        try:
            for n, more in ((4, None), (6, {"extra": 1}), (8, {"extra": 2, "another": 3})):
                if more:
                    append(rows(range(n - 2, n), **more))
                ends = time.monotonic() + 60
                while (not tables.exists(EVENTS) or len(kept(tables)) < n) and not running.done():
                    assert time.monotonic() < ends
                    time.sleep(0.2)
        finally:
            stop.set()
        assert tally(running.result(60)) == (8, 8, 0, 0)
    assert kept(tables) == once(range(8))


def test_files_beside_one_whose_name_looks_like_a_pattern_are_read_once(tables: Tables, folder: Path) -> None:
    drop(folder, "a[1].csv", rows(range(3)))
    drop(folder, "b.csv", rows(range(3, 6), label=["bad", 1, 1]))
    drop(folder, "c{2}.csv", rows(range(6, 8)))
    assert tally(ingest_stream(tables, settings(folder, "source.max_files_per_trigger=9"))) == (8, 7, 0, 1)
    assert kept(tables) == once(range(8)) - Counter(["e3"])


@pytest.mark.long
def test_a_batch_that_another_stream_declared_dead_is_told(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two streams that do not see each other's lock: the second closes what the first has open."""
    drop(folder, "a.csv", rows(range(3), label=["bad", 1, 2]))
    append = KnownEvents._append

    def overtaken(self: KnownEvents, *batch: object) -> None:
        recover(tables, 0, stream="ingest-of-another")
        append(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(KnownEvents, "_append", overtaken)
        with pytest.raises(StateError, match="was abandoned meanwhile by another ingest stream"):
            ingest_stream(tables, settings(folder))


def test_known_ids_say_nothing_of_a_commit_that_another_made(tables: Tables, folder: Path) -> None:
    """A batch without new ids makes no commit, and the next one is not its own."""
    ingest_stream(tables, settings(drop(folder, "a.csv", rows(range(5))) and folder))
    known = KnownEvents(tables, str(folder / "index"))
    events = tables.read(EVENTS).limit(2)
    refresh = known.refresh

    def then_another_writes() -> None:
        refresh()
        tables.append(EVENTS, tables.read(EVENTS).limit(1).withColumn(EVENT_ID, F.lit("other")))

    known.refresh = then_another_writes  # type: ignore[method-assign]
    known.append(events, Batch("0" * 16, 7))
    assert known.version != tables.version(EVENTS)


def test_a_file_of_any_age_is_read(tables: Tables, folder: Path) -> None:
    drop(folder, "new.csv", rows(range(2)))
    ingest_stream(tables, settings(folder))
    old = drop(folder, "old.csv", rows(range(2, 4)))
    os.utime(old, (1e9, 1e9))
    assert tally(ingest_stream(tables, settings(folder))) == (2, 2, 0, 0)


@pytest.mark.parametrize("step", ["_plan", "_close"])
def test_a_batch_that_is_repeated_has_the_columns_that_it_had(
    tables: Tables, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    drop(folder, "a.csv", rows(range(2)))
    drop(folder, "b.csv", rows(range(2, 4), weight=2.0))  # were it known of the first time, a.csv would lack it
    together = settings(folder, "source.max_files_per_trigger=9")
    with monkeypatch.context() as patch:
        crashing(patch, Intake, step)
        with pytest.raises(Crash):
            ingest_stream(tables, together)
    assert tally(ingest_stream(tables, together)) == (4, 4, 0, 0)
    drop(folder, "c.csv", rows(range(4, 6)))
    assert tally(ingest_stream(tables, together)) == (2, 0, 0, 2)


def test_files_that_end_early_keep_no_other_out(tables: Tables, folder: Path) -> None:
    text = rows(range(2000)).to_csv(index=False).encode()
    whole = gzip.compress(text)
    for name, content in (("half.csv.gz", whole[: len(whole) // 2]), ("ten.csv.gz", whole[:10])):
        (folder / name).write_bytes(content)
    (folder / "rubbish.csv.gz").write_bytes(whole[:10] + bytes(range(200)))
    drop(folder, "good.csv", rows(range(2)))
    together = settings(folder, "source.max_files_per_trigger=9")
    with pytest.raises(InputError, match=r"\.csv\.gz: cannot be read as csv"):
        ingest_stream(tables, settings(folder, "source.max_files_per_trigger=9", "source.drift=stop"))
    assert tally(ingest_stream(tables, together)) == (5, 2, 0, 3)
    raw = {Path(json.loads(row[schema.RAW])["file"]).name for row in tables.read(QUARANTINE).collect()}
    assert raw == {"half.csv.gz", "ten.csv.gz", "rubbish.csv.gz"}


def test_a_rename_of_no_column_of_ours_is_refused(tables: Tables, folder: Path) -> None:
    with pytest.raises(InputError, match="events have no column time, the nearest is event_time"):
        ingest_stream(tables, settings(folder), {"time": "ts"})


def test_a_field_of_a_message_may_be_called_value(tables: Tables) -> None:
    of_kafka = settings("", "source.kind=kafka", "source.topic=t", "source.bootstrap_servers=b")
    batch = tables.spark.createDataFrame([('{"user_id":"u","input_id":"i","value":3}',)], "value string")
    source = Source(tables.spark, of_kafka, {"label": "value"})
    found, _ = source.events(batch, Columns("nowhere"))
    assert [(row.label, row.reason) for row in found.collect()] == [(3.0, None)]


def test_a_damaged_memory_of_columns_says_what_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "columns.json"
    path.write_text("{")
    with pytest.raises(StateError, match=rf"{path} is damaged: remove it"):
        Columns(str(path))


def test_settings_that_name_no_source_are_refused_in_one_line(tables: Tables, tmp_path: Path) -> None:
    cases: list[tuple[str, list[str], type[Exception], str]] = [
        ("", [], ConfigError, "source.path is empty"),
        (str(tmp_path / "nowhere"), [], InputError, "no such folder"),
        (str(tmp_path), ["source.kind=delta"], InputError, "source.path"),
        ("", ["source.kind=kafka", "source.topic=t"], ConfigError, "source.bootstrap_servers is empty"),
    ]
    for path, assignments, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            ingest_stream(tables, settings(path, *assignments))
        assert "\n" not in str(error.value)
