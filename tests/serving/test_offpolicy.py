"""Off-policy estimates: by hand, unbiased over all that can happen, and covering a truth that is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mtl.errors import InputError
from mtl.serving.offpolicy import Log, doubly_robust, ips, mean_rewards, snips, support

LOG = Log(np.array([1.0, 0.0, 3.0]), np.array([0.5, 0.25, 0.5]), np.array([0.25, 0.5, 0.5]))


def test_estimates_worked_by_hand() -> None:
    # ρ = ½, 2, 1: IPS (½ + 0 + 3)/3, SNIPS 3.5/3.5.
    assert ips(LOG).value == pytest.approx(3.5 / 3)
    assert snips(LOG).value == pytest.approx(1.0)
    # f = 1, 1, 2 and v = 1: 1 + ½·0, 1 + 2·(−1), 1 + 1·1.
    assert doubly_robust(LOG, np.array([1.0, 1.0, 2.0]), np.ones(3)).value == pytest.approx((1 - 1 + 2) / 3)
    told = support(LOG)
    assert (told.n, told.effective, told.largest) == (3, pytest.approx(3.5**2 / 5.25), pytest.approx(2 / 3.5))


def test_the_interval_is_the_normal_one() -> None:
    found = ips(LOG, 0.95)
    assert found.standard_error == pytest.approx(np.std([0.5, 0, 3], ddof=1) / 3**0.5)
    assert found.high - found.value == pytest.approx(1.959964 * found.standard_error)
    assert found.value - found.low == pytest.approx(1.959964 * found.standard_error)
    assert ips(LOG, 0.5).high < found.high


def test_ips_and_dr_are_unbiased_over_everything_that_can_happen() -> None:
    """Two actions, rewards 0 and 1, two decisions: all sixteen logs, each with its chance."""
    p, q, mean = np.array([0.3, 0.7]), np.array([0.8, 0.2]), np.array([0.4, 0.9])
    f = np.array([0.1, 0.7])  # a poor model, and no part of the truth
    totals = {"ips": 0.0, "dr": 0.0, "dr without propensities": 0.0}
    for first, second in product(product((0, 1), (0, 1)), repeat=2):
        (a, r), chance = np.array([first, second]).T, 1.0
        for action, reward in (first, second):
            chance *= p[action] * (mean[action] if reward else 1 - mean[action])
        log = Log(r.astype(float), p[a], q[a])
        totals["ips"] += chance * ips(log).value
        totals["dr"] += chance * doubly_robust(log, f[a], np.full(2, q @ f)).value
        unweighted = Log(r.astype(float), q[a], q[a])
        totals["dr without propensities"] += chance * doubly_robust(unweighted, f[a], np.full(2, q @ f)).value
    assert totals["ips"] == pytest.approx(q @ mean)
    assert totals["dr"] == pytest.approx(q @ mean)
    assert abs(totals["dr without propensities"] - q @ mean) > 0.04


def test_a_reward_moved_by_a_constant_moves_snips_by_as_much_and_ips_by_more_or_less() -> None:
    moved = Log(LOG.reward + 10, LOG.propensity, LOG.target)
    assert snips(moved).value == pytest.approx(snips(LOG).value + 10)
    assert snips(moved).standard_error == pytest.approx(snips(LOG).standard_error)
    assert ips(moved).value != pytest.approx(ips(LOG).value + 10)


def test_the_log_s_own_policy_is_its_mean_reward() -> None:
    own = Log(LOG.reward, LOG.propensity, LOG.propensity)
    for found in (ips(own), snips(own)):
        assert found.value == pytest.approx(4 / 3)
        assert found.standard_error == pytest.approx(LOG.reward.std(ddof=1) / 3**0.5)


@pytest.mark.parametrize("rate", [0.8, 0.95])
def test_intervals_cover_the_truth_at_their_rate(rate: float) -> None:
    random, n, m, runs = np.random.default_rng(3), 1500, 10, 800
    p, q = random.dirichlet(np.full(m, 4.0)), random.dirichlet(np.full(m, 4.0))
    mean = random.uniform(0.05, 0.5, m)
    truth, covered = float(q @ mean), {"ips": 0, "snips": 0, "dr": 0}
    for _ in range(runs):
        action = random.choice(m, n, p=p)
        reward = (random.random(n) < mean[action]).astype(float)
        log = Log(reward, p[action], q[action])
        found = {
            "ips": ips(log, rate),
            "snips": snips(log, rate),
            "dr": doubly_robust(log, *mean_rewards(action, reward, q), rate),
        }
        for name, estimate in found.items():
            covered[name] += estimate.low <= truth <= estimate.high
    spread = 3.5 * (rate * (1 - rate) / runs) ** 0.5
    for name, hits in covered.items():
        assert hits / runs == pytest.approx(rate, abs=spread + 0.01), name


def test_a_reward_model_makes_it_steadier() -> None:
    random, n = np.random.default_rng(0), 5000
    p, q, mean = np.full(4, 0.25), np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.9, 0.1, 0.5, 0.3])
    action = random.choice(4, n, p=p)
    reward = (random.random(n) < mean[action]).astype(float)
    log = Log(reward, p[action], q[action])
    assert doubly_robust(log, *mean_rewards(action, reward, q)).standard_error < 0.8 * ips(log).standard_error


def test_the_reward_model_has_not_seen_the_reward_it_predicts() -> None:
    action, reward, q = np.array([0, 1, 0, 1, 0, 1]), np.array([0.0, 1, 0, 1, 0, 1]), np.array([0.5, 0.5])
    before, _ = mean_rewards(action, reward, q, folds=6)
    for i in range(6):
        changed = reward.copy()
        changed[i] = 100.0
        after, _ = mean_rewards(action, changed, q, folds=6)
        assert after[i] == before[i]
        assert (np.delete(after, i) != np.delete(before, i)).any()


def test_chances_by_decision_are_those_by_action_where_they_are_equal() -> None:
    random = np.random.default_rng(0)
    action, reward, q = random.integers(0, 3, 20), random.random(20), np.array([0.2, 0.3, 0.5])
    one, many = mean_rewards(action, reward, q), mean_rewards(action, reward, np.tile(q, (20, 1)))
    np.testing.assert_allclose(one, many)


@pytest.mark.parametrize(
    ("reward", "propensity", "target", "message"),
    [
        ([1.0, np.nan], [0.5, 0.5], [0.5, 0.5], "the reward of decision 1 is nan"),
        ([1.0, 1.0], [0.5, 0.0], [0.5, 0.5], "the propensity of decision 1 is 0.0"),
        ([1.0, 1.0], [1.5, 0.5], [0.5, 0.5], "the propensity of decision 0 is 1.5"),
        ([1.0, 1.0], [0.5, 0.5], [-0.1, 0.5], "the target of decision 0 is -0.1"),
        ([1.0], [0.5], [0.5], "needs two"),
    ],
)
def test_what_no_log_can_hold_is_refused(reward: list, propensity: list, target: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Log(*map(np.array, (reward, propensity, target)))


def test_a_policy_of_which_the_log_says_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="says nothing"):
        snips(Log(np.ones(2), np.ones(2), np.zeros(2)))
