"""What a deployment of any size needs, by arithmetic from the points that scale.py measured.

Core-seconds, bytes and resident memory are fitted as sums of terms that the algorithms have (least squares of relative
errors, no term negative); ``worst_error`` says how far a fit is from any of its points. What is asked for is beyond them by
orders of magnitude: an extrapolation, which takes cores of many machines to be worth those of one.

    python tests/bench/sizing.py [--scale scale.json] [--events 10e9 --users 100e6 --inputs 1e6 --k 10]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scale import FRESH
from scipy.optimize import nnls

from mtl.gaussian import packed_length

MEASURED = Path(__file__).with_name("scale.json")  # on 2 cores of a virtual machine, 24 GB
Sizes = dict[str, float]
# Terms of each figure; p is the length of a packed (d + 1)² matrix, d = k + 1.
FIGURES = {
    "fixed_seconds": ("1", "events", "users", "inputs"),
    "pass_seconds": ("1", "events·p", "users·d³", "inputs·p"),
    "write_seconds": ("1", "events·p", "users·p", "inputs·p"),
    "update_seconds": ("1", "p", "users", "users·p"),
    "store_seconds": ("1", "events", "users", "users·p", "inputs·p"),
    "peak_gb": ("1", "events", "users·p", "inputs·p"),
    "users_bytes": ("users", "users·p"),
    "store_bytes": ("events", "users", "users·p", "inputs·p"),
}
ON_ALL_CORES = ("fixed_seconds", "pass_seconds", "write_seconds", "update_seconds")


def terms(sizes: Sizes) -> dict[str, float]:
    events, users, inputs, d = sizes["events"], sizes["users"], sizes["inputs"], sizes["k"] + 1
    p = packed_length(int(d) + 1)
    of = {"1": 1.0, "p": p, "events": events, "users": users, "inputs": inputs}
    return of | {"events·p": events * p, "users·p": users * p, "inputs·p": inputs * p, "users·d³": users * d**3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=Path, default=MEASURED, help="what scale.py printed (default: %(default)s)")
    parser.add_argument("--events", type=float, default=10e9, help="(default: %(default)g)")
    parser.add_argument("--users", type=float, default=100e6, help="(default: %(default)g)")
    parser.add_argument("--inputs", type=float, default=1e6, help="(default: %(default)g)")
    parser.add_argument("--k", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--passes", type=int, default=10, help="over all events (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=4, help="that a retraining may take (default: %(default)s)")
    parser.add_argument("--per-second", type=float, default=5000, help="new events (default: %(default)s)")
    arguments = parser.parse_args()
    measured = json.loads(arguments.scale.read_text())["points"]
    points = [{**point, "users": point["users_found"]} for point in measured if "failed" not in point]
    asked = {name: float(getattr(arguments, name)) for name in ("events", "users", "inputs", "k")}
    fits = {name: fit(name, points) for name in FIGURES}
    print(json.dumps({"asked": asked, "fits": fits, "needs": needs(fits, asked, arguments)}))


def fit(name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Coefficients by term, of core-seconds where all cores work, and the largest ratio of fit and measurement."""
    measured = np.array([point[name] * (point["cores"] if name in ON_ALL_CORES else 1) for point in points])
    design = np.array([[terms(point)[term] for term in FIGURES[name]] for point in points])
    scale = design.max(0)
    coefficients, _ = nnls(design / scale / measured[:, None], np.ones(len(points)))
    found = design @ (coefficients / scale)
    ratio = np.maximum(found / measured, measured / found)
    return {
        "terms": {t: c for t, c in zip(FIGURES[name], (coefficients / scale).tolist(), strict=True) if c},
        "worst_error": round(float(ratio.max()), 2),
    }


def needs(fits: dict[str, dict[str, Any]], asked: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    of = terms(asked)
    figure = {name: sum(c * of[term] for term, c in fit["terms"].items()) for name, fit in fits.items()}
    retrain = figure["fixed_seconds"] + arguments.passes * figure["pass_seconds"] + figure["write_seconds"]
    cores = retrain / 3600 / arguments.hours
    batch = figure["update_seconds"]
    return {
        "retrain_core_hours": retrain / 3600,
        "cores_for_a_retraining": cores,
        "memory_gb_of_all_executors": figure["peak_gb"],
        "gb_of_sums_a_partition_sends_the_driver": asked["inputs"] * packed_length(int(asked["k"]) + 2) * 8 / 1e9,
        "users_table_gb": figure["users_bytes"] / 1e9,
        "core_seconds_of_a_batch_of_200k": batch,
        "cores_for_the_stream": arguments.per_second / FRESH * batch,
        "store_gb_of_a_server": figure["store_bytes"] / 1e9,
        "hours_of_a_servers_first_copy": figure["store_seconds"] / 3600,
    }


if __name__ == "__main__":
    main()
