"""Going on after a checkpoint was lost or damaged: a new one, from the last batch that the ledger has and users hold.

A checkpoint is never edited (platform notes: a batch planned anew under an old number is silently skipped). What the old
one gave to the users is known from the ledger; whether its very last batch reached them, from their number of events.
"""

from __future__ import annotations

import logging

from pyspark.sql import Column, Row
from pyspark.sql import functions as F

from mtl import schema
from mtl.checkpoint import Checkpoint, Place, end_of, offsets_at
from mtl.errors import ReplayError
from mtl.ledger import ERASE, UPDATE, added, batches_of, last_batch, ledger_of
from mtl.model import Model
from mtl.replay import files_added, ids_of_files
from mtl.schema import INPUT_ID, MODEL_VERSION
from mtl.tables import Tables
from mtl.updater import Already, Updater, mark_of

log = logging.getLogger("mtl")


def advice(version: int) -> str:
    """What to do where the checkpoint of a version's query is damaged."""
    return f"To start anew from the last batch that the ledger has: jobs/update.py --model-version {version} --recover"


def check(updater: Updater) -> None:
    """Refuse a checkpoint that cannot be the one behind the ledger.

    Raises:
        ReplayError: going on from it would lose events or count them twice.
    """
    checkpoint, version = updater.checkpoint, updater.model.version
    last = last_batch(updater.tables, version)
    if last is None or (last[schema.STATE] == schema.RECOVERED and not _has_rows(updater)):
        return
    if checkpoint.is_new or last[schema.APPLICATION_ID] != updater.application:
        raise ReplayError(
            f"model version {version} was updated through another checkpoint than {checkpoint.folder}, and going on from "
            f"here would count its events twice. Restore the checkpoint that was. {checkpoint.advice}"
        )
    own = F.col(schema.APPLICATION_ID) == updater.application
    rows = batches_of(updater.tables, version).where(own).select(schema.BATCH_ID, schema.OFFSETS).collect()
    kept = {*checkpoint.planned(), last[schema.BATCH_ID]}
    for number, offsets in rows:
        if number in kept and checkpoint.offsets(number) != offsets:
            raise ReplayError(
                f"batch {number} ends at {checkpoint.offsets(number)} in {checkpoint.folder} and at {offsets} in the ledger: "
                f"the checkpoint is damaged; nothing was applied. {checkpoint.advice}"
            )


def starting_place(updater: Updater) -> Place:
    """Where the checkpoint started to read, or a new one does: after training, or after the last recovery."""
    recoveries = batches_of(updater.tables, updater.model.version).where(F.col(schema.STATE) == schema.RECOVERED)
    last = recoveries.orderBy(F.col(schema.CREATED_AT).desc()).first()
    return end_of(last[schema.OFFSETS]) if last else (updater.model.events_version + 1, -1)


def already_applied(updater: Updater) -> Already | None:
    """What a new checkpoint would read again: the files of its first commit that an earlier one had read."""
    commit, file = starting_place(updater)
    if file < 0 or not updater.checkpoint.begins_by(updater.checkpoint.done, commit):
        return None
    location = updater.tables.location(schema.EVENTS)
    files = files_added(updater.tables, location, commit, commit)
    read = [f"{location}/{path}" for place, path in files if place <= (commit, file)]
    return Already(commit, ids_of_files(updater.tables, read).select(schema.EVENT_ID))


def recover(tables: Tables, model: Model, checkpoint: Checkpoint) -> None:
    """Put the checkpoint aside, such that the next one goes on after the last batch that users hold.

    May be repeated after a crash at any step. The caller holds the version's lock and has finished its releases.

    Raises:
        ReplayError: users hold neither what the ledger says with its last batch nor without it.
    """
    last = last_batch(tables, model.version)
    if last is not None and last[schema.STATE] != schema.RECOVERED:
        last = _without_the_unapplied(tables, model, last)
        _mark(tables, model, end_of(last[schema.OFFSETS]) if last else (model.events_version + 1, -1))
    aside = checkpoint.set_aside()
    after = f"batch {last[schema.BATCH_ID]}" if last else "training"
    log.info("update: model version %d goes on after %s; the old checkpoint is now %s", model.version, after, aside)


def _without_the_unapplied(tables: Tables, model: Model, last: Row) -> Row | None:
    """Take the last batch back where it was planned and never reached the users; the batch that is now the last."""
    users = tables.of_version(schema.USERS, model.version)
    held = users.agg(F.sum(schema.N_EVENTS)).first()[0] or 0
    trained = tables.of_version(schema.MODELS, model.version).first()[schema.N_EVENTS]
    recorded = trained + added(tables, model.version) + added(tables, model.version, ERASE)
    if held == recorded:
        return last
    if held != recorded - last[schema.ACCEPTED]:
        raise ReplayError(
            f"the users of model version {model.version} hold {held} events; the ledger has {recorded} with its last batch "
            f"and {recorded - last[schema.ACCEPTED]} without: train a new version with jobs/retrain.py"
        )
    _take_back_what_was_learnt(tables, model, last)
    tables.delta(schema.PROGRESS).delete(_same_batch(last))
    tables.delta(schema.LEDGER).delete(_same_batch(last))
    return last_batch(tables, model.version)


def _take_back_what_was_learnt(tables: Tables, model: Model, last: Row) -> None:
    """Give arrivals the features that they had before the batch: they come before its users, and will come again."""
    commits = tables.commits_with(schema.FEATURES, mark_of(last[schema.APPLICATION_ID], last[schema.BATCH_ID]))
    if not commits:
        return
    before = tables.of_version(schema.FEATURES, model.version, commits[0] - 1).where(F.col(schema.N_EVENTS).isNotNull())
    same = f"stored.{MODEL_VERSION} = {model.version} AND stored.{INPUT_ID} = before.{INPUT_ID}"
    merge = tables.delta(schema.FEATURES).alias("stored").merge(before.alias("before"), same)
    merge.whenMatchedUpdateAll().execute()


def drop_unplanned(tables: Tables, version: int) -> None:
    """Forget waiting events of batches that the ledger does not have: a new checkpoint will read them again."""
    batch = (schema.APPLICATION_ID, schema.BATCH_ID)
    waiting = tables.of_version(schema.WAITING, version).select(*batch).distinct().collect()
    planned = ledger_of(tables, version).select(*batch).collect() if waiting else []
    for row in set(waiting) - set(planned):
        tables.delta(schema.WAITING).delete(_same_batch(row) & (F.col(MODEL_VERSION) == version))


def _same_batch(row: Row) -> Column:
    return (F.col(schema.APPLICATION_ID) == row[schema.APPLICATION_ID]) & (
        F.col(schema.BATCH_ID) == row[schema.BATCH_ID]
    )


def _mark(tables: Tables, model: Model, place: Place) -> None:
    application = f"recover-v{model.version}"
    number = tables.read(schema.LEDGER).where(F.col(schema.APPLICATION_ID) == application).count()
    row = {
        schema.QUERY: UPDATE,
        schema.APPLICATION_ID: application,
        schema.BATCH_ID: number,
        schema.STATE: schema.RECOVERED,
        schema.OFFSETS: offsets_at(place),
        schema.OFFERED: 0,
        schema.ACCEPTED: 0,
    }
    tables.append_rows(schema.LEDGER, [row], once=(application, number))


def _has_rows(updater: Updater) -> bool:
    if updater.checkpoint.is_new:
        return False
    own = F.col(schema.APPLICATION_ID) == updater.application
    return not batches_of(updater.tables, updater.model.version).where(own).isEmpty()
