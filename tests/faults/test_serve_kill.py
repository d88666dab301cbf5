"""kill -9 of the server's workers, refresher and all of it: what was acknowledged counts once, whatever died."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "serving"), str(ROOT / "tests" / "faults")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from made_up import EVENTS_BEFORE, fill  # noqa: E402
from pyspark.sql import SparkSession  # noqa: E402
from running import Server, insist  # noqa: E402
from test_kill import LONG, PROBLEM, Place  # noqa: E402

from mtl.audit import audit  # noqa: E402
from mtl.serving.observations import read, sealed  # noqa: E402
from mtl.serving.store import Store  # noqa: E402

USERS, INPUTS = 20, 15  # of the made-up store and of the problem, whose 30 users include these
SECONDS = float(os.environ.get("MTL_SERVE_KILL_SECONDS", "8"))


class Client(threading.Thread):
    """Observes, one event after the other, each until it is acknowledged."""

    def __init__(self, name: str, port: int, stop: threading.Event, pause: float = 0.0):
        super().__init__(name=name)
        self.port, self.stop, self.acknowledged = port, stop, list[tuple[str, str]]()
        self.random, self.pause = random.Random(name), pause

    def run(self) -> None:
        while not self.stop.is_set():
            event, user = f"{self.name}-{len(self.acknowledged)}", f"u{self.random.randrange(USERS)}"
            body = {"user": user, "input": f"x{self.random.randrange(INPUTS)}", "label": 3.0, "event_id": event}
            insist(self.port, "POST", "/v1/observe", body, 300)
            self.acknowledged.append((event, user))
            self.stop.wait(self.pause)


def kill(*pids: int) -> int:
    """kill -9 of processes, some of which may have ended by themselves; how many had not."""
    killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def kill_some(server: Server, stop: threading.Event, seconds: float, pause: float = 0.8) -> int:
    """kill -9 of one child after the other at random moments, at most ``pause`` seconds apart; how many."""
    moments, killed, ends = random.Random(time.time_ns()), 0, time.monotonic() + seconds
    while time.monotonic() < ends and not stop.is_set():
        time.sleep(moments.uniform(0.1, pause))
        if children := server.children():
            killed += kill(moments.choice(children))
    return killed


def counts(port: int) -> dict[str, int]:
    """Number of events of every user, as the server tells it."""
    return {user: insist(port, "GET", f"/v1/users/{user}")["n_events"] for user in (f"u{i}" for i in range(USERS))}


def test_kill_9_of_any_process_loses_and_doubles_no_observation(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 1)
    fill(store, USERS, INPUTS, 3)
    store.close()
    arguments, stop = (tmp_path / "nowhere", f"serve.store={tmp_path / 'store'}"), threading.Event()
    with Server(*arguments) as server:
        clients = [Client(f"c{i}", server.port, stop) for i in range(4)]
        for client in clients:
            client.start()
        killed = kill_some(server, stop, SECONDS / 2)
        kill(server.process.pid, *server.children())
    with Server(*arguments, port=server.port) as server:
        killed += kill_some(server, stop, SECONDS / 2)
        stop.set()
        for client in clients:
            client.join()
        found = counts(server.port)
    left = list((tmp_path / "store" / "observations").glob(".open-*"))
    with Server(*arguments, port=server.port):
        pass  # the next to start recovers what a worker left that was killed last, and not started anew before the end
    acknowledged = [one for client in clients for one in client.acknowledged]
    expected = Counter(user for _, user in acknowledged)
    assert killed > 3
    assert len(acknowledged) > 50
    assert found == {user: EVENTS_BEFORE + expected[user] for user in found}
    logged = {event.event_id for event in read(sealed(tmp_path / "store" / "observations"))}
    assert logged == {event for event, _ in acknowledged}
    print(f"{killed} kills, {len(acknowledged)} acknowledged, lost 0, doubled 0, {len(left)} segments recovered last")


@pytest.mark.skipif(not LONG, reason="of the long campaign: make faults")
def test_kill_9_while_rows_take_over_from_observations(spark: SparkSession, tmp_path: Path) -> None:
    place = Place(tmp_path, spark)
    place.ingest(place.write("base.csv", np.arange(len(PROBLEM))))
    place.retrain()
    store, stop = tmp_path / "tables" / "_serving", threading.Event()  # where it is by default
    with Server(tmp_path / "tables", "serve.refresh_seconds=0.2", "serve.segment_seconds=2") as server:
        before = counts(server.port)
        clients = [Client(f"c{i}", server.port, stop, 0.05) for i in range(2)]
        for client in clients:
            client.start()
        ends = time.monotonic() + 60
        while not sealed(store / "observations"):
            assert time.monotonic() < ends, "no segment was sealed"
            time.sleep(0.2)
        killer_stop = threading.Event()
        killer = threading.Thread(target=kill_some, args=(server, killer_stop, 600.0, 6.0))
        killer.start()
        place.ingest(str(store / "observations"))
        place.update()
        stop.set()
        for client in clients:
            client.join(60)
        killer_stop.set()
        killer.join()
        expected = Counter(user for client in clients for _, user in client.acknowledged)
        wanted = {user: before[user] + expected[user] for user in before}
        assert counts(server.port) == wanted  # some in rows, some not yet
        time.sleep(1)
        place.ingest(str(store / "observations"))
        place.update()
        ends = time.monotonic() + 60
        while (left := sum(insist(server.port, "GET", f"/v1/users/{user}")["n_unconfirmed"] for user in before)) > 0:
            assert time.monotonic() < ends, f"{left} observations were not taken over"
            assert counts(server.port) == wanted
            time.sleep(0.5)
        assert counts(server.port) == wanted
    checked = audit(place.tables, place.settings)
    assert not checked["broken"]
    assert checked["checks"]["update_adds_up"]["in_users"] == len(PROBLEM) + sum(expected.values())
