"""Counts of all workers together: where they are kept, and that any thread may publish them."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from calling import share_metrics

from mtl.serving import metrics, server
from mtl.serving.metrics import Metrics, Reading


def test_the_files_are_in_memory_and_go_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, store, other = (tmp_path / name for name in ("memory", "store", "other"))
    for folder in (memory, store, other):
        folder.mkdir()
    monkeypatch.setattr(metrics, "_IN_MEMORY", memory)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")  # as it was afterwards
    with metrics.shared(other), metrics.shared(store):
        folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        assert folder.parent == memory
        assert folder.stat().st_mode & 0o77 == 0
        assert len(list(memory.iterdir())) == 2
        killed = folder.with_name(folder.name[:-1] + "-")
        killed.mkdir()
        (killed / "counter_1.db").touch()
    assert list(memory.iterdir()) == [killed]
    with metrics.shared(store):
        assert not killed.exists()
    assert list(store.iterdir()) == list(memory.iterdir()) == []


def test_without_files_in_memory_they_are_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_IN_MEMORY", tmp_path / "nowhere")
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    with metrics.shared(tmp_path):
        assert Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).parent == tmp_path


def test_threads_may_publish_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    share_metrics()
    measured = Metrics(lambda: {"mtl_made_up": Reading("Made up.", 3.0, "total")})
    make, failed = measured._counter, list[Exception]()

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(0.05)
        return make(*given, **named)

    def publish() -> None:
        try:
            measured.publish()
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(measured, "_counter", slowly)
    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert b"mtl_made_up_total 3.0" in measured.text()


def test_a_worker_looks_at_its_store_even_where_nothing_can_be_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_VERSION_AGE", 0.001)
    service, measured = Mock(view=None), Mock()
    measured.publish.side_effect = OSError("no room")

    async def looking() -> None:
        keep = server._keep_looking(service, measured, Mock())
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(keep, 0.5)

    asyncio.run(looking())
    assert service.look.call_count > 1
