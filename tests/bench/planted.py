"""An oracle of trees and a linear one on planted basis functions that are not linear in the attributes of inputs.

    label = f_0(x) + b_u + Σ_i w_ui f_i(x) + noise,     f_i of interactions, thresholds and a sine of four attributes

Half of the inputs are held out with all their events. Per oracle: RMSE on events of inputs with events, on those of inputs
held out, where the oracle is all there is, and the angles between the space of the learnt f_1 … f_k at the inputs held out
and that of the planted ones (degrees; 0 is found, 90 is missed), for a basis is found up to a rotation only.

    python tests/bench/planted.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import pandas as pd
from experiment import Fitted, fit, rmse, session, summary
from pyspark.sql import SparkSession
from scipy.linalg import subspace_angles

from mtl.gaussian import Array
from mtl.schema import INPUT_ID, LABEL, USER_ID

USERS, INPUTS, EVENTS, K, NOISE = 600, 1200, 60_000, 3, 0.5
ORACLES = {
    "linear": ("oracle.kind=linear",),
    "trees": (
        "oracle.kind=sklearn",
        "oracle.factory=sklearn.ensemble:HistGradientBoostingRegressor",
        "oracle.params={max_iter = 60, min_samples_leaf = 10, random_state = 0}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="planted problems (default: %(default)s)")
    arguments = parser.parse_args()
    spark = session("planted")
    runs = []
    for seed in range(arguments.repeats):
        runs.append(measure(spark, seed))
        print(f"problem {seed}: {runs[-1]}", file=sys.stderr)
    names = runs[0]["linear"].keys()
    told = {oracle: {name: summary([run[oracle][name] for run in runs]) for name in names} for oracle in ORACLES}
    gain = [run["linear"]["new_inputs"] - run["trees"]["new_inputs"] for run in runs]
    print(json.dumps({"experiment": "planted", "k": K, "noise": NOISE, **told, "gain_on_new_inputs": summary(gain)}))


def basis(z: Array) -> Array:
    """The planted f_0 … f_3 of attributes (n, 4), each of variance about 1."""
    a, b, c, d = z.T
    return np.column_stack([np.abs(a) - 0.8, 1.4 * np.sin(2 * a), a * b, np.where(c * d > 0, 1.0, -1.0)])


def measure(spark: SparkSession, seed: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    z = random.normal(size=(INPUTS, 4))
    f, w = basis(z), random.normal(size=(USERS, K)) * 0.7
    user, item = random.integers(USERS, size=EVENTS), random.integers(INPUTS, size=EVENTS)
    h = f[item, 0] + random.normal(scale=0.5, size=USERS)[user] + np.einsum("nk,nk->n", w[user], f[item, 1:])
    label = 3 + h + NOISE * random.normal(size=EVENTS)
    events = pd.DataFrame({USER_ID: user.astype(str), INPUT_ID: item.astype(str), LABEL: label})
    inputs = pd.DataFrame(z, columns=["a", "b", "c", "d"]).assign(**{INPUT_ID: np.arange(INPUTS).astype(str)})
    is_new = item >= INPUTS // 2
    is_test = ~is_new & (random.uniform(size=EVENTS) < 0.2)
    new, known = inputs[INPUTS // 2 :], inputs[: INPUTS // 2]
    told = {}
    for name, oracle in ORACLES.items():
        # Who acted on what would tell of inputs what the attributes do not.
        settings = (*oracle, f"model.k={K}", "encode.spectral=0", "encode.activity=false")
        fitted = fit(spark, events[~is_new & ~is_test], known, settings)
        found = angles(fitted, new.drop(columns=INPUT_ID), f[INPUTS // 2 :, 1:])
        told[name] = {
            "known_inputs": error(fitted, events[is_test], inputs),
            "new_inputs": error(fitted, events[is_new], inputs),
            "largest_angle": found[0],
            "smallest_angle": found[-1],
        }
    return told


def error(fitted: Fitted, events: pd.DataFrame, inputs: pd.DataFrame) -> float:
    return round(rmse(events[LABEL], fitted.predict(events, inputs).prediction.to_numpy(), fitted.model), 4)


def angles(fitted: Fitted, attributes: pd.DataFrame, planted: Array) -> list[float]:
    """Principal angles between the learnt and the planted functions' values there, means taken out (degrees)."""
    learnt = fitted.model.input_basis(attributes)[:, 1:]
    spaces = (values - values.mean(0) for values in (learnt, planted))
    return np.degrees(subspace_angles(*spaces)).round(2).tolist()


if __name__ == "__main__":
    main()
