"""jobs/serve.py as a process, and what a client asks of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The job with settings of its own, until the block ends."""

    def __init__(self, root: Path, *assignments: str, port: int = 0, workers: int = 2):
        settings = [f"tables.root={root}", f"serve.workers={workers}", "serve.segment_seconds=0.5", *assignments]
        words = [word for setting in settings for word in ("--set", setting)]
        self.command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port), *words]
        self.port, self.lines, self.result = port, list[str](), dict[str, Any]()

    def __enter__(self) -> Server:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "listening on" in line:
                self.port = int(line.rsplit(":", 1)[1])
            if "ready on" in line:
                return self
        raise AssertionError("the server did not start: " + "".join(self.lines))

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=40)
        self.lines += err.splitlines()
        self.result = json.loads(out.splitlines()[-1]) if out else {}

    def children(self) -> list[int]:
        found = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        return ask(self.port, method, path, body, **headers)


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """(status, decoded body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text.decode()
    finally:
        connection.close()


def insist(port: int, method: str, path: str, body: Any = None, seconds: float = 60.0) -> Any:
    """The answer to a request that is repeated until there is a good one."""
    ends = time.monotonic() + seconds
    while True:
        try:
            status, answer = ask(port, method, path, body)
            if status == 200:
                return answer
        except (OSError, http.client.HTTPException):
            pass
        if time.monotonic() > ends:
            raise AssertionError(f"no answer to {path} in {seconds} s")
        time.sleep(0.05)
