"""Old segments of the log go when nothing in them waits; ids are forgotten with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from running import ROOT

from mtl.config import load_settings
from mtl.serving import housekeeping
from mtl.serving.contest import Record
from mtl.serving.housekeeping import delete_segments, forget_old, keep_like_the_tables
from mtl.serving.observations import Event, ObservationLog, read, sealed
from mtl.serving.overlay import Overlay, open_overlay
from mtl.serving.store import Store


def test_a_segment_goes_when_it_is_old_and_nothing_in_it_waits(tmp_path: Path) -> None:
    store, overlay, log = Store(tmp_path / "store", 1), open_overlay(tmp_path / "store", []), tmp_path / "log"
    writer = ObservationLog(log)
    for i in range(3):
        event = Event(f"e{i}", "u", "x", 1.0, 1.0, "2026-01-01T00:00:00+00:00")
        writer.append([event])
        writer.seal()
        overlay.insert([(event, False)])
    first, second, _ = sorted(sealed(log), key=lambda path: path.read_bytes())
    for path in (first, second):
        os.utime(path, (1e9, 1e9))
    overlay.delete([key for key, pending in overlay.every().items() if pending.event.event_id != "e1"])
    assert delete_segments(overlay, log, 3600.0) == 1  # e0 is old and done, e1 waits, e2 is young
    forget_old(store, overlay, log, 3600.0)
    assert not first.exists()
    assert second.exists()
    assert overlay.knows("e0")  # its id is young
    assert delete_segments(overlay, log, -60.0) == 1
    forget_old(store, overlay, log, -60.0)
    assert [overlay.knows(f"e{i}") for i in range(3)] == [False, True, False]


def test_what_was_confirmed_is_remembered_longer_than_its_segment(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    store.confirm(["a", "b"], now=1000.0)
    store.confirm(["c"], now=2000.0)
    store.forget_confirmed(1500.0)
    assert [store.is_confirmed(one) for one in "abc"] == [False, False, True]


def test_what_was_confirmed_is_remembered_while_the_log_has_it(tmp_path: Path) -> None:
    store, overlay, log = Store(tmp_path / "store", 1), open_overlay(tmp_path / "store", []), tmp_path / "log"
    writer = ObservationLog(log)
    events = [Event(one, "u", "x", 1.0, 1.0, "2026-01-01T00:00:00+00:00") for one in ("waits", "done")]
    writer.append(events)
    writer.seal()
    overlay.insert([(event, False) for event in events[:1]])
    os.utime(*sealed(log), (1e9, 1e9))
    store.confirm(["done"], now=1e9)
    store.confirm(["gone"], now=1e9 - 9000)
    assert delete_segments(overlay, log, 3600.0) == 0
    forget_old(store, overlay, log, 3600.0)
    assert [store.is_confirmed(one) for one in ("done", "gone")] == [True, False]
    # After the machine started anew: the row has the one, and its id is known; the other waits again.
    again = open_overlay(tmp_path / "store", read(sealed(log)), store.is_confirmed, anew=True)
    assert [pending.event.event_id for pending in again.every().values()] == ["waits"]
    assert again.knows("done")


def test_the_token_is_not_among_the_settings_that_a_model_keeps() -> None:
    settings = load_settings([], ["serve.token=12345"])
    assert settings.serve.token.get_secret_value() == "12345"
    assert "12345" not in settings.model_dump_json()
    assert "12345" not in repr(settings)


KINDS: dict[str, Callable[[Path], Store | Overlay | Record]] = {
    "store": lambda folder: Store(folder, 1),
    "overlay": Overlay,
    "record": Record,
}
_OPENED = """
import os, signal, sys
from pathlib import Path
from mtl.serving.contest import Record
from mtl.serving.overlay import Overlay
from mtl.serving.store import Store
kind, folder, then = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
opened = Store(folder, 1, readonly=True) if kind == "store" else {"overlay": Overlay, "record": Record}[kind](folder)
if then == "die":
    transaction = opened.environment.begin()
    os.kill(os.getpid(), signal.SIGKILL)
print(opened.environment.reader_check())
"""


def _elsewhere(kind: str, folder: Path, then: str) -> str:
    """What a process says that opened it too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _OPENED, kind, str(folder), then]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_was_reading_is_free_when_the_next_opens_it(tmp_path: Path, kind: str) -> None:
    opened = KINDS[kind](tmp_path)  # as by the other processes of the server, which live
    _elsewhere(kind, tmp_path, "die")
    assert _elsewhere(kind, tmp_path, "live") == "0"
    assert opened.environment.reader_check() == 0


def test_what_killed_processes_were_reading_is_free_when_what_is_old_is_cleared(tmp_path: Path) -> None:
    store, overlay = Store(tmp_path, 1), Overlay(tmp_path)
    for kind in ("store", "overlay"):
        _elsewhere(kind, tmp_path, "die")
    forget_old(store, overlay, tmp_path / "log", 3600.0)
    assert store.environment.reader_check() == overlay.environment.reader_check() == 0


def test_the_refresher_goes_on_whatever_fails_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are not there, an overlay that is full, and more failures than a power of two is a float of."""
    looks = 0

    def is_over() -> bool:
        nonlocal looks
        looks += 1
        return looks > 4000

    def fail(*_: object) -> None:
        raise lmdb.MapFullError("full")

    monkeypatch.setattr(housekeeping.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(housekeeping, "_LONGEST_WAIT", 0.0)
    monkeypatch.setattr(housekeeping, "_CLEAR_SECONDS", 0.0)
    monkeypatch.setattr(housekeeping.Refresher, "refresh", fail)
    monkeypatch.setattr(housekeeping.Overlay, "tell", fail)
    monkeypatch.setattr(housekeeping, "forget_old", fail)
    settings = load_settings([], ["serve.refresh_seconds=1e-9", "serve.store_gb=1"]).serve
    keep_like_the_tables(settings, str(tmp_path / "nowhere"), tmp_path, tmp_path / "log", is_over)
    assert looks > 4000
