"""Erasure of users or single events, and correction of events: afterwards as if they had never been seen.

The steps, each of which changes nothing when it is repeated, so that a crash after any is finished by running the job again:

1. ``erasures``: *planned*, with the ids; in a correction also the file that the events come back from.
2. ``events`` and ``quarantine``: the rows are removed, each in one commit that bears the erasure's id; ``events`` is append-only
   for everyone else. From that commit's own difference the ``ledger`` gets, per ingest batch, what was taken from it.
3. Every model version's stream runs to its end. It passes over commits that remove (``skipChangeCommits``), and may still read
   erased events from the commits that brought them: hence before step 4, which takes them out, and never after it.
4. Per model version: users with erased events are computed anew from those they have left, a replay in the ledger's order
   where the loss is not squared, and replaced by one MERGE; a user with none left loses its row. The ``ledger`` row of what
   they lost comes first, for after the MERGE it can no longer be counted. Inputs that training had no event of and were in erased
   events go back to what the oracle says of them.
5. ``waiting`` and, with whole users, ``user_attributes``; files with rows that are only marked as deleted are rewritten.
6. A correction is ingested as any file is. Under other losses than the squared one a corrected event thus takes its place in
   the order anew, at the end.
7. ``erasures``: *done*, without its ids, with the report.

Sums could also be downdated: A − c M_x is the rank-one form. But what is left where nearly all is taken is rounding, a user that
forgets has to have its reference time moved back and its sums magnified, other losses need the replay, and to find the events
of a user costs the same pass over ``events``. So users are always computed anew, which is exact by construction.

The locks of all streams are held meanwhile (:mod:`mtl.lock`), so that nobody else writes users. A retraining that reads
events before step 2 and publishes after it brings them back: the audit then says so, and the erasure is asked for again.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import schema
from mtl.arrivals import unlearnt
from mtl.batches import open_batches, recover
from mtl.config import Settings
from mtl.erasure import Erasure, close, correction, ids_of_file, pending, plan
from mtl.errors import InputError, StateError
from mtl.ingest import ingest_events
from mtl.layout import SCHEMAS
from mtl.ledger import ERASE, consumed, ledger_of
from mtl.model import Model
from mtl.models import load_model, versions
from mtl.rebuild import applied, at_once, rebuilt
from mtl.schema import BATCH, EVENT_ID, INPUT_ID, MODEL_VERSION, SOURCE, USER_ID
from mtl.stream import Stream
from mtl.tables import Tables
from mtl.users import WRITTEN

log = logging.getLogger("mtl")

_MARKED = (schema.USERS, schema.WAITING, schema.USER_ATTRIBUTES)  # tables whose rows are deleted by marking them
_RETENTION = "delta.deletedFileRetentionDuration"
_DEFAULT_RETENTION_DAYS = 7  # Delta's own


def erase(
    tables: Tables,
    settings: Settings,
    users: Sequence[str] = (),
    events: Sequence[str] = (),
    file: str | None = None,
    correct: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Erase users or events, or correct events; what a crashed run left unfinished comes first.

    Args:
        users, events: ids of whole users, or of single events.
        file: a file with a column user_id or event_id of such ids.
        correct: a file of events, read as ingest reads it, whose ids all exist; rows as they are already change nothing.
        columns: our column name → the files'.

    Returns:
        The report on this request: see :func:`_report`. ``finished`` are ids of earlier erasures that were completed.

    Raises:
        InputError: nothing is asked for, two things at once, or the file is no list of ids or of valid, known events.
        StateError: another process updates a model version, or ingests.
        ReplayError: the stream of a model version cannot be run to its end; its message says how to recover.
    """
    asked = [what for what in (users, events, file, correct) if what]
    if len(asked) > 1:
        raise InputError("ask for one thing at a time: users, events, a file of ids, or a file of corrections")
    tables.create(*SCHEMAS)
    finished = {begun: _finish(tables, settings, begun, is_begun=True) for begun in pending(tables)}
    done = [begun.id for begun in finished]
    if not asked:
        if not done:
            raise InputError("nothing to erase: give --user, --event, --file or --correct")
        return {**list(finished.values())[-1], "finished": done}
    if correct:
        request = correction(tables, settings, correct, columns or {})
    elif file:
        request = Erasure.of(*ids_of_file(tables, settings, file, columns or {}))
    else:
        request = Erasure.of(USER_ID, users) if users else Erasure.of(EVENT_ID, events)
    for begun, report in finished.items():
        if (begun.key, set(begun.ids)) == (request.key, set(request.ids)) or not request.ids:
            return {**report, "finished": done}
    if not request.ids:
        return {"erasure_id": None, "asked": 0, "finished": done}
    return {**_finish(tables, settings, request), "finished": done}


def _refuse_open_batches(tables: Tables, settings: Settings) -> None:
    """An ingest that died is counted by the rows that it left: they must still be there when it is."""
    recover(tables, settings.ingest.recover_after_minutes)
    left = open_batches(tables, "")
    if left:
        raise StateError(
            f"{len(left)} batches of ingest are not closed, the first {left[0].name}: an ingest is at work, or died. Let it end; "
            "or run jobs/ingest.py once more: after files ingest.recover_after_minutes later, after a stream as a stream"
        )


def _finish(tables: Tables, settings: Settings, erasure: Erasure, is_begun: bool = False) -> dict[str, Any]:
    """All steps of an erasure, those that were done before included."""
    if not (is_begun and erasure.corrections):  # whose own ingest may have died
        _refuse_open_batches(tables, settings)
    ids = erasure.frame(tables)
    with ExitStack() as held:  # nobody else writes users meanwhile
        streams = []
        for (version,) in sorted(versions(tables).select(MODEL_VERSION).collect()):
            streams.append(Stream(tables, settings, load_model(tables, version)))
            held.callback(streams[-1].close)  # also where the next one's lock is refused
        plan(tables, erasure)
        _remove_events(tables, erasure, ids)
        _remove_refused(tables, erasure, ids)
        events, refused = (_removed(tables, table, erasure) for table in (schema.EVENTS, schema.QUARANTINE))
        events, refused = events.join(ids, erasure.key, "left_semi"), _mentioning(refused, ids, erasure.key)
        _account(tables, erasure, events, refused)
        affected = events.select(USER_ID).distinct()
        if erasure.key == USER_ID:
            affected = affected.unionAll(ids).distinct()
        _drain(streams)
        models = [stream.model for stream in streams]
        refits = [model.version for model in models if _recompute(tables, erasure, model, affected)]
        for model in models:
            _unlearn(tables, model, events.select(INPUT_ID).distinct())
        _remove_rest(tables, erasure, ids)
    report = _report(tables, erasure, models, events, refused, refits)
    if erasure.corrections:
        where = json.loads(erasure.corrections)
        report["corrected"] = ingest_events(tables, settings, where["path"], where["columns"]).accepted
    close(tables, erasure, report)
    log.info("erase: %s", report)
    return report


def _drain(streams: list[Stream]) -> None:
    for stream in streams:
        stream.drain()


def _remove_events(tables: Tables, erasure: Erasure, ids: DataFrame) -> None:
    tables.erase(schema.EVENTS, ids, erasure.key, erasure.application, erasure.metadata)


def _remove_refused(tables: Tables, erasure: Erasure, ids: DataFrame) -> None:
    raw = _mentioning(tables.read(schema.QUARANTINE), ids, erasure.key).select(schema.RAW).distinct()
    tables.erase(schema.QUARANTINE, raw, schema.RAW, erasure.application, erasure.metadata)


def _remove_rest(tables: Tables, erasure: Erasure, ids: DataFrame) -> None:
    tables.erase(schema.WAITING, ids, erasure.key, erasure.application, erasure.metadata)
    if erasure.key == USER_ID:
        tables.erase(schema.USER_ATTRIBUTES, ids, USER_ID, erasure.application, erasure.metadata)
    for table in _MARKED:
        tables.purge(table)


def _mentioning(refused: DataFrame, ids: DataFrame, key: str) -> DataFrame:
    """Quarantined rows of which any cell, or any word of a malformed line, is one of the ids."""
    cells = F.from_json(schema.RAW, "map<string,string>")
    line = F.when(cells.isNull(), F.col(schema.RAW)).otherwise(F.try_element_at(cells, F.lit("malformed")))
    words = F.coalesce(F.split(line, r"[\s,;|\t\"'{}\[\]:]+"), F.array().cast("array<string>"))
    values = F.coalesce(F.map_values(cells), F.array().cast("array<string>"))
    word = F.explode(F.concat(values, words)).alias(key)
    # An id that came as 7.0 is stored as 7.
    text = refused.select(schema.RAW, word).withColumn(key, F.regexp_replace(F.trim(key), r"^(-?\d+)\.0+$", "$1"))
    raw = text.join(F.broadcast(ids), key, "left_semi").select(schema.RAW).distinct()
    return refused.join(raw, schema.RAW, "left_semi")


def _removed(tables: Tables, table: str, erasure: Erasure) -> DataFrame:
    """The table as it was before the commit of this erasure; its rows are for the caller to choose from."""
    commits = tables.commits_with(table, erasure.metadata)
    return tables.read(table, commits[0] - 1) if commits else tables.read(table).limit(0)


def _account(tables: Tables, erasure: Erasure, events: DataFrame, refused: DataFrame) -> None:
    """One ledger row per ingest batch that lost something, in the columns of what it lost, negative."""
    lost = [(events, schema.ACCEPTED), (refused, schema.QUARANTINED)]
    counts: dict[str, dict[str, int]] = {}
    for rows, column in lost:
        for row in rows.where(F.col(BATCH).isNotNull()).groupBy(BATCH).count().collect():
            counts.setdefault(row[BATCH], {})[column] = -row["count"]
    _record(
        tables,
        erasure,
        [{schema.APPLICATION_ID: f"{ERASE}-{batch}-{erasure.id}", **of} for batch, of in counts.items()],
    )


def _record(tables: Tables, erasure: Erasure, rows: list[dict[str, Any]], application: str = "") -> None:
    common = {schema.QUERY: ERASE, schema.SOURCE: erasure.id, schema.STATE: schema.DONE}
    once = (application or erasure.application, 0)
    tables.append_rows(schema.LEDGER, [{**common, **row} for row in rows], once=once)


def _recompute(tables: Tables, erasure: Erasure, model: Model, affected: DataFrame) -> bool:
    """Replace the rows of users that had erased events; whether all at once, for the order of a replay was lost."""
    commit = consumed(tables, model)
    if commit is None:
        raise StateError(f"the stream of model version {model.version} stopped within a commit: run this job again")
    affected = affected.persist()
    try:
        refit = False
        try:
            events = applied(tables, model, commit)
        except StateError as error:
            log.info("erase: model version %d is refitted for those users: %s", model.version, error)
            events, refit = at_once(tables, model, commit), True
        rows = rebuilt(tables, model, events, affected).persist()
        stored = tables.of_version(schema.USERS, model.version)
        held, left = (
            of.agg(F.sum(schema.N_EVENTS)).first()[0] or 0 for of in (stored.join(affected, USER_ID, "left_semi"), rows)
        )
        application = f"{ERASE}-v{model.version}-{erasure.id}"
        _record(tables, erasure, [{schema.APPLICATION_ID: application, schema.ACCEPTED: left - held}], application)
        with tables.marked(erasure.metadata):
            _replace(tables, model, affected.join(rows, USER_ID, "left"))
        rows.unpersist()
    finally:
        affected.unpersist()
    return refit


def _unlearn(tables: Tables, model: Model, inputs: DataFrame) -> None:
    """What erased events said of inputs that training had no event of goes with all that others said of them (mtl.arrivals).

    It cannot be taken out alone, for it was about what was known of users at the time; it comes back with new events, and
    with the next retraining.
    """
    rows = tables.of_version(schema.FEATURES, model.version).where(F.col(schema.N_EVENTS) > 0)
    learnt = rows.join(F.broadcast(inputs), INPUT_ID, "left_semi").toArrow()
    if not len(learnt):
        return
    new = tables.spark.createDataFrame(unlearnt(learnt, model)).alias("new")
    same = f"stored.{MODEL_VERSION} = {model.version} AND stored.{INPUT_ID} = new.{INPUT_ID}"
    tables.delta(schema.FEATURES).alias("stored").merge(new, same).whenMatchedUpdateAll().execute()


def _replace(tables: Tables, model: Model, rows: DataFrame) -> None:
    """One MERGE; a user without sums goes. Repeated it gives the same rows."""
    same = f"stored.{MODEL_VERSION} = {model.version} AND stored.{USER_ID} = new.{USER_ID}"
    merge = tables.delta(schema.USERS).alias("stored").merge(rows.alias("new"), same)
    merge = merge.whenMatchedDelete(f"new.{schema.A} IS NULL")
    merge.whenMatchedUpdate(set={name: F.col(f"new.{name}") for name in WRITTEN}).execute()


def _report(
    tables: Tables, erasure: Erasure, models: list[Model], events: DataFrame, refused: DataFrame, refits: list[int]
) -> dict[str, Any]:
    """What was removed where, and what still holds it, until when."""
    removed = {schema.EVENTS: events.count(), schema.QUARANTINE: refused.count()}
    for table in (schema.WAITING, schema.USER_ATTRIBUTES):
        rows = _removed(tables, table, erasure)
        removed[table] = (
            rows.join(erasure.frame(tables), erasure.key, "left_semi").count() if erasure.key in rows.columns else 0
        )
    in_users = {
        model.version: -(
            ledger_of(tables, model.version, ERASE)
            .where(F.col(SOURCE) == erasure.id)
            .agg(F.sum(schema.ACCEPTED))
            .first()[0]
            or 0
        )
        for model in models
    }
    sources = events.select(SOURCE).unionAll(refused.select(SOURCE)).where(F.col(SOURCE).isNotNull()).distinct()
    touched = [table for table, n in removed.items() if n] + ([schema.USERS] if any(in_users.values()) else [])
    now = datetime.now(timezone.utc)
    return {
        "erasure_id": erasure.id,
        "asked": len(erasure.ids),
        "removed": removed,
        "removed_from_users": in_users,
        "refitted_versions": refits,
        "still_in": {
            "sources": sorted(row[0] for row in sources.collect()),
            "old_versions_until": {
                table: (now + _retention(tables, table)).isoformat(timespec="seconds")
                for table in [*touched, schema.ERASURES]
            },
            "theta_of_versions": [model.version for model in models if _learnt_from(tables, erasure, model)],
        },
    }


def _learnt_from(tables: Tables, erasure: Erasure, model: Model) -> bool:
    """Whether the version was trained on any of it; so taken where its events are no longer known."""
    try:
        trained = tables.read(schema.EVENTS, model.events_version)
        return not trained.join(erasure.frame(tables), erasure.key, "left_semi").isEmpty()
    except (PySparkException, Py4JError):
        return True


def _retention(tables: Tables, table: str) -> timedelta:
    """How long VACUUM leaves files of old versions alone."""
    properties = tables.delta(table).detail().collect()[0]["properties"]
    found = re.fullmatch(r"interval (\d+) days?", properties.get(_RETENTION, ""))
    return timedelta(days=int(found[1]) if found else _DEFAULT_RETENTION_DAYS)
