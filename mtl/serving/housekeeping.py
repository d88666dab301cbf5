"""The refresher's loop: look at the tables again and again, and clear away what nobody needs any more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import lmdb

from mtl.config import ServeSettings
from mtl.errors import MtlError
from mtl.serving.observations import read, sealed
from mtl.serving.overlay import Overlay
from mtl.serving.refresh import Refresher
from mtl.serving.source import UNREADABLE, Source
from mtl.serving.store import Store

log = logging.getLogger("mtl")

_CLEAR_SECONDS = 60.0  # between two looks for what is old
_LONGEST_WAIT = 10.0  # seconds between two looks at tables that cannot be read


def keep_like_the_tables(
    settings: ServeSettings,
    root: str,
    folder: Path,
    log_folder: Path,
    stopped: Callable[[], bool],
    version: int | None = None,
) -> None:
    """Refresh the store in ``folder`` until ``stopped``.

    Args:
        log_folder: of observations; old ones are cleared away by the refresher of the live version.
        version: see :class:`Refresher`.
    """
    store, overlay = Store(folder, settings.store_gb), Overlay(folder)
    refresher = Refresher(Source(root), store, overlay, version)
    failure, failures, cleared = "", 0, time.monotonic()
    while not stopped():
        began = time.monotonic()
        try:
            refresher.refresh()
            if failure:
                log.info("serve: the tables can be followed again")
            failure, failures = "", 0
        except Exception as error:  # whatever it is, what the store holds is served on
            told = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            if isinstance(error, lmdb.MapFullError):
                told = f"the store is full: start anew with a larger serve.store_gb than {settings.store_gb}"
            if told != failure:
                is_expected = isinstance(error, (*UNREADABLE, MtlError, lmdb.MapFullError))
                log.error("serve: the tables cannot be followed: %s", told, exc_info=not is_expected)
            failure, failures = told, failures + 1
        if began - cleared > _CLEAR_SECONDS:
            try:
                if version is None:
                    delete_segments(overlay, log_folder, settings.remember_hours * 3600)
                forget_old(store, overlay, log_folder, settings.remember_hours * 3600)
            except (MtlError, lmdb.Error, OSError) as error:
                log.error("serve: nothing old is cleared away: %s", error)
            cleared = began
        pause = min(settings.refresh_seconds * 2 ** min(failures, 10), max(_LONGEST_WAIT, settings.refresh_seconds))
        while not stopped() and (left := began + pause - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
    store.close()
    overlay.close()


def delete_segments(overlay: Overlay, log_folder: Path, seconds: float) -> int:
    """Delete segments of the log that are older and of which no event waits; how many."""
    before, deleted = time.time() - seconds, 0
    if old := [path for path in sealed(log_folder) if path.stat().st_mtime < before]:
        waiting = {pending.event.event_id for pending in overlay.every().values()}
        for path in old:
            if not any(event.event_id in waiting for event in read([path])):
                path.unlink(missing_ok=True)
                deleted += 1
    return deleted


def forget_old(store: Store, overlay: Overlay, log_folder: Path, seconds: float) -> None:
    """Forget ids of events that are older, and what processes that were killed were reading."""
    for environment in (store.environment, overlay.environment):
        environment.reader_check()
    before = time.time() - seconds
    overlay.forget_ids(before)
    # Of what is in the log still: the overlay may be made from it again. A segment may be younger than its first events.
    oldest = min((path.stat().st_mtime for path in sealed(log_folder)), default=before)
    store.forget_confirmed(min(before, oldest) - seconds)
