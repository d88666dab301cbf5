"""Answers by a deadline when feature functions are slow at random, or hang.

Planted inputs, users and labels: ten correlated basis functions, each in a lane of its own, whose calls take from 1 to 100 ms
(log-uniform, the function's own scale); one call in 500 stops for 2 s, and of the last two functions every call from the
middle of the run on hangs to its end. Clients in threads ask for ten inputs each, again and again.

``kept``: of ``--requests`` at ``--deadline-ms``, the share answered within the deadline + 5 ms, latencies by percentile, and
where the lanes' threads went. A request's time is all of it: order, evaluation, conditioning, scores.

``rmse``: by deadline, of the same answers with what was not reached replaced by its conditional mean, by its population mean,
and of failing, which has the user's mean for an answer unless everything was reached; with the share of labels inside the
90% interval. No function hangs here. The floor is everything evaluated.

``machine``: the same share of as many threads that do nothing but sleep until the deadline: what scheduling alone costs.

    python tests/bench/deadline.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from mtl import figures, gaussian
from mtl.gaussian import Array
from mtl.serving.anytime import Population, Step, order
from mtl.serving.executor import Lane, evaluate
from mtl.working import belief

K, INPUTS, USERS, AT_ONCE, NOISE = 10, 2000, 200, 10, 0.5
RESERVE = 0.001  # seconds of the deadline that scoring is left
DEADLINES_MS = (2, 5, 10, 20, 40, 80, 160, 320)
WITHIN = NormalDist().inv_cdf(0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="figures", help="folder of the plot (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rmse-requests", type=int, default=400, help="of each deadline")
    parser.add_argument("--deadline-ms", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--at-once", type=int, default=1, help="evaluations of a request at a time (default: %(default)s)"
    )
    given = parser.parse_args()
    # As a server that keeps deadlines is set up (mtl.serving.executor).
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()
    planted = Planted.draw(0)
    kept = run(planted, given.requests, given.deadline_ms, given.clients, given.at_once, hangs=True)
    by_deadline = {
        ms: run(planted, given.rmse_requests, ms, given.clients, given.at_once, hangs=False) for ms in DEADLINES_MS
    }
    errors = {
        name: [of["rmse"][name] for of in by_deadline.values()]
        for name in ("conditional mean", "population mean", "failing", "everything")
    }
    figures.plot_curves(
        Path(given.out) / "deadline.png",
        {name: figures.Curve(DEADLINES_MS, values) for name, values in errors.items()},
        "Error by deadline, ten functions of 1 to 100 ms",
        "deadline (ms)",
        "RMSE (label units)",
        x_log=True,
    )
    print(
        json.dumps(
            {
                "experiment": "deadline",
                "kept": {"deadline_ms": given.deadline_ms, "clients": given.clients, "at_once": given.at_once, **kept},
                "machine": sleeps(given.requests, given.deadline_ms, given.clients),
                "by_deadline": by_deadline,
            }
        )
    )


@dataclass(frozen=True)
class Planted:
    """Inputs with their functions' values, and what is believed of users."""

    values: Array  # (INPUTS, d)
    w_mean: Array  # (USERS, d), the posterior means
    w: Array  # the weights themselves
    w_covariance: Array  # (d, d)
    population: Population
    scale_ms: Array  # (d,), the median time of a function

    @classmethod
    def draw(cls, seed: int) -> Planted:
        random, d = np.random.default_rng(seed), K + 1
        root = random.normal(size=(d, 4)) / 2  # four causes in common, and something of each function's own
        values = random.normal(size=(INPUTS, 4)) @ root.T + 0.4 * random.normal(size=(INPUTS, d))
        covariance = 0.02 * np.eye(d)
        w = random.normal(size=(USERS, d))
        w_mean = w - random.multivariate_normal(np.zeros(d), covariance, USERS)
        # As a server would: from inputs that were evaluated once, not those that are asked for.
        population = Population.fit(values[: INPUTS // 2], 0.02 * np.eye(d))
        return cls(values, w_mean, w, covariance, population, np.geomspace(3, 30, d))


def run(planted: Planted, requests: int, deadline_ms: float, clients: int, at_once: int, hangs: bool) -> dict:
    d, over = K + 1, threading.Event()
    half_way, count = threading.Event(), iter(range(requests))
    draws = [np.random.default_rng([7, i]) for i in range(d)]
    locks = [threading.Lock() for _ in range(d)]

    def function(i: int):
        def call(which: np.ndarray, needed: tuple) -> Array:
            with locks[i]:
                seconds = planted.scale_ms[i] / 1000 * 3.3 ** draws[i].uniform(-1, 1)
                stops = hangs and draws[i].random() < 1 / 500
            if hangs and half_way.is_set() and i >= d - 2:
                over.wait()
            elif stops:
                over.wait(2.0)
            else:
                time.sleep(max(seconds, 0.001))
            return planted.values[which, i]

        return call

    steps = [Step(f"f{i}", (i,)) for i in range(d)]
    lanes = [
        Lane(
            step.name,
            function(i),
            threads=2 * clients,
            hung_after=0.5,
            most_hung=16,
            seconds=planted.scale_ms[i] / 1000,
        )
        for i, step in enumerate(steps)
    ]
    taken, answers, lock = list[float](), list[tuple], threading.Lock()
    answers = []

    def client(seed: int) -> None:
        random = np.random.default_rng([3, seed])
        while True:
            with lock:
                number = next(count, None)
            if number is None:
                return
            if number == requests // 2:
                half_way.set()
            user = int(random.integers(USERS))
            which = random.integers(INPUTS // 2, INPUTS, AT_ONCE)
            started = time.monotonic()
            start = planted.population.of(AT_ONCE)
            plan, _ = order(steps, [lane.seconds for lane in lanes], start, planted.w_mean[user])
            found = evaluate(steps, lanes, plan, which, started + deadline_ms / 1000 - RESERVE, at_once)
            reached = sorted(found)
            known = start.given(
                reached, np.column_stack([found[i] for i in reached]) if reached else np.empty((AT_ONCE, 0))
            )
            mean, variance = scores(planted, user, known.features(0.0))
            ended = time.monotonic()
            with lock:
                taken.append(ended - started)
                answers.append((user, which, reached, mean, variance))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [asdict(lane.counts()) for lane in lanes]
    over.set()
    for lane in lanes:
        lane.close()
    late = np.array(taken) * 1000 - deadline_ms
    told = {
        "requests": len(taken),
        "within_5_ms": float(np.mean(late <= 5)),
        "most_late_ms": round(float(late.max()), 2),
        "late_by_5_ms": np.flatnonzero(late > 5).tolist()[:20],  # which of the requests, by when they ended
        **{f"p{q}_ms": round(float(np.quantile(taken, q / 100)) * 1000, 2) for q in (50, 99, 99.9)},
        "functions_reached": round(float(np.mean([len(reached) for _, _, reached, _, _ in answers])), 2),
        **errors(planted, answers),
    }
    if hangs:
        told["lanes"] = {name: [of[name] for of in counts] for name in ("done", "late", "refused", "hung", "is_out")}
    return told


def scores(planted: Planted, user: int, features) -> tuple[Array, Array]:
    n, w = len(features), planted.w_mean[user]
    second = gaussian.pack((planted.w_covariance + np.outer(w, w))[None])
    return belief(np.tile(w, (n, 1)), np.tile(second, (n, 1)), features)


def errors(planted: Planted, answers: Sequence[tuple]) -> dict:
    """Of the same answers in each way of doing without what was not reached."""
    random = np.random.default_rng(5)
    squares: dict[str, list] = {name: [] for name in ("conditional mean", "population mean", "failing", "everything")}
    inside, failures = [], 0
    start = planted.population.of(AT_ONCE)
    for user, which, reached, mean, variance in answers:
        c = planted.values[which] + random.multivariate_normal(np.zeros(K + 1), planted.population.residual, AT_ONCE)
        w = planted.w[user].copy()
        label = w[0] + c @ np.concatenate([[1.0], w[1:]]) + NOISE**0.5 * random.normal(size=AT_ONCE)
        everything = scores(planted, user, start.given(range(K + 1), planted.values[which]).features(0.0))[0]
        imputed = start.mean.copy()
        imputed[:, reached] = planted.values[which][:, reached]
        imputed = scores(planted, user, start.given(range(K + 1), imputed).features(0.0))[0]
        failed = len(reached) <= K
        failures += failed
        nothing = scores(planted, user, start.features(0.0))[0]
        for name, of in (
            ("conditional mean", mean),
            ("population mean", imputed),
            ("failing", nothing if failed else everything),
            ("everything", everything),
        ):
            squares[name].append((label - of) ** 2)
        inside.append(np.abs(label - mean) <= WITHIN * np.sqrt(NOISE + variance))
    return {
        "rmse": {name: round(float(np.mean(of)) ** 0.5, 4) for name, of in squares.items()},
        "inside_90": round(float(np.mean(inside)), 4),
        "incomplete": round(failures / len(answers), 4),
    }


def sleeps(requests: int, deadline_ms: float, clients: int) -> dict:
    """What this machine does to threads that do nothing but sleep until a deadline: the floor of ``kept``."""
    late = list[float]()

    def client() -> None:
        for _ in range(requests // clients):
            ends = time.monotonic() + deadline_ms / 1000
            time.sleep(deadline_ms / 1000)
            late.append(1000 * (time.monotonic() - ends))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"within_5_ms": float(np.mean(np.array(late) <= 5)), "most_late_ms": round(max(late), 2)}


if __name__ == "__main__":
    main()
