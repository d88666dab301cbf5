"""Exploration: what is chosen, how often, and that the logged chance is the one that it had."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mtl import gaussian
from mtl.errors import InputError
from mtl.features import Features
from mtl.serving.bandit import (
    Candidates,
    Decision,
    EpsilonGreedy,
    Exp3,
    FixedSplit,
    LinUCB,
    Policy,
    Rewards,
    Thompson,
    ThompsonVersions,
    draw,
)


def candidates(seed: int, n: int, d: int = 4, uncertain: float = 0.0) -> Candidates:
    random = np.random.default_rng(seed)
    root = random.normal(size=(d, d)) / 2
    covariance = np.tile(gaussian.pack(uncertain * np.eye(d)), (n, 1))
    features = Features.of(random.normal(size=(n, d)), covariance, 1.0)
    return Candidates(random.normal(size=d), root @ root.T, features)


def two(gap: float, spread: float) -> Candidates:
    """h of two candidates independent, N(gap, spread²) and N(0, spread²)."""
    features = Features(np.zeros(2), np.eye(2), gaussian.outer(np.eye(2)), np.zeros((2, 2)), np.zeros(2))
    return Candidates(np.array([gap, 0.0]), spread**2 * np.eye(2), features)


POLICIES: list[Policy] = [EpsilonGreedy(0.2), LinUCB(1.0, 0.1), LinUCB(2.0), Thompson(50, 0.1), Thompson(50)]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_every_policy_gives_a_distribution(seed: int, n: int) -> None:
    for policy in POLICIES:
        chances = policy.distribution(candidates(seed, n, uncertain=0.2), np.random.default_rng(seed))
        assert chances.shape == (n,)
        assert chances.sum() == pytest.approx(1)
        assert (chances >= 0).all()


def test_what_is_drawn_has_the_chance_that_is_told() -> None:
    random, chances, n = np.random.default_rng(0), np.array([0.1, 0.0, 0.6, 0.3]), 20_000
    decisions = [draw(chances, random) for _ in range(n)]
    counts = np.bincount([decision.place for decision in decisions], minlength=4)
    np.testing.assert_allclose(counts / n, chances, atol=0.015)
    assert counts[1] == 0
    assert all(decision.propensity == chances[decision.place] for decision in decisions[:100])


class Last:
    """A generator whose draw is the largest that there is."""

    def random(self) -> float:
        return 1.0


def test_nothing_impossible_is_drawn_where_chances_sum_to_less_than_one() -> None:
    assert draw(np.array([1 / 3, 1 / 3, 1 / 3 - 1e-9, 0.0]), Last()).place == 2  # type: ignore[arg-type]


def test_greedy_takes_the_best_mean_and_ucb_the_uncertain() -> None:
    of = two(0.5, 0.1)
    np.testing.assert_allclose(EpsilonGreedy(0.2).distribution(of, None), [0.9, 0.1])  # type: ignore[arg-type]
    unsure = Candidates(of.w, np.diag([0.01, 1.0]), of.features)
    np.testing.assert_array_equal(LinUCB(1.0).distribution(unsure, None), [0, 1])  # type: ignore[arg-type]
    np.testing.assert_array_equal(LinUCB(0.1).distribution(unsure, None), [1, 0])  # type: ignore[arg-type]
    np.testing.assert_allclose(LinUCB(1.0, 0.5).distribution(unsure, None), [0.25, 0.75])  # type: ignore[arg-type]


def test_thompson_chooses_by_the_chance_of_being_best() -> None:
    expected = norm.cdf(0.3 / (0.5 * 2**0.5))
    chances = Thompson(200_000).distribution(two(0.3, 0.5), np.random.default_rng(0))
    assert chances[0] == pytest.approx(expected, abs=0.005)


def test_draws_have_the_moments_of_what_is_believed() -> None:
    of = candidates(3, 5, uncertain=0.3)
    draws = of.draws(200_000, np.random.default_rng(0))
    mean, variance = of.moments()
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.02)
    phi = of.features.phi
    between = phi @ of.covariance @ phi.T
    np.testing.assert_allclose(np.cov(draws.T)[~np.eye(5, dtype=bool)], between[~np.eye(5, dtype=bool)], atol=0.05)


def test_logged_chances_of_thompson_make_an_unbiased_estimate_but_for_what_it_had_no_draw_of() -> None:
    """1/propensity of a candidate of chance p averages 1 − (1 − p)^M over decisions: the module's claim, exactly."""
    of, draws, n = two(1.2, 0.5), 12, 40_000
    p = norm.cdf(-1.2 / (0.5 * 2**0.5))  # of the second: 0.045
    random = np.random.default_rng(0)
    policy, total = Thompson(draws), 0.0
    for _ in range(n):
        decision = draw(policy.distribution(of, random), random)
        total += (decision.place == 1) / decision.propensity
    assert total / n == pytest.approx(1 - (1 - p) ** draws, abs=0.02)
    assert total / n < 0.5  # so M matters: with ε, or more draws, it is 1
    with_floor, total = Thompson(draws, 0.2), 0.0
    for _ in range(n // 4):
        decision = draw(with_floor.distribution(of, random), random)
        total += (decision.place == 1) / decision.propensity
    assert total / (n // 4) == pytest.approx(1, abs=0.08)


def play(policy, means: np.ndarray, rounds: int, seed: int) -> tuple[Rewards, list[int]]:
    random, rewards, places = np.random.default_rng(seed), Rewards.none(len(means)), []
    for _ in range(rounds):
        decision = policy.choose(rewards, random)
        reward = float(random.random() < means[decision.place])
        rewards += Rewards.one(len(means), decision, reward)
        places.append(decision.place)
    return rewards, places


@pytest.mark.parametrize(("policy", "share"), [(ThompsonVersions(), 0.9), (Exp3(0.1), 0.7)])
def test_the_better_of_two_versions_is_found(policy, share: float) -> None:
    for better in (0, 1):
        means = np.array([0.35, 0.35])
        means[better] = 0.65
        _, places = play(policy, means, 3000, better)
        assert np.mean(np.array(places[2000:]) == better) > share


def test_a_fixed_split_keeps_users_and_shares_and_salts() -> None:
    policy = FixedSplit((3, 1))
    first = [policy.choose(f"u{i}") for i in range(8000)]
    assert first == [policy.choose(f"u{i}") for i in range(8000)]
    assert np.mean([decision.place == 0 for decision in first]) == pytest.approx(0.75, abs=0.02)
    assert {decision.propensity for decision in first} == {0.75, 0.25}
    other = [FixedSplit((3, 1), "b").choose(f"u{i}").place for i in range(8000)]
    both = np.mean([a.place == 1 and b == 1 for a, b in zip(first, other, strict=True)])
    assert both == pytest.approx(1 / 16, abs=0.015)


def test_rewards_of_several_processes_add() -> None:
    one = Rewards.one(2, Decision(1, 0.25), 0.5)
    both = one + Rewards.one(2, Decision(0, 0.5), 1.0)
    np.testing.assert_array_equal(both.n, [1, 1])
    np.testing.assert_array_equal(both.total, [1.0, 0.5])
    np.testing.assert_array_equal(both.weighted, [2.0, 2.0])


def test_exp3_s_weighted_sums_estimate_every_version_s_total() -> None:
    means, rounds = np.array([0.2, 0.6]), 4000
    found = np.mean([play(Exp3(0.2), means, rounds, seed)[0].weighted for seed in range(6)], axis=0)
    np.testing.assert_allclose(found / rounds, means, atol=0.05)


def test_exp3_does_not_count_what_was_earned_without_competition() -> None:
    """A live version that decided alone for long is no better for it than a rival that has just come."""
    rewards = Rewards.none(2)
    for _ in range(2000):
        rewards += Rewards.one(2, Decision(0, 1.0), 0.5)
    random = np.random.default_rng(0)
    places = [Exp3(0.05).choose(rewards, random).place for _ in range(1000)]
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)
    assert (rewards.n[0], rewards.total[0]) == (2000, 1000)  # Thompson's are of every decision


def test_a_reward_out_of_range_is_refused() -> None:
    for reward in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="in \\[0, 1\\] is wanted"):
            Rewards.one(2, Decision(0, 0.5), reward)
