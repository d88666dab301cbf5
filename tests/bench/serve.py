"""What a prediction costs over a route that does nothing, how long scoring, top-k and a start take; prints JSON.

    python tests/bench/serve.py --folder /somewhere/with/5GB

The server is jobs/serve.py with one worker over a made-up store; the client is a process of its own. The no-op is POST
/healthz: a route of the same server, which reads the same bodies and answers a constant. A prediction that can be answered at
once goes past routes and tasks (mtl/serving/fastpath.py), and the no-op does not: what that saves may be more than a prediction
costs. On two cores the client can be what saturates: the worker's own CPU time for each request is given too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

import numpy as np  # noqa: E402
from made_up import fill  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from mtl.config import load_settings  # noqa: E402
from mtl.serving import scorer  # noqa: E402
from mtl.serving.overlay import open_overlay  # noqa: E402
from mtl.serving.store import Store  # noqa: E402
from mtl.serving.view import open_view  # noqa: E402

INPUTS_A_REQUEST = 10


class Server:
    """jobs/serve.py over a store, until the block ends."""

    def __init__(self, store: Path, workers: int = 1):
        settings = [f"tables.root={store}/nowhere", f"serve.store={store}", f"serve.workers={workers}"]
        words = [word for setting in settings for word in ("--set", setting)]
        self.command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", "0", *words]

    def __enter__(self) -> Server:
        began = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "ready on" in line:
                break
        else:
            raise SystemExit("the server did not start")
        self.seconds = time.perf_counter() - began
        self.port = int(line.split("http://127.0.0.1:")[1].split()[0])
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)

    def cpu_seconds(self) -> float:
        """Of all its processes, the refresher's little included."""
        children = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True)
        total = 0
        for pid in children.stdout.split():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")


def load(server: Server, path: str, bodies: Path, seconds: float, rate: float | None = None) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests/bench/load.py"), "--port", str(server.port), "--path", path]
    command += ["--bodies", str(bodies), "--seconds", str(seconds)] + (["--rate", str(rate)] if rate else [])
    before = server.cpu_seconds()
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # A second of warming up is in the CPU time and not in the requests; at one rate it is its share.
    spent = (server.cpu_seconds() - before) * seconds / (seconds + 1)
    return {**found, "cpu_us": round(spent / found["requests"] * 1e6, 1)}


def overhead(folder: Path, users: int, inputs: int, seconds: float, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    paths: dict[str, Path] = {}
    for name, user in (("uniform", random.integers(0, users, 20_000)), ("zipf", random.zipf(1.1, 60_000))):
        some = user[user < users][:20_000]
        lines = [
            json.dumps({"user": f"u{u}", "inputs": [f"x{i}" for i in random.integers(0, inputs, INPUTS_A_REQUEST)]})
            for u in some
        ]
        paths[name] = folder / f"bodies-{name}.jsonl"
        paths[name].write_text("\n".join(lines))
    with Server(folder) as server:
        result: dict[str, Any] = {"seconds_to_ready": round(server.seconds, 2)}
        routes = {"noop": ("/healthz", paths["uniform"]), **{n: ("/v1/predict", paths[n]) for n in paths}}
        saturated: dict[str, list[dict[str, Any]]] = {name: [] for name in routes}
        for _ in range(rounds):  # in turn, for the machine is not always the same
            for name, (path, bodies) in routes.items():
                saturated[name].append(load(server, path, bodies, seconds))
        best = {name: max(found, key=lambda one: one["per_second"]) for name, found in saturated.items()}
        result["saturated"] = best
        half = best["noop"]["per_second"] / 2
        calm: dict[str, list[dict[str, Any]]] = {name: [] for name in routes}
        for _ in range(rounds):
            for name, (path, bodies) in routes.items():
                calm[name].append(load(server, path, bodies, seconds, half))
        middle = {name: sorted(found, key=lambda one: one["p99_ms"])[len(found) // 2] for name, found in calm.items()}
        result["at_half_of_noop"] = middle
        for name in paths:
            result[f"throughput_ratio_{name}"] = round(best[name]["per_second"] / best["noop"]["per_second"], 3)
            result[f"cpu_ratio_{name}"] = round(best["noop"]["cpu_us"] / best[name]["cpu_us"], 3)
            result[f"p99_ratio_{name}"] = round(middle[name]["p99_ms"] / middle["noop"]["p99_ms"], 3)
    return result


def microseconds(work: Any, times: int) -> float:
    """Median of one call."""
    work(0)
    taken = []
    for i in range(times):
        began = time.perf_counter()
        work(i)
        taken.append(time.perf_counter() - began)
    return round(float(np.median(taken)) * 1e6, 2)


def scoring(folder: Path, inputs: int) -> dict[str, float]:
    store, overlay = Store(folder, 64, readonly=True), open_overlay(folder, [])
    view = open_view(store, overlay, load_settings().serve)
    assert view is not None
    random = np.random.default_rng(0)
    hot = [f"x{i}" for i in random.integers(0, inputs, 100)]
    sets = [[f"x{i}" for i in random.integers(0, inputs, 100)] for _ in range(200)]
    for one in [hot, *sets]:
        view.gather(one)
    user = view.weights_of("u1")
    rows = view.gather(hot)
    return {
        "score_100_us": microseconds(lambda i: view.score(user, rows), 2000),
        "gather_and_score_100_same_us": microseconds(lambda i: view.score(user, view.gather(hot)), 2000),
        "gather_and_score_100_any_us": microseconds(lambda i: view.score(user, view.gather(sets[i % 200])), 2000),
        "user_us": microseconds(lambda i: view.weights_of(f"u{i * 7}"), 2000),
    }


def top_k() -> dict[str, float]:
    random = np.random.default_rng(0)
    found = {}
    for n, k in ((100_000, 20), (1_000_000, 50)):
        columns = random.normal(size=(k + 1, n)).astype(np.float32)
        user = scorer.Weights(random.normal(size=k + 1), np.zeros(0), 0)
        found[f"top10_of_{n}_k{k}_ms"] = (
            microseconds(lambda i, u=user, c=columns: scorer.largest(scorer.linear_scores(c, u), 10 + 32), 50) / 1e3
        )
        found[f"product_alone_{n}_k{k}_ms"] = (
            microseconds(lambda i, u=user, c=columns: scorer.linear_scores(c, u), 50) / 1e3
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for the store; kept and used again when given")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        if not (folder / "tables.lmdb").exists():
            store = Store(folder, 64)
            fill(store, given.users, given.inputs, given.k)
            store.close()
        result = overhead(folder, given.users, given.inputs, given.seconds, given.rounds)
        with threadpool_limits(1):
            result |= {"scoring": scoring(folder, given.inputs), "top": top_k()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
