"""The application without a socket: requests as ASGI messages, or as bytes, on a loop of its own."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from made_up import fill

from mtl.config import load_settings
from mtl.effects import Effects
from mtl.serving import metrics
from mtl.serving.contest import Record, Rival, contest_of
from mtl.serving.fastpath import FastPath
from mtl.serving.gauges import readings
from mtl.serving.http import PREDICT_PATH, application
from mtl.serving.observer import Observer
from mtl.serving.overlay import open_overlay
from mtl.serving.service import Service
from mtl.serving.store import Store
from mtl.serving.turn import Turn

USERS, INPUTS, K = 20, 60, 3


class Client:
    def __init__(self, app: Any, service: Service, turn: Turn):
        self.app, self.service, self.turn, self.loop = app, service, turn, asyncio.new_event_loop()

    def send(
        self, method: str, path: str, body: bytes = b"", query: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); fails where no answer comes in ten seconds."""

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        return self.loop.run_until_complete(self.exchange(method, path, receive, query, headers))

    async def exchange(
        self,
        method: str,
        path: str,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        query: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """As :meth:`send`, its body received part by part."""
        messages: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": quote(path, safe="/%", errors="replace").encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query,
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        await asyncio.wait_for(self.app(scope, receive, send), 10)
        head = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        return messages[0]["status"], head, b"".join(message.get("body", b"") for message in messages[1:])

    def ask(self, method: str, path: str, body: Any = None, query: str = "") -> tuple[int, Any]:
        content = b"" if body is None else json.dumps(body).encode()
        status, _, answer = self.send(method, path, content, query.encode())
        return status, json.loads(answer)


@cache
def share_metrics() -> None:
    """Once: a process keeps its numbers in one folder for good."""
    metrics.share(tempfile.mkdtemp())


@contextmanager
def calling(
    folder: Path, *assignments: str, loss: str = "squared", effects: Effects = (), of_rivals: Effects = ()
) -> Iterator[Client]:
    """A client of an application over a made-up store, and one for each of serve.rivals."""
    settings = load_settings([], list(assignments)).serve
    share_metrics()
    store, overlay = Store(folder, 1), open_overlay(folder, [])
    fill(store, USERS, INPUTS, K, loss, effects=effects)
    store.write_attributes((f"x{i}", {"year": i / 20, "colour": ["red", "blue"][i % 2]}) for i in range(INPUTS + 1))
    folders = {version: folder / f"rival-{version}" for version in settings.rivals}
    rivals = [Rival(Store(at, 1), open_overlay(at, []), version) for version, at in folders.items()]
    for rival in rivals:
        fill(rival.store, USERS, INPUTS, K, loss, seed=rival.version, effects=of_rivals, version=rival.version)
    contest = contest_of(settings, rivals, Record(folder / "contest")) if rivals else None
    logs = folder / "observations", folder / "feedback", folder / "decisions"
    record = contest.record if contest else None
    observer = Observer(overlay, *logs, 1000.0, 1e9, rivals, record)
    observer.start()
    service = Service(store, overlay, observer, settings, contest=contest)
    service.look()
    assert service.view is not None
    ends = time.monotonic() + 10
    while service.view.evaluator.studied is None and time.monotonic() < ends:
        time.sleep(0.001)
    measured = metrics.Metrics(lambda: readings(service))
    yield Client(application(service, measured), service, Turn(PREDICT_PATH, FastPath(service, measured)))
    observer.stop()
    store.close()
    overlay.close()
