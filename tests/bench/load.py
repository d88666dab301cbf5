"""A client that loads one route of a server from a process of its own; prints JSON. See tests/bench/serve.py."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np


class Connection(asyncio.Protocol):
    """One request in flight at a time; a closed loop, or starts at given times."""

    def __init__(self, load: Load):
        self.load, self.buffer = load, b""
        self.is_idle = True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, due: float | None = None) -> None:
        self.is_idle = False
        self.started = due or time.perf_counter()
        self.transport.write(self.load.next_request())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        place = self.buffer.find(b"content-length: ")
        length = int(self.buffer[place + 16 : self.buffer.index(b"\r\n", place)])
        if len(self.buffer) < head + 4 + length:
            return
        ok = self.buffer.startswith(b"HTTP/1.1 200")
        self.buffer, self.is_idle = b"", True
        self.load.answered(self, ok)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.is_idle:
            self.load.lost += 1


class Load:
    def __init__(self, bodies: list[bytes], head: bytes, rate: float | None):
        self.requests = [
            head + b"content-length: %d\r\n\r\n" % len(body) + body if body else head + b"\r\n" for body in bodies
        ]
        self.rate, self.times, self.failed, self.lost = rate, [], 0, 0
        self.at, self.ends, self.due = 0, 0.0, []

    def next_request(self) -> bytes:
        self.at = (self.at + 1) % len(self.requests)
        return self.requests[self.at]

    def answered(self, connection: Connection, ok: bool) -> None:
        now = time.perf_counter()
        self.times.append(now - connection.started)
        self.failed += not ok
        if self.rate is None:
            if now < self.ends:
                connection.send()
        elif self.due:  # a start that found no idle connection counts from when it was due
            connection.send(self.due.pop(0))

    async def run(self, host: str, port: int, connections: int, seconds: float) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        protocols = [
            (await loop.create_connection(lambda: Connection(self), host, port))[1] for _ in range(connections)
        ]
        for measured in (1.0, seconds):  # the first to warm up
            self.times, self.failed = [], 0
            begin = time.perf_counter()
            self.ends = begin + measured
            if self.rate is None:
                for protocol in protocols:
                    protocol.send()
                await asyncio.sleep(measured)
            else:
                await self._open_loop(protocols, begin)
            elapsed = time.perf_counter() - begin
            while not all(protocol.is_idle for protocol in protocols):
                await asyncio.sleep(0.01)
        times = np.array(self.times) * 1e3
        return {
            "requests": len(times),
            "per_second": round(len(times) / elapsed),
            "failed": self.failed,
            "lost": self.lost,
            **{f"p{q}_ms": round(float(np.percentile(times, q)), 3) for q in (50, 95, 99)},
        }

    async def _open_loop(self, protocols: list[Connection], begin: float) -> None:
        assert self.rate is not None
        at = begin
        while at < self.ends:
            at += random.expovariate(self.rate)
            while (wait := at - time.perf_counter()) > 0:
                await asyncio.sleep(wait if wait > 0.002 else 0)
            idle = next((protocol for protocol in protocols if protocol.is_idle), None)
            if idle is None:
                self.due.append(at)
            else:
                idle.send(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--bodies", default="", help="a file of one body a line; none: GET")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=float, help="starts a second at random times; none: as fast as answers come")
    given = parser.parse_args()
    bodies = Path(given.bodies).read_bytes().splitlines() if given.bodies else [b""]
    method = "POST" if given.bodies else "GET"
    head = f"{method} {given.path} HTTP/1.1\r\nhost: {given.host}\r\n".encode()
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass
    load = Load(bodies, head, given.rate)
    print(json.dumps(asyncio.run(load.run(given.host, given.port, given.connections, given.seconds))))


if __name__ == "__main__":
    main()
