"""How often off-policy intervals hold the truth, where it is known; and what they say of the Open Bandit data.

``simulated``: contextual decisions of users with known weights. The log is written by a policy of mtl.serving.bandit with the
propensities that it told; the policy in question is another one. Its truth is the mean of its own exact rewards at the same
contexts and all others. By condition and estimator the share of ``--runs`` logs whose interval of 95% holds the truth, normal
and bootstrapped (percentile, and studentized), with the mean error over its standard deviation.

``open_bandit``: with --data, the two logs of the Open Bandit Dataset: what each says of the uniform policy that wrote the
other, and what the uniform log says of the policy that wrote the second.

    python tests/bench/offpolicy.py [--data FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from experiment import arguments

from mtl.features import Features
from mtl.gaussian import Array, outer
from mtl.schema import INPUT_ID, PROBABILITY, PROPENSITY, REWARD
from mtl.serving.bandit import Candidates, EpsilonGreedy, LinUCB, Policy, Thompson
from mtl.serving.decisions import estimate
from mtl.serving.offpolicy import Estimate, Log, doubly_robust, ips, mean_rewards, snips, support

D, CONTEXTS, INPUTS = 5, 200, 10
CONDITIONS: dict[str, tuple[Policy, Policy, float, int]] = {
    # name: (the log's, the one in question, standard deviation of the weights, decisions)
    "Thompson for greedy": (Thompson(200, 0.1), EpsilonGreedy(0.1), 0.5, 1000),
    "Thompson for LinUCB": (Thompson(200, 0.2), LinUCB(2.0, 0.1), 0.5, 1000),
    "ε 0.5 for uniform": (EpsilonGreedy(0.5), EpsilonGreedy(1.0), 0.5, 1000),
    "ε 0.05 for uniform": (EpsilonGreedy(0.05), EpsilonGreedy(1.0), 0.5, 1000),
    "Thompson without ε for greedy": (Thompson(200), EpsilonGreedy(0.1), 0.5, 1000),
}
COLUMNS = {INPUT_ID: "item_id", PROPENSITY: "propensity_score", REWARD: "click"}
_RESAMPLES = 300


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--runs", type=int, default=400, help="logs a condition")
    given = parser.parse_args()
    told = {}
    for name, condition in CONDITIONS.items():
        told[name] = coverage(*condition, given.runs)
        print(f"{name}: {told[name]}", file=sys.stderr)
    result = {"experiment": "offpolicy", "runs": given.runs, "stated": 0.95, "simulated": told}
    if given.data:
        result["open_bandit"] = open_bandit(Path(given.data) / "open-bandit")
    print(json.dumps(result))


def coverage(logging: Policy, target: Policy, scale: float, n: int, runs: int) -> dict:
    random = np.random.default_rng(0)
    phi = random.normal(size=(INPUTS, D))
    features = Features(np.zeros(INPUTS), phi, outer(phi), np.zeros((INPUTS, D)), np.zeros(INPUTS))
    posterior = 0.3 * np.eye(D)
    users = [Candidates(scale * random.normal(size=D), posterior, features) for _ in range(CONTEXTS)]
    # Clicks by weights of which the posteriors are the beliefs.
    mean = np.array([1 / (1 + np.exp(1.5 - phi @ random.multivariate_normal(u.w, posterior))) for u in users])
    q = np.array([target.distribution(user, random) for user in users])
    truth = float((q * mean).sum(1).mean())
    # A log's chances are drawn with it, as Thompson's are: a few tables of them, each exact for its own decisions.
    tables = np.array([[logging.distribution(user, random) for user in users] for _ in range(20)])
    hits: dict[str, dict[str, int]] = {}
    errors: dict[str, list[float]] = {}
    effective = []
    for _ in range(runs):
        context, table = random.integers(CONTEXTS, size=n), random.integers(len(tables), size=n)
        p = tables[table, context]
        action = np.minimum((p.cumsum(1) < random.random(n)[:, None]).sum(1), INPUTS - 1)
        row = np.arange(n)
        reward = (random.random(n) < mean[context, action]).astype(float)
        log = Log(reward, p[row, action], q[context, action])
        effective.append(support(log).effective)
        f, v = mean_rewards(action, reward, q[context])
        terms = {"ips": log.weight * reward, "dr": v + log.weight * (reward - f)}
        for name, found in (("ips", ips(log)), ("snips", snips(log)), ("dr", doubly_robust(log, f, v))):
            intervals = {"normal": (found.low, found.high)}
            intervals |= bootstrapped(found, terms.get(name), log, random)
            for kind, (low, high) in intervals.items():
                of = hits.setdefault(name, {})
                of[kind] = of.get(kind, 0) + int(low <= truth <= high)
            errors.setdefault(name, []).append(found.value - truth)
    return {
        "truth": round(truth, 4),
        "effective": round(float(np.mean(effective))),
        **{
            name: {
                **{kind: count / runs for kind, count in of.items()},
                "bias": round(float(np.mean(errors[name])), 5),
                "bias_standard_error": round(float(np.std(errors[name])) / runs**0.5, 5),
            }
            for name, of in hits.items()
        },
    }


def bootstrapped(found: Estimate, terms: Array | None, log: Log, random: np.random.Generator) -> dict:
    """Percentile and studentized intervals by resampling decisions; ``terms`` are what the estimate averages, but for SNIPS."""
    n = len(log.reward)
    places = random.integers(n, size=(_RESAMPLES, n))
    if terms is not None:
        drawn = terms[places]
        value, error = drawn.mean(1), drawn.std(1, ddof=1) / n**0.5
    else:
        weight, reward = log.weight[places], log.reward[places]
        value = (weight * reward).sum(1) / weight.sum(1)
        error = (weight * (reward - value[:, None])).std(1, ddof=1) / weight.mean(1) / n**0.5
    low, high = np.quantile(value, [0.025, 0.975])
    least, most = np.quantile((value - found.value) / np.maximum(error, 1e-12), [0.025, 0.975])
    return {
        "percentile": (low, high),
        "studentized": (found.value - most * found.standard_error, found.value - least * found.standard_error),
    }


def open_bandit(folder: Path) -> dict:
    uniform, thompson = (str(folder / f"{name}.parquet") for name in ("random", "bts"))
    rows = pd.read_parquet(thompson, columns=["item_id", "position", "propensity_score"])
    # The policy of the second log as a table: its mean propensity by item and position, what it never showed left at 0.
    table = rows.groupby(["item_id", "position"], as_index=False)["propensity_score"].mean()
    total = table.groupby("position")["propensity_score"].transform("sum")
    table[PROBABILITY] = table.pop("propensity_score") / total
    with tempfile.TemporaryDirectory() as place:
        policy = Path(place) / "policy.parquet"
        table.to_parquet(policy)
        runs = {
            "uniform_by_its_own_log": estimate(uniform, "uniform", COLUMNS),
            "uniform_by_the_other_log": estimate(thompson, "uniform", COLUMNS),
            "thompson_by_its_own_log": estimate(thompson, f"column:{PROPENSITY}", COLUMNS),
            "thompson_by_the_uniform_log": estimate(uniform, str(policy), COLUMNS),
        }
    return runs


if __name__ == "__main__":
    main()
