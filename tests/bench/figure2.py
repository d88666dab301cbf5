"""Figure 2 of the paper: latency by what is cached, for cheap features and for dear ones.

A request names a user and ten inputs, both Zipf-distributed; an answer is ten predictions with their standard deviations. One
request in ``--observe-every`` is followed by an observation, which changes the user's state. Strategies: none (features are
evaluated at every request), features, predictions (a miss evaluates features), and both.

- collaborative filtering: the features of an input are a row of a table, looked up by id
- jokes: its text through the trigram encoding and the oracle, 100 Jester jokes
- documents: the same for synthetic documents of 2,000 words

The oracle is a ridge from the encoding to the singular vectors of Jester's ratings. All run in one process, after as many
requests of warm-up as are measured, in which the caches fill.

    python tests/bench/figure2.py --data FOLDER [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from experiment import arguments, read

from mtl import figures, gaussian
from mtl.config import load_settings
from mtl.encode import Encoder
from mtl.features import Features
from mtl.gaussian import Array
from mtl.losses import LOSSES
from mtl.prior import Prior
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.serving import scorer
from mtl.serving.cache import PredictionCache, RowCache
from mtl.serving.classes import Exact

K, USERS, AT_ONCE = 10, 5_000, 10
NOISE, CACHE_BYTES = 15.0, 64_000_000
STRATEGIES = ("none", "features", "predictions", "both")


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--out", default="figures", help="folder of the plot and the figures (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=4_000, help="measured, and as many before them")
    parser.add_argument(
        "--dear-requests", type=int, default=400, help="the same where features are evaluated each time"
    )
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--words", type=int, default=2_000)
    parser.add_argument("--observe-every", type=int, default=10)
    given = parser.parse_args()
    told = {}
    for name, workload in workloads(given).items():
        told[name] = {strategy: measure(workload, strategy, given) for strategy in STRATEGIES}
        both, features, none = (told[name][strategy]["p50_us"] for strategy in ("both", "features", "none"))
        told[name]["feature_cache_gains"] = round(none / features, 2)
        told[name]["prediction_cache_gains_on_top"] = round(features / both, 2)
    out = Path(given.out)
    medians = {name: {s: of[s]["p50_us"] for s in STRATEGIES} for name, of in told.items()}
    figures.plot_bars(
        out / "figure2.png", medians, "Latency of ten predictions by what is cached", "median latency (µs)"
    )
    result = {"experiment": "figure2", "inputs_per_request": AT_ONCE, "k": K, **told}
    (out / "figure2.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


@dataclass(frozen=True)
class Workload:
    """Inputs by number, what their classes are called, and how features come about."""

    n: int
    keys: Sequence[bytes]
    evaluate: Callable[[np.ndarray], Array]  # numbers → rows
    is_dear: bool


def workloads(given: argparse.Namespace) -> dict[str, Workload]:
    events, jokes = read(given.data, "jester", "input_id, text")
    factors, oracle, encoder = fitted(events, jokes)

    def by_text(texts: np.ndarray) -> Workload:
        def evaluate(which: np.ndarray) -> Array:
            z = encoder(pd.DataFrame({"text": texts[which]}))
            return scorer.feature_rows(Features.of(oracle.mean(z), covariances(len(which)), 0.0))

        return Workload(len(texts), numbered(len(texts)), evaluate, True)

    table = scorer.feature_rows(Features.of(factors, covariances(len(factors)), 0.0))
    table = np.tile(table, (100, 1))  # 10,000 inputs
    return {
        "collaborative filtering": Workload(len(table), numbered(len(table)), lambda which: table[which], False),
        "jokes": by_text(jokes["text"].to_numpy()),
        "documents": by_text(documents(given.documents, given.words, jokes["text"])),
    }


def fitted(events: pd.DataFrame, jokes: pd.DataFrame) -> tuple[Array, Prior, Encoder]:
    """(o, f_1 … f_k) of the jokes by the singular vectors of their ratings, and the ridge to them from their text."""
    ratings = events[events[USER_ID].isin(events[USER_ID].unique()[:3000])].pivot(
        index=USER_ID, columns=INPUT_ID, values=LABEL
    )
    ratings = ratings.reindex(columns=jokes[INPUT_ID])
    mean = ratings.mean()
    _, s, v = np.linalg.svd((ratings - mean).fillna(0.0).to_numpy(), full_matrices=False)
    factors = np.column_stack([mean.to_numpy(), v[:K].T * s[:K] / len(ratings) ** 0.5])
    encoder = Encoder.fit(jokes[["text"]], load_settings().encode)
    z = encoder(jokes[["text"]])
    coefficients = np.linalg.solve(z.T @ z + 5 * np.eye(z.shape[1]), z.T @ factors)
    return factors, Prior(z.T @ z, np.eye(K + 1), coefficients), encoder


def covariances(n: int) -> Array:
    return np.tile(gaussian.pack(0.1 * np.eye(K + 1)), (n, 1))


def documents(n: int, words: int, texts: pd.Series) -> np.ndarray:
    """Documents of words drawn by their frequency in the jokes."""
    vocabulary, counts = np.unique(" ".join(texts).split(), return_counts=True)
    random = np.random.default_rng(0)
    return np.array([" ".join(random.choice(vocabulary, words, p=counts / counts.sum())) for _ in range(n)], object)


def numbered(n: int) -> list[bytes]:
    return Exact()(np.arange(n, dtype=float)[:, None])


def zipf(n: int, size: int | tuple[int, int], random: np.random.Generator) -> np.ndarray:
    chances = 1 / np.arange(1, n + 1)
    return random.choice(n, size, p=chances / chances.sum())


def measure(workload: Workload, strategy: str, given: argparse.Namespace) -> dict[str, float]:
    random = np.random.default_rng(1)
    uses_features, uses_predictions = strategy in ("features", "both"), strategy in ("predictions", "both")
    is_slow = workload.is_dear and not uses_features
    requests = given.dear_requests if is_slow else given.requests
    users, inputs = zipf(USERS, 2 * requests, random), zipf(workload.n, (2 * requests, AT_ONCE), random)
    means = random.normal(size=(USERS, K + 1))
    quadratics = scorer.quadratics(means, covariances(USERS))
    weights = [scorer.Weights(mean, second, 20) for mean, second in zip(means, quadratics, strict=True)]
    states = [0] * USERS
    features = RowCache(scorer.width(K + 1), CACHE_BYTES) if uses_features else None
    predictions = PredictionCache(CACHE_BYTES) if uses_predictions else None
    loss, taken = LOSSES["squared"], np.empty(2 * requests)
    for i, (user, wanted) in enumerate(zip(users.tolist(), inputs, strict=True)):
        started = time.perf_counter_ns()
        keys = [workload.keys[j] for j in wanted.tolist()]
        mean, variance = beliefs(workload, features, predictions, str(user), states[user], weights[user], keys, wanted)
        loss.response(mean, variance), loss.deviation(mean, variance, NOISE)
        taken[i] = time.perf_counter_ns() - started
        if i % given.observe_every == 0:
            states[user] += 1
    late = np.sort(taken[requests:]) / 1000
    told = {f"p{q}_us": round(float(np.quantile(late, q / 100)), 1) for q in (50, 95, 99)}
    for name, cache in (("feature", features), ("prediction", predictions)):
        if cache is not None:
            counts = cache.counts()
            told[f"{name}_hit_rate"] = round(counts.hits / (counts.hits + counts.misses), 3)
    return {**told, "mean_us": round(float(late.mean()), 1), "requests": requests}


def beliefs(
    workload: Workload,
    features: RowCache | None,
    predictions: PredictionCache | None,
    user: str,
    state: int,
    weights: scorer.Weights,
    keys: list[bytes],
    wanted: np.ndarray,
) -> tuple[Array, Array]:
    """Mean and variance of h, from what is cached where it is, and cached where it was not."""
    if predictions is None:
        return scorer.belief(rows_of(workload, features, keys, wanted), weights)
    found, held = predictions.get(user, state, keys)
    if held.all():
        return found[:, 0], found[:, 1]
    missing = np.flatnonzero(~held)
    missed = [keys[i] for i in missing]
    mean, variance = scorer.belief(rows_of(workload, features, missed, wanted[missing]), weights)
    predictions.put(user, state, missed, mean, variance)
    both = np.empty((len(keys), 2))
    both[held], both[missing] = found, np.column_stack([mean, variance])
    return both[:, 0], both[:, 1]


def rows_of(workload: Workload, features: RowCache | None, keys: list[bytes], wanted: np.ndarray) -> Array:
    if features is None:
        return workload.evaluate(wanted)
    found, held = features.get(keys)
    if held.all():
        return found
    missing = np.flatnonzero(~held)
    fresh = workload.evaluate(wanted[missing])
    features.put([keys[i] for i in missing], fresh)
    rows = np.empty((len(keys), fresh.shape[1]))
    rows[held], rows[missing] = found, fresh
    return rows


if __name__ == "__main__":
    main()
