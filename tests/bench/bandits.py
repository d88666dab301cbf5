"""What exploration costs: cumulative regret among inputs, and how soon the better of two versions is found.

``inputs``: users with known weights drawn from the prior, each with a catalogue of its own of which one input is shown a
round. All policies have the same posterior, updated after every round, and see the same rewards' noise; regret is what
the best input would have earned more, in expectation. ε-greedy is run with several ε, and the best of them, chosen with
hindsight, is what the others are compared with: differences by seed, with the 95% interval of their mean.

``versions``: two models choose the input, one with all basis functions and one with half of them; a reward is a click. The share
of the last quarter of requests that the better one got.

    python tests/bench/bandits.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from experiment import summary
from scipy.special import expit
from scipy.stats import t as student

from mtl import figures
from mtl.features import Features
from mtl.gaussian import Array, outer
from mtl.serving.bandit import (
    Candidates,
    EpsilonGreedy,
    Exp3,
    FixedSplit,
    LinUCB,
    Policy,
    Rewards,
    Thompson,
    ThompsonVersions,
    VersionPolicy,
    draw,
)

D, NOISE = 6, 1.0
EPSILONS = (0.0, 0.01, 0.03, 0.1, 0.3)
POLICIES: dict[str, Policy] = {
    **{f"ε-greedy {epsilon}": EpsilonGreedy(epsilon) for epsilon in EPSILONS},
    "LinUCB": LinUCB(1.0),
    "Thompson": Thompson(1),  # one draw is enough where no propensity is wanted
}
VERSIONS: dict[str, VersionPolicy] = {
    "Thompson": ThompsonVersions(),
    "Exp3": Exp3(0.05),
    "fixed split": FixedSplit((1, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="figures", help="folder of the plot (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=200, help="of each user")
    parser.add_argument("--inputs", type=int, default=30, help="in a user's catalogue")
    parser.add_argument("--requests", type=int, default=4_000, help="of the version bandit")
    given = parser.parse_args()
    regret: dict[str, Array] = {}
    for name, policy in POLICIES.items():
        regret[name] = np.array([of_inputs(policy, seed, given) for seed in range(given.seeds)])
        print(f"{name}: {regret[name][:, -1].mean():.1f}", file=sys.stderr)
    greedy = min((name for name in regret if name.startswith("ε")), key=lambda name: regret[name][:, -1].mean())
    shown = ("Thompson", "LinUCB", greedy, "ε-greedy 0.1")
    curves = {name: curve(regret[name]) for name in dict.fromkeys(shown)}
    figures.plot_curves(
        Path(given.out) / "bandits.png",
        curves,
        f"Cumulative regret: mean of {given.seeds} seeds, 95% intervals",
        "round",
        "regret per user (label units)",
    )
    print(
        json.dumps(
            {
                "experiment": "bandits",
                "seeds": given.seeds,
                "regret_per_user": {name: summary(of[:, -1].tolist()) for name, of in regret.items()},
                "best_epsilon_greedy": greedy,
                "less_than_best_epsilon_greedy": {
                    name: summary((regret[greedy] - regret[name])[:, -1].tolist()) for name in ("LinUCB", "Thompson")
                },
                "better_version_share": {
                    name: summary([of_versions(policy, seed, given) for seed in range(given.seeds)])
                    for name, policy in VERSIONS.items()
                },
            }
        )
    )


def curve(regret: Array) -> figures.Curve:
    n, rounds = regret.shape
    mean, half = regret.mean(0), student.ppf(0.975, n - 1) * regret.std(0, ddof=1) / n**0.5
    return figures.Curve(range(1, rounds + 1), mean, mean - half, mean + half)


def certain(phi: Array) -> Features:
    n, d = phi.shape
    return Features(np.zeros(n), phi, outer(phi), np.zeros((n, d)), np.zeros(n))


def of_inputs(policy: Policy, seed: int, given: argparse.Namespace) -> Array:
    """Cumulative regret by round, averaged over users, (rounds,)."""
    truth, total = np.random.default_rng([seed, 0]), np.zeros(given.rounds)
    random = np.random.default_rng([seed, 1])
    for _ in range(given.users):
        w = truth.normal(size=D)  # the prior is N(0, I), and all policies know it
        phi = np.column_stack([np.ones(given.inputs), truth.normal(size=(given.inputs, D - 1))])
        noise, features, expected = truth.normal(size=given.rounds) * NOISE**0.5, certain(phi), phi @ w
        precision, information = np.eye(D), np.zeros(D)
        for t in range(given.rounds):
            covariance = np.linalg.inv(precision)
            candidates = Candidates(covariance @ information, (covariance + covariance.T) / 2, features)
            place = draw(policy.distribution(candidates, random), random).place
            total[t] += expected.max() - expected[place]
            precision += np.outer(phi[place], phi[place]) / NOISE
            information += phi[place] * (expected[place] + noise[t]) / NOISE
    return np.cumsum(total) / given.users


def of_versions(policy: VersionPolicy, seed: int, given: argparse.Namespace) -> float:
    random = np.random.default_rng([seed, 2])
    better = int(random.integers(2))
    rewards, chosen = Rewards.none(2), np.empty(given.requests)
    for i in range(given.requests):
        w, phi = random.normal(size=D), random.normal(size=(10, D))
        decision = policy.choose(rewards, random)
        seen = D if decision.place == better else D // 2
        best = int((phi[:, :seen] @ w[:seen]).argmax())
        reward = float(random.random() < expit(phi[best] @ w - 2))
        rewards += Rewards.one(2, decision, reward)
        chosen[i] = decision.place == better
    return float(chosen[-given.requests // 4 :].mean())


if __name__ == "__main__":
    main()
