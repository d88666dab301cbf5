"""What coarser classes cost in accuracy, and gain in hits and time.

School: exam scores by 27 attributes, 3,970 distinct pupils among 15,362, a Multilevel model trained on three quarters of every
school's. The last quarter is asked for one by one, in random order, through a feature cache that starts empty: a class
function maps a pupil's attributes to a class, a hit answers with the features of the class's first pupil, and a miss evaluates
the model's own functions. By kind of class function and coarseness: explained variance of the scores, hit rate, latency
(mean, and 50th and 99th percentile), and the bound on the error against the error itself.

Bounds are from extents measured on the pupils of training. For a pupil among them the bound always holds, whoever the class's
first was (``broken`` must be 0); the others fail no more often than ``stated_chance``.

The knee of a kind is the coarseness that lies furthest above the chord of explained variance against the logarithm of the miss
rate, to which time is proportional, from exact classes to the coarsest that still explain anything. ``nearly_exact`` is the
coarsest that loses no more than 1% of the explained variance.

    python tests/bench/coarsening.py --data FOLDER [--out FOLDER]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from experiment import Fitted, arguments, fit, read, session
from school import MODEL, TEST_FRACTION, tested

from mtl import figures
from mtl.gaussian import Array
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.score import states_of
from mtl.serving import scorer
from mtl.serving.cache import RowCache
from mtl.serving.classes import ClassFunction, Clustered, Exact, Extents, Hashed, Rounded

CACHE_BYTES = 256_000_000


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--out", default="figures", help="folder of the plot (default: %(default)s)")
    given = parser.parse_args()
    events, inputs = read(given.data, "school", "input_id, x0 … x26")
    test = tested(events[USER_ID], TEST_FRACTION, given.seed)
    fitted = fit(session("coarsening"), events[~test], inputs, [*MODEL, *given.set])
    by_id = inputs.set_index(INPUT_ID)
    trained, asked = by_id.loc[events[INPUT_ID][~test]], by_id.loc[events[INPUT_ID][test]]
    order = np.random.default_rng(given.seed).permutation(len(asked))
    rows, asked = events[test].iloc[order].reset_index(drop=True), asked.iloc[order].reset_index(drop=True)
    centre, scale = trained.mean().to_numpy(), trained.std().to_numpy() + 1e-12
    z_trained, z_asked = ((frame.to_numpy(float) - centre) / scale for frame in (trained, asked))
    users = users_of(fitted, rows[USER_ID])
    told: dict[str, dict] = {}
    for kind, functions in families(z_trained).items():
        told[kind] = {}
        for knob, function in functions.items():
            told[kind][knob] = measure(
                fitted, function, users, rows[LABEL].to_numpy(), asked, z_asked, trained, z_trained
            )
            print(f"{kind} {knob}: {told[kind][knob]}", file=sys.stderr)
    exact = told.pop("exact")["0"]
    series = {kind: {"exact": exact, **of} for kind, of in told.items()}
    knees = {kind: knee(of) for kind, of in series.items()}
    curves = {
        kind: figures.Curve(*zip(*sorted((1 - r["hit_rate"], r["explained"]) for r in of.values()), strict=True))
        for kind, of in series.items()
    }
    best = max(knees, key=lambda kind: knees[kind]["above_chord"])
    at = knees[best]
    figures.plot_curves(
        Path(given.out) / "coarsening.png",
        curves,
        "Accuracy by how many inputs are evaluated, as classes grow",
        "miss rate of the feature cache",
        "explained variance",
        x_log=True,
        mark=(1 - at["hit_rate"], at["explained"], f"knee: {best} {at['coarseness']}, {at['mean_us']:.0f} µs"),
    )
    result = {
        "experiment": "coarsening",
        "asked": len(rows),
        "knees": knees,
        "nearly_exact": {kind: nearly_exact(of, exact) for kind, of in series.items()},
        "exact": exact,
        **told,
    }
    print(json.dumps(result))


def families(z: Array) -> dict[str, dict[str, ClassFunction]]:
    p = z.shape[1]
    return {
        "exact": {"0": Exact()},
        "rounded": {str(step): Rounded(step) for step in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)},
        "hashed": {str(width): Hashed.draw(p, width) for width in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)},
        "clustered": {str(m): Clustered.fit(z, m) for m in (2000, 800, 300, 100, 30, 10)},
    }


def users_of(fitted: Fitted, ids: pd.Series) -> list[scorer.Weights]:
    """The user of every row, ready to score with."""
    model, states = fitted.model, fitted.states
    a, b, prior_mean = states_of(
        states.append_column(INPUT_ID, [[None] * len(states)]), np.arange(len(states)), len(states), model
    )
    posterior = model.user_posteriors(a, b, prior_mean)
    quadratics = scorer.quadratics(posterior.mean, posterior.covariance)
    weights = [scorer.Weights(mean, of, 0) for mean, of in zip(posterior.mean, quadratics, strict=True)]
    place = {user: i for i, user in enumerate(states[USER_ID].to_pylist())}
    return [weights[place[user]] for user in ids]


def measure(
    fitted: Fitted,
    function: ClassFunction,
    users: list[scorer.Weights],
    label: Array,
    asked: pd.DataFrame,
    z_asked: Array,
    trained: pd.DataFrame,
    z_trained: Array,
) -> dict:
    model = fitted.model
    d, n = model.d, len(asked)
    scale = np.sqrt(np.mean([user.mean**2 for user in users], axis=0)) + 1e-9
    scale[0] = 1.0
    extents = Extents.measure(function(z_trained), model.features_of_new(trained), scale)
    cache = RowCache(scorer.width(d), CACHE_BYTES)
    taken, prediction, hits, keys = np.empty(n), np.empty(n), np.zeros(n, bool), []
    for i, user in enumerate(users):
        started = time.perf_counter_ns()
        key = function(z_asked[i : i + 1])
        rows, held = cache.get(key)
        if not held[0]:
            rows = scorer.feature_rows(model.features_of_new(asked.iloc[i : i + 1]))
            cache.put(key, rows)
        prediction[i] = scorer.belief(rows, user)[0][0]
        taken[i] = (time.perf_counter_ns() - started) / 1000
        hits[i] = held[0]
        keys += key
    exact = scorer.feature_rows(model.features_of_new(asked))
    truth = np.array([scorer.belief(exact[i : i + 1], user)[0][0] for i, user in enumerate(users)])
    error = np.abs(prediction - truth)
    bound = np.array([extents.bound([keys[i]], user.mean, prediction[i : i + 1])[0] for i, user in enumerate(users)])
    known = {row.tobytes() for row in z_trained}
    measured = np.array([row.tobytes() in known for row in z_asked])
    coarse = hits & np.isfinite(bound)
    broken = error > bound + 1e-9 * (1 + np.abs(truth))
    inside = np.clip(prediction, model.label_min, model.label_max)
    others = coarse & ~measured
    return {
        "classes": len(set(keys)),
        "hit_rate": round(float(hits.mean()), 4),
        "explained": round(1 - float(np.sum((label - inside) ** 2) / np.sum((label - label.mean()) ** 2)), 4),
        "mean_us": round(float(taken.mean()), 1),
        "p50_us": round(float(np.quantile(taken, 0.5)), 1),
        "p99_us": round(float(np.quantile(taken, 0.99)), 1),
        "error": round(float(error[coarse].mean()), 4) if coarse.any() else 0.0,
        "bound": round(float(bound[coarse].mean()), 4) if coarse.any() else 0.0,
        "bounded": round(float(coarse[hits].mean()), 4),
        "broken": int(broken[coarse & measured].sum()),
        "others_broken": round(float(broken[others].mean()), 4) if others.any() else 0.0,
        "stated_chance": round(float(extents.chance([keys[i] for i in np.flatnonzero(others)]).mean()), 4)
        if others.any()
        else 0.0,
    }


def knee(of: dict[str, dict]) -> dict:
    """Where explained variance is furthest above the chord, both axes from 0 to 1."""
    useful = {name: point for name, point in of.items() if point["explained"] > 0}
    names = sorted(useful, key=lambda name: useful[name]["hit_rate"])
    x = np.array([-np.log(1 - useful[name]["hit_rate"]) for name in names])
    y = np.array([useful[name]["explained"] for name in names])
    x, y = ((values - values.min()) / (np.ptp(values) or 1.0) for values in (x, y))
    above = y - (y[0] + (y[-1] - y[0]) * x)
    best = int(above.argmax())
    return {"coarseness": names[best], "above_chord": round(float(above[best]), 3), **useful[names[best]]}


def nearly_exact(of: dict[str, dict], exact: dict) -> dict:
    near = {name: point for name, point in of.items() if point["explained"] >= 0.99 * exact["explained"]}
    name = max(near, key=lambda name: near[name]["hit_rate"])
    return {"coarseness": name, **near[name]}


if __name__ == "__main__":
    main()
