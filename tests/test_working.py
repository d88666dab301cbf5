"""Users' working sums: where they settle, what a batch adds to them, and what the order of batches is worth."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import expit

from mtl import alternation, gaussian, working
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.losses import LOSSES
from mtl.working import like, settle

USERS, INPUTS, D = 40, 50, 3
NOT_SQUARED = [name for name in LOSSES if name != "squared"]


class Planted:
    """Events of a planted model with weights between ½ and 2, under the prior that the users are drawn from."""

    def __init__(self, loss: str, scale: float = 0.7, uncertain: float = 0.02) -> None:
        random = np.random.default_rng(0)
        mean = random.normal(size=(INPUTS, D)) * scale
        covariance = gaussian.pack(np.tile(uncertain * np.eye(D), (INPUTS, 1, 1)))
        self.loss, self.features = LOSSES[loss], Features.of(mean, covariance, 0.3)
        w = random.normal(size=(USERS, D)) * scale
        self.weights = sp.random(USERS, INPUTS, 0.4, "csr", random_state=1)
        self.weights.data[:] = random.uniform(0.5, 2, self.weights.nnz)
        self.user, self.place = np.repeat(np.arange(USERS), np.diff(self.weights.indptr)), self.weights.indices
        h = self.features.offset[self.place] + np.sum(w[self.user] * self.features.phi[self.place], axis=1)
        draw = {"squared": random.normal, "logistic": lambda h: random.random(len(h)) < expit(h)}
        label = draw.get(loss, lambda h: random.poisson(np.exp(h)))(h)
        self.labels = like(self.weights, self.weights.data * label)
        self.posteriors = partial(
            alternation.posteriors, prior_mean=np.zeros((USERS, D)), prior_precision=np.eye(D) / scale**2, noise=1.0
        )

    def part(self, chosen: Any) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Some of the entries, as a batch has them."""
        where = self.user[chosen], self.place[chosen]
        pick = [
            sp.coo_matrix((m.data[chosen], where), (USERS, INPUTS)).tocsr().sorted_indices()
            for m in (self.weights, self.labels)
        ]
        return pick[0], pick[1]

    def settle(self, chosen: Any) -> tuple[Array, Array, Posterior]:
        a, b = settle(*self.part(chosen), self.features, self.posteriors, self.loss)
        return a, b, self.posteriors(a, b)

    def stream(self, a: Array, b: Array, batches: list[np.ndarray]) -> tuple[Array, Array, Posterior]:
        for chosen in batches:
            a, b = settle(*self.part(chosen), self.features, self.posteriors, self.loss, (a, b))
        return a, b, self.posteriors(a, b)


@pytest.mark.parametrize("loss", NOT_SQUARED)
def test_with_certain_features_a_user_settles_where_the_penalized_expected_loss_is_least(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a general-purpose optimizer, one user, over the mean and the covariance's own fixed point."""
    planted = Planted(loss, uncertain=0.0)
    monkeypatch.setattr(working, "SETTLING_PASSES", 100)
    a, _, users = planted.settle(slice(None))
    for u in range(3):
        mine = planted.user == u
        phi, offset = planted.features.phi[planted.place[mine]], planted.features.offset[planted.place[mine]]
        c, cy = planted.weights.data[mine], planted.labels.data[mine]
        V = gaussian.unpack(users.covariance[u], D)
        variance = np.einsum("nd,de,ne->n", phi, V, phi)
        expected = lambda w: planted.loss.expected(offset + phi @ w, variance, c, cy).sum() + w @ w / 0.49 / 2  # noqa: E731, B023
        best = minimize(expected, np.zeros(D), tol=1e-12)
        np.testing.assert_allclose(users.mean[u], best.x, atol=1e-5)
        np.testing.assert_allclose(np.linalg.inv(V), np.eye(D) / 0.49 + gaussian.unpack(a[u], D), rtol=1e-8)


@pytest.mark.parametrize("loss", NOT_SQUARED)
def test_large_labels_do_not_throw_users_off(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels up to thousands: undamped Newton steps from the prior end tens of nats away."""
    planted = Planted(loss, scale=1.4)
    assert loss != "poisson" or planted.labels.max() > 1000
    _, _, settled = planted.settle(slice(None))
    monkeypatch.setattr(working, "SETTLING_PASSES", 200)
    _, _, further = planted.settle(slice(None))
    np.testing.assert_allclose(settled.mean, further.mean, atol=0.01)


@pytest.mark.parametrize(("variance", "nats"), [(1.0, 1e-3), (10.0, 0.1), (25.0, 1.0)])
def test_under_wide_priors_counts_settle_and_do_not_circle(
    variance: float, nats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few counts a user, mostly 0: no user's objective is much changed by more passes, nor worse than after a few."""
    random, users, each = np.random.default_rng(0), 400, 4
    z = np.column_stack([np.zeros(users * each), random.normal(size=(users * each, D - 1))])
    features = Features.of(z, np.zeros((len(z), gaussian.packed_length(D))), 0.0)
    w = random.normal(size=(users, D)) * np.sqrt(variance)
    h = np.clip(np.einsum("nd,nd->n", np.repeat(w, each, 0), features.phi), -20, 6)
    places, starts = np.arange(users * each), np.arange(0, users * each + 1, each)
    weights = sp.csr_matrix((np.ones(users * each), places, starts), shape=(users, users * each))
    labels, loss, precision = (
        like(weights, random.poisson(np.exp(h)).astype(float)),
        LOSSES["poisson"],
        np.eye(D) / variance,
    )
    posteriors = partial(alternation.posteriors, prior_mean=np.zeros((users, D)), prior_precision=precision, noise=1.0)

    def objective(passes: int) -> Array:
        monkeypatch.setattr(working, "SETTLING_PASSES", passes)
        found = posteriors(*settle(weights, labels, features, posteriors, loss))
        mean, spread = working.beliefs(weights, found, features)
        kl = (np.trace(gaussian.unpack(found.covariance, D), axis1=1, axis2=2) + (found.mean**2).sum(1)) / variance
        kl -= found.log_determinant
        return np.add.reduceat(loss.expected(mean, spread, weights.data, labels.data), starts[:-1]) + kl / 2

    found, further = objective(30), objective(400)
    assert np.abs(found - further).max() < nats
    assert (found - objective(3)).max() < nats


def test_batches_of_squared_loss_add_up_to_one_pass() -> None:
    planted = Planted("squared")
    batches = np.array_split(np.random.default_rng(2).permutation(len(planted.user)), [5, 6, 90])
    nothing = np.zeros((USERS, gaussian.packed_length(D))), np.zeros((USERS, D))
    streamed, at_once = planted.stream(*nothing, batches), planted.settle(slice(None))
    for one, other in zip((*streamed[:2], *streamed[2]), (*at_once[:2], *at_once[2]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize(("loss", "largest"), [("logistic", 0.03), ("poisson", 0.02)])
def test_order_matters_a_little_and_a_replay_not_at_all(loss: str, largest: float) -> None:
    planted, random = Planted(loss), np.random.default_rng(3)
    order = random.permutation(len(planted.user))
    first, *batches = np.array_split(order, [len(order) * 3 // 4, len(order) * 3 // 4 + 20, len(order) - 30])
    a, b, _ = planted.settle(first)
    _, _, streamed = planted.stream(a, b, batches)
    _, _, again = planted.stream(*planted.settle(first)[:2], batches)
    np.testing.assert_array_equal(streamed.mean, again.mean)
    _, _, backwards = planted.stream(a, b, batches[::-1])
    assert np.abs(streamed.mean - backwards.mean).max() > 1e-6
    _, _, refit = planted.settle(slice(None))
    gaps = np.linalg.norm(streamed.mean - refit.mean, axis=1) / np.linalg.norm(refit.mean, axis=1)
    assert gaps.mean() < largest


@pytest.mark.parametrize("loss", NOT_SQUARED)
def test_users_without_events_of_a_batch_stay_as_they_are(loss: str) -> None:
    planted = Planted(loss)
    a, b, _ = planted.settle(planted.user < 20)
    after_a, after_b, _ = planted.stream(a, b, [planted.user == 30])
    changed = np.flatnonzero((after_a != a).any(1) | (after_b != b).any(1))
    np.testing.assert_array_equal(changed, [30])
