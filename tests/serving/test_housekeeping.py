"""Old segments of the log go when nothing in them waits; ids are forgotten with them."""

from __future__ import annotations

import os
from pathlib import Path

from mtl.config import load_settings
from mtl.serving.housekeeping import clear_old
from mtl.serving.observations import Event, ObservationLog, sealed
from mtl.serving.overlay import open_overlay
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
    assert clear_old(store, overlay, log, 3600.0) == 1  # e0 is old and done, e1 waits, e2 is young
    assert not first.exists()
    assert second.exists()
    assert overlay.knows("e0")  # its id is young
    assert clear_old(store, overlay, log, -60.0) == 1
    assert [overlay.knows(f"e{i}") for i in range(3)] == [False, True, False]


def test_what_was_confirmed_is_remembered_longer_than_its_segment(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    store.confirm(["a", "b"], now=1000.0)
    store.confirm(["c"], now=2000.0)
    store.forget_confirmed(1500.0)
    assert [store.is_confirmed(one) for one in "abc"] == [False, False, True]


def test_the_token_is_not_among_the_settings_that_a_model_keeps() -> None:
    settings = load_settings([], ["serve.token=12345"])
    assert settings.serve.token.get_secret_value() == "12345"
    assert "12345" not in settings.model_dump_json()
    assert "12345" not in repr(settings)
