"""jobs/serve.py as processes: starting, ending, being alone on a store, sharing what one worker learnt, dying."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from made_up import EVENTS_BEFORE, fill
from running import ROOT, Server, ask

from mtl.config import load_settings
from mtl.errors import ConfigError
from mtl.serving.observations import read, sealed
from mtl.serving.ranking import rescore_of
from mtl.serving.server import Folders
from mtl.serving.store import Store


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, 1)
    fill(store, 20, 30, 3)
    store.close()
    return folder


@pytest.fixture(scope="module")
def server(filled: Path) -> Iterator[Server]:
    with Server(filled / "nowhere", f"serve.store={filled}", "serve.token=secret sauce") as server:
        yield server


AUTHORIZED = {"authorization": "Bearer secret sauce"}


def test_it_serves_from_its_store_where_there_are_no_tables(server: Server) -> None:
    status, answer = server.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1", {"year": 2}]}, **AUTHORIZED)
    assert status == 200
    assert len(answer["scores"]) == 2


def test_every_worker_knows_what_one_of_them_learnt_at_once(server: Server) -> None:
    for i in range(40):  # connections go to either
        event = {"user": "u2", "input": "x3", "label": 4, "event_id": f"e{i}"}
        assert server.ask("POST", "/v1/observe", event, **AUTHORIZED)[0] == 200
        assert server.ask("GET", "/v1/users/u2", **AUTHORIZED)[1]["n_events"] == EVENTS_BEFORE + i + 1


def test_a_second_server_on_the_store_and_a_port_in_use_are_refused(
    server: Server, filled: Path, tmp_path: Path
) -> None:
    def refusal(store: Path, port: int) -> str:
        again = Server(filled / "nowhere", f"serve.store={store}", port=port)
        done = subprocess.run(
            again.command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 1
        assert done.stdout == ""
        return done.stderr.splitlines()[-1]

    assert "is run by process" in refusal(filled, 0)
    assert f"cannot listen on 127.0.0.1:{server.port}" in refusal(tmp_path, server.port)


def test_garbage_on_the_wire_harms_nobody(server: Server) -> None:
    for garbage in (
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"\xff\xfe",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(garbage)
            connection.settimeout(5)
            assert b"500" not in connection.recv(100)
    assert server.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize("sent", [b"", b'{"user":'])
def test_a_body_that_does_not_come_is_given_up(filled: Path, tmp_path: Path, sent: bytes) -> None:
    store = Store(tmp_path, 1)
    fill(store, 2, 2, 1)
    store.close()
    with (
        Server(tmp_path / "nowhere", f"serve.store={tmp_path}", "serve.body_seconds=0.3", workers=1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection,
    ):
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n" + sent)
        connection.settimeout(5)
        assert b" 408 " in connection.recv(1000)


def test_no_secret_and_no_data_in_the_log(server: Server) -> None:
    server.ask("POST", "/v1/predict", {"user": "someone private", "inputs": []}, authorization="Bearer secret sauce")
    server.ask("GET", "/v1/users/someone%20private", authorization="Bearer wrong")
    text = "".join(server.lines)
    assert "secret" not in text
    assert "private" not in text


def test_sigterm_ends_it_with_a_line_of_json_and_hands_the_log_over(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    fill(store, 2, 2, 1)
    store.close()
    with Server(tmp_path / "nowhere", f"serve.store={tmp_path}", "serve.segment_seconds=1000") as server:
        server.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 4, "event_id": "mine"})
        assert sealed(tmp_path / "observations") == []
    assert server.process.returncode == 0
    assert server.result["model_version"] == 1
    assert server.result["restarts"] == 0
    assert [event.event_id for event in read(sealed(tmp_path / "observations"))] == ["mine"]


def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    fill(store, 2, 2, 1)
    store.close()
    with Server(tmp_path / "nowhere", f"serve.store={tmp_path}") as server:
        children = server.children()
        server.process.kill()
        server.process.wait()
        ends = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            assert time.monotonic() < ends
            time.sleep(0.1)


def test_a_store_of_other_tables_is_refused(filled: Path, tmp_path: Path, server: Server) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "tables.txt").write_text("/elsewhere")
    words = Server(tmp_path / "tables", f"serve.store={store}").command
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "is the copy of the tables under /elsewhere" in done.stderr


def test_tables_in_a_catalog_are_refused() -> None:
    with pytest.raises(ConfigError, match="not from a catalog"):
        Folders.of(load_settings([], ["tables.root=main.models"]))


def test_what_rescores_is_a_function() -> None:
    assert rescore_of(load_settings([], ["serve.rescore=math:sqrt"]).serve) is math.sqrt
    for rescore, says in (("math:pi", "this is no function"), ("math:nothing", "has no attribute")):
        with pytest.raises(ConfigError, match=says):
            rescore_of(load_settings([], [f"serve.rescore={rescore}"]).serve)


def test_without_any_version_it_waits_and_says_so(tmp_path: Path) -> None:
    words = Server(tmp_path / "tables", f"serve.store={tmp_path / 'store'}").command
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    port = next(int(line.rsplit(":", 1)[1]) for line in process.stderr if "listening on" in line)
    ends = time.monotonic() + 20
    while True:
        try:
            status, answer = ask(port, "GET", "/readyz")
            break
        except OSError:
            assert time.monotonic() < ends
            time.sleep(0.1)
    assert (status, answer["error"]) == (503, "not_ready")
    assert ask(port, "POST", "/v1/predict", {"user": "u", "inputs": []})[0] == 503
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out)["model_version"] is None


class Balancer(threading.Thread):
    """Passes each connection on to one of several ports, to the next where one does not take it."""

    def __init__(self, ports: list[int]):
        super().__init__(daemon=True)
        self.ports, self.turn = ports, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        while True:
            client, _ = self.listener.accept()
            self.turn += 1
            order = [self.ports[(self.turn + i) % len(self.ports)] for i in range(len(self.ports))]
            for port in order:
                try:
                    server = socket.create_connection(("127.0.0.1", port), timeout=5)
                except OSError:
                    continue
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()
                break
            else:
                client.close()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_of_two_replicas_one_dies_and_only_what_it_had_in_hand_fails(tmp_path: Path) -> None:
    for name in ("one", "two"):
        store = Store(tmp_path / name, 1)
        fill(store, 20, 20, 2)
        store.close()
    replicas = [Server(tmp_path / "nowhere", f"serve.store={tmp_path / name}", workers=1) for name in ("one", "two")]
    with replicas[0], replicas[1]:
        balancer = Balancer([replica.port for replica in replicas])
        balancer.start()
        stop, failed, served, in_hand = threading.Event(), list[float](), [0] * 4, 4

        def client(number: int) -> None:
            while not stop.is_set():
                try:
                    assert ask(balancer.port, "POST", "/v1/predict", {"user": "u1", "inputs": ["x1"]})[0] == 200
                    served[number] += 1
                except Exception:
                    failed.append(time.monotonic())

        threads = [threading.Thread(target=client, args=(i,)) for i in range(in_hand)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        for pid in [replicas[0].process.pid, *replicas[0].children()]:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(1.5)
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(served) > 100
    assert len(failed) <= in_hand
    assert all(abs(at - killed) < 0.5 for at in failed)
