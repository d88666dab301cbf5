"""The load controller over HTTP: deadlines and classes give way, requests are refused last, and all of it comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import Client, calling
from connecting import connect, posted, settle

from mtl.config import load_settings
from mtl.errors import ConfigError
from mtl.serving.admission import Admission
from mtl.serving.http import PREDICT_PATH
from mtl.serving.load import State

OBJECTIVE = (
    "serve.objective_ms=50",
    "serve.deadline_ms=[4000, 2000, 1000]",
    "serve.classes=rounded",
    "serve.coarseness=[0.2, 0.5]",
)
LAST = 4  # three deadlines, then two coarser classes


def admission_of(client: Client) -> Admission:
    assert client.service.admission is not None
    return client.service.admission


def overload(admission: Admission, ticks: int, seconds: float = 1.0) -> None:
    """As if a hundred requests a tick took that long, and forty were in hand."""
    for _ in range(ticks):
        admission._latencies += [seconds] * 100
        admission.admitted += 100
        admission.inside, before = 40, admission.inside
        admission._ticked = time.monotonic() - 0.25
        admission.tick()
        admission.inside = before


def rest(admission: Admission, ticks: int) -> None:
    for _ in range(ticks):
        admission._latencies += [0.001] * 10
        admission.admitted += 10
        admission._ticked = time.monotonic() - 0.25
        admission.tick()


def gauges(client: Client) -> dict[str, float]:
    _, _, text = client.send("GET", "/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith("mtl_load_")]
    return {line.split("{")[0].split()[0]: float(line.split()[-1]) for line in lines}


def test_load_takes_time_then_likeness_then_admission_and_gives_them_back(tmp_path: Path) -> None:
    body = {"user": "u1", "inputs": ["x1", {"year": 0.5}]}
    with calling(tmp_path, *OBJECTIVE) as client:
        admission = admission_of(client)
        assert "bound" not in client.ask("POST", "/v1/predict", body)[1]["scores"][1]
        assert gauges(client)["mtl_load_deadline_ms"] == 4000
        overload(admission, 1)
        assert admission.state.rung > 0
        assert admission.state.limit is None
        overload(admission, 3)
        assert admission.state.rung == LAST
        coarse = client.ask("POST", "/v1/predict", body)[1]
        assert coarse["scores"][1]["bound"] >= 0
        told = gauges(client)
        assert (told["mtl_load_rung"], told["mtl_load_deadline_ms"], told["mtl_load_coarseness"]) == (LAST, 1000, 2)
        assert told["mtl_load_steps_down_total"] >= LAST
        overload(admission, 3)
        limit = admission.state.limit
        assert limit is not None
        admission.inside += limit  # as many as may be
        status, headers, answer = client.send("POST", "/v1/predict", b'{"user":"u1","inputs":["x1"]}')
        assert status == 503
        assert b"overloaded" in answer
        assert 1 <= int(headers["retry-after"]) <= 30
        assert client.send("GET", "/healthz")[0] == 200  # probes are always answered
        admission.inside -= limit
        rest(admission, 60)
        assert (admission.state.rung, admission.state.limit) == (0, None)
        assert admission.in_flight == 0
        assert "bound" not in client.ask("POST", "/v1/predict", body)[1]["scores"][1]
        assert gauges(client)["mtl_load_steps_up_total"] >= LAST


def test_a_shorter_deadline_than_the_requests_own_holds_under_load(tmp_path: Path) -> None:
    with calling(tmp_path, *OBJECTIVE) as client:
        overload(admission_of(client), 4)
        assert client.service.view is not None
        hang = threading.Event()
        client.service.view.evaluator.lanes[0].function = lambda encoded, needed: hang.wait(20)
        began = time.monotonic()
        body = {"user": "u1", "inputs": [{"year": 0.7}], "deadline_ms": 60_000}
        assert client.ask("POST", "/v1/predict", body)[1]["incomplete_inputs"] == [0]
        assert time.monotonic() - began < 5
        hang.set()


def test_uploads_that_trickle_are_given_up_and_are_no_load(tmp_path: Path) -> None:
    uploads, asked = 3, b'{"user":"u1","inputs":["x1"]}'

    async def trickle() -> dict[str, Any]:
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def at_once() -> dict[str, Any]:
        return {"type": "http.request", "body": asked, "more_body": False}

    async def run(client: Client) -> tuple[list[int], list[int]]:
        slow = [asyncio.create_task(client.exchange("POST", "/v1/predict", trickle)) for _ in range(uploads)]
        await asyncio.sleep(0.05)
        quick = [(await client.exchange("POST", "/v1/predict", at_once))[0] for _ in range(20)]
        return [(await one)[0] for one in slow], quick

    with calling(tmp_path, *OBJECTIVE, "serve.body_seconds=0.5") as client:
        admission = admission_of(client)
        admission.state = State(rung=LAST, limit=2)
        admission.begun = lambda: uploads + 1  # as the server counts them
        began = time.monotonic()
        assert client.loop.run_until_complete(run(client)) == ([408] * uploads, [200] * 20)
        assert time.monotonic() - began < 3
        admission.begun = lambda: 0
        assert admission.in_flight == 0
        assert max(admission._latencies) < 0.4


def test_requests_that_fail_leave_as_well(tmp_path: Path) -> None:
    with calling(tmp_path, *OBJECTIVE) as client:
        client.ask("POST", "/v1/predict", {"user": "u1"})
        client.ask("GET", "/v1/similar", query="input=nothing")
        assert admission_of(client).in_flight == 0
        assert len(admission_of(client)._latencies) == 2


def test_the_loops_lag_counts_as_time_that_requests_took() -> None:
    admission = Admission(50.0, [100.0], 0)
    admission.lag = 0.2
    for _ in range(50):
        assert admission.enter()
        admission.leave(0.001)
    assert np.allclose(admission._latencies, 0.201)


def test_of_requests_that_come_at_once_as_many_are_answered_as_may_be(tmp_path: Path) -> None:
    async def at_once() -> list[bytes]:
        connections = [connect(client.app, client.turn) for _ in range(5)]
        for protocol, _ in connections:
            protocol.data_received(posted(PREDICT_PATH, b'{"user":"u1","inputs":["x1"]}'))
        await settle()
        return [transport.written[0] for _, transport in connections]

    with calling(tmp_path, *OBJECTIVE) as client:
        admission = admission_of(client)
        admission.state = State(rung=LAST, limit=3)
        answers = client.loop.run_until_complete(at_once())
        assert [int(answer.split()[1]) for answer in answers] == [200] * 3 + [503] * 2
        assert b"\r\nretry-after: 1\r\n" in answers[3]
        assert b"overloaded" in answers[3]
        assert (admission.in_flight, admission.admitted, admission.refused) == (0, 3, 2)
        assert len(admission._latencies) == 3


def test_requests_that_wait_for_the_loop_are_in_the_server() -> None:
    admission = Admission(50.0, [100.0], 0)
    admission.state = State(limit=3)
    waiting = 5
    admission.begun = lambda: waiting
    found = list[bool]()
    while waiting:
        found.append(admission.enter())
        if found[-1]:
            admission.leave(0.001)
        waiting -= 1
    assert found == [False, False, True, True, True]


def test_without_an_objective_there_is_no_controller(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        assert client.service.admission is None
        assert client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1"]})[0] == 200


def test_deadlines_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"serve\.deadline_ms.*shorter"):
        load_settings([], ["serve.deadline_ms=[10, 20]"])
