"""Ranking by implicit feedback on MovieLens-100K: ratings of 4 stars and more as choices, a random fifth of them held out.

For every weight of the zeros, and for popularity: the mean over users of the AUC of the choices held out among all inputs not
chosen in training, of recall in the first 20 and of NDCG in the first 100. No attributes; in this process, without Spark.

    python tests/bench/zeros.py [--weights 0.1 0.3 1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from mtl import alternation
from mtl.blocks import build
from mtl.datasets import fetch_movielens, movielens
from mtl.engine import LocalEngine
from mtl.forms import Form
from mtl.gaussian import Array
from mtl.losses import LOSSES
from mtl.prior import Prior
from mtl.train import START_VARIANCE, Schedule, alternate
from mtl.userstep import Specification
from mtl.zeros import WithZeros

STARS, SEED = 4, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    split = movielens(fetch_movielens(arguments.data), 1)
    events = pa.concat_tables([split.train, split.stream, split.test]).to_pandas()
    events = events[events.label >= STARS].sort_values(["user_id", "input_id"])
    chosen = np.zeros((events.user_id.nunique(), events.input_id.nunique()), bool)
    chosen[tuple(events[name].astype("category").cat.codes.to_numpy(int) for name in ("user_id", "input_id"))] = True
    held_out = chosen & (np.random.default_rng(SEED).uniform(size=chosen.shape) < 0.2)
    trained = chosen & ~held_out
    results = {"popularity": measures(np.tile(trained.sum(0), (len(chosen), 1)), trained, held_out)}
    for weight in arguments.weights:
        scores = scores_of(trained, weight, arguments.k, arguments.iterations)
        results[f"zeros of weight {weight:g}"] = measures(scores, trained, held_out)
    print(json.dumps({"k": arguments.k, "choices": int(chosen.sum()), "held_out": int(held_out.sum()), **results}))


def scores_of(trained: np.ndarray, weight: float, k: int, iterations: int) -> Array:
    """E[h] of every pair, (users, inputs), from choices and the zeros of all pairs."""
    user, place = np.nonzero(trained)
    ones, (n_users, n_inputs) = np.ones(len(user)), trained.shape
    ids = pa.array([str(i) for i in range(n_users)])
    block = build(ids.take(pa.array(user)), place, ones, ones, ids, np.ones((n_users, 1)))
    n = len(user) + trained.size
    total = len(user) + weight * trained.size
    mu = len(user) / total
    loss = LOSSES["squared"]
    specification = Specification(np.ones((n_inputs, 1)), Form(k), loss, mu, float(len(user)), SEED, zero_weight=weight)
    engine = LocalEngine([block], specification)
    priors = (Prior.start(np.array([[float(side)]]), k + 1, START_VARIANCE) for side in trained.shape)
    fit = alternate(engine, *priors, loss, n, (len(user) - mu**2 * total) / n, Schedule(iterations))
    features = engine.features
    sums = alternation.user_sums(block.weight_matrix, block.label_matrix, features.take(block.inputs))
    users = WithZeros.of(fit.users, features, weight).posteriors(*sums, block.attributes, fit.noise)
    row = np.argsort(block.users.to_numpy(zero_copy_only=False).astype(int))
    return features.offset + users.mean[row] @ features.phi.T


def measures(scores: Array, trained: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    found = []
    for u in np.flatnonzero(held_out.any(1)):
        candidates = ~trained[u]
        order = np.argsort(-scores[u][candidates], kind="stable")
        places = np.flatnonzero(held_out[u][candidates][order])
        n, p = int(candidates.sum()), len(places)
        auc = 1 - (places.sum() - p * (p - 1) / 2) / (p * (n - p))
        gain, best = (1 / np.log2(2 + ranks) for ranks in (places[places < 100], np.arange(min(p, 100))))
        found.append([auc, np.sum(places < 20) / min(p, 20), gain.sum() / best.sum()])
    return dict(zip(("auc", "recall20", "ndcg100"), np.round(np.mean(found, axis=0), 4).tolist(), strict=True))


if __name__ == "__main__":
    main()
