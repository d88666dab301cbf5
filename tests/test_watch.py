"""The figures' server, without a stream behind it."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mtl.backlog import delays
from mtl.errors import ConfigError
from mtl.switch import Comparison
from mtl.watch import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    server = Watch("127.0.0.1", 0)
    yield server
    server.close()


def scraped(watch: Watch) -> dict[str, Any]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{watch.port}/metrics").read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_a_scrape_has_what_the_last_look_took(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        ("loss", {"version": "1"}, 0.5),
        ("loss", {"version": "2"}, 0.4),
        ("applied_events", {"version": "1"}, 7),
    ]
    monkeypatch.setattr(watch, "_of_fleet", lambda fleet: samples)
    watch.look(SimpleNamespace())
    found = scraped(watch)
    loss = {sample.labels["version"]: sample.value for sample in found["mtl_update_loss"].samples}
    assert loss == {"1": 0.5, "2": 0.4}
    assert (found["mtl_update_loss"].type, found["mtl_update_applied_events"].type) == ("gauge", "counter")
    assert all(family.documentation for family in found.values())


def test_a_comparison_is_shown_while_its_version_is_a_candidate(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was refused or went live would keep an alert firing."""
    monkeypatch.setattr("mtl.watch.models.candidates", lambda tables: [3])
    monkeypatch.setattr("mtl.watch.ingested", lambda tables: (0, 0))
    compared = {version: Comparison(10, 1.0, 2.0) for version in (2, 3)}
    fleet: Any = SimpleNamespace(tables=None, streams={}, live=1, comparisons=compared, promoted=[])
    shown = {labels["version"] for name, labels, _ in watch._of_fleet(fleet) if name == "compared_events"}
    assert shown == {"3"}


def test_a_look_that_fails_is_counted_and_stops_nothing(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_of_fleet", lambda fleet: [("promotions", {}, 3.0)])
    watch.look(SimpleNamespace())
    monkeypatch.undo()
    watch.look(SimpleNamespace())  # has no streams
    found = scraped(watch)
    assert found["mtl_update_failed_looks"].samples[0].value == 1
    assert found["mtl_update_promotions"].samples[0].value == 3


def test_a_port_that_is_taken_is_a_mistake_in_the_settings() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"update.metrics_port = {port} on 127.0.0.1"):
            Watch("127.0.0.1", port)


def test_what_is_dear_is_taken_now_and_then(watch: Watch) -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return len(calls)

    assert [watch._now_and_then("x", 1, 60, work) for _ in range(3)] == [1, 1, 1]
    assert watch._now_and_then("x", 2, 60, work) == 2
    time.sleep(0.01)
    assert watch._now_and_then("x", 1, 0.001, work) == 3


def test_a_batch_is_as_late_as_its_oldest_commit() -> None:
    start = datetime(2026, 1, 1)
    committed = {commit: start + timedelta(seconds=10 * commit) for commit in (4, 5, 6, 7)}
    # Commits 4 and 5 and two files of 6; the rest of 6; 7.
    ends = [(6, 1), (7, -1), (8, -1)]
    applied = [start + timedelta(seconds=s) for s in (65, 66, 75)]
    assert delays(4, ends, applied, committed) == [25.0, 6.0, 5.0]
    del committed[4]
    assert str(delays(4, ends, applied, committed)) == "[nan, 6.0, 5.0]"
