"""Working precisions and informations against the losses they stand for; costs against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit
from sklearn import metrics as theirs

from mtl.losses import LOSSES, Logistic, Loss, Poisson

means = st.floats(-3, 3)
variances = st.floats(0.01, 4)
weights = st.floats(0.1, 5)


def label_for(loss: Loss, drawn: int) -> float:
    return float(drawn % 2 if loss.name == "logistic" else drawn)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(m=means, v=variances, c=weights, drawn=st.integers(0, 4))
def test_the_working_sums_have_the_derivatives_of_the_expected_loss(loss, m, v, c, drawn) -> None:
    y, step = label_for(loss, drawn), 1e-5
    arrays = [np.array([value]) for value in (m, v, c, c * y)]
    precision, information = loss.working(*arrays)

    def expected(dm: float = 0.0, dv: float = 0.0) -> float:
        return loss.expected(arrays[0] + dm, arrays[1] + dv, *arrays[2:])[0]

    by_mean = (expected(step) - expected(-step)) / (2 * step)
    by_variance = (expected(0, step) - expected(0, -step)) / (2 * step)
    np.testing.assert_allclose(precision[0] * m - information[0], by_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(precision[0] / 2, by_variance, rtol=1e-5, atol=1e-5)


@given(m=means, v=variances, at_m=means, at_v=variances, drawn=st.integers(0, 1))
def test_the_logistic_bound_lies_above_the_loss(m, v, at_m, at_v, drawn) -> None:
    """Tangent at another belief ≥ the bound's own value ≥ the expected loss by quadrature."""
    loss, one = Logistic(), np.ones(1)
    y = np.array([float(drawn)])
    precision, information = loss.working(at_m * one, at_v * one, one, y)
    surrogate = lambda m, v: precision * (m**2 + v) / 2 - information * m  # noqa: E731
    tangent = loss.expected(at_m * one, at_v * one, one, y) + surrogate(m, v) - surrogate(at_m, at_v)
    own = loss.expected(m * one, v * one, one, y)
    nodes, mass = hermegauss(60)
    h = m + np.sqrt(v) * nodes
    exact = mass @ (np.logaddexp(0, h) - drawn * h) / mass.sum()
    assert tangent[0] >= own[0] - 1e-9
    assert own[0] >= exact - 1e-9


@given(m=means, v=variances)
def test_responses_are_expectations(m, v) -> None:
    nodes, mass = hermegauss(60)
    h = m + np.sqrt(v) * nodes
    assert abs(Logistic().response(np.array(m), np.array(v)) - mass @ expit(h) / mass.sum()) < 0.02
    np.testing.assert_allclose(Poisson().response(np.array(m), np.array(v)), mass @ np.exp(h) / mass.sum(), rtol=1e-4)


@pytest.mark.parametrize(("loss", "mean"), [("squared", 3.2), ("logistic", 0.3), ("poisson", 2.5)])
def test_the_link_undoes_the_response(loss, mean) -> None:
    chosen = LOSSES[loss]
    assert chosen.response(np.array(chosen.link(mean)), np.array(0.0)) == pytest.approx(mean)


def test_deviations_are_those_of_labels() -> None:
    """By simulation of h and of the label given h."""
    random = np.random.default_rng(2)
    m, v = np.array([0.4]), np.array([0.3])
    h = random.normal(m, np.sqrt(v), size=400_000)
    draws = {
        "squared": h + random.normal(size=len(h)) * 0.5,
        "logistic": random.uniform(size=len(h)) < 1 / (1 + np.exp(-h)),
        "poisson": random.poisson(np.exp(h)),
    }
    for loss, labels in draws.items():
        assert LOSSES[loss].deviation(m, v, 0.25)[0] == pytest.approx(labels.std(), rel=0.02)
        assert LOSSES[loss].response(m, v)[0] == pytest.approx(labels.mean(), rel=0.02)


def test_the_surprise_of_labels_ranks_predictions_as_the_log_loss_does() -> None:
    random = np.random.default_rng(3)
    h, y = random.normal(size=50), random.integers(0, 2, 50).astype(float)
    nothing = np.zeros(50)
    ours = LOSSES["logistic"].surprise(h, nothing, np.ones(50), y).mean()
    assert ours == pytest.approx(theirs.log_loss(y, 1 / (1 + np.exp(-h))), rel=1e-9)
    rate, counts = np.exp(h), random.poisson(1.0, 50).astype(float)
    difference = [LOSSES["poisson"].surprise(x, nothing, np.ones(50), counts).mean() for x in (h, nothing)]
    deviances = [theirs.mean_poisson_deviance(counts, r) for r in (rate, np.ones(50))]
    assert 2 * (difference[0] - difference[1]) == pytest.approx(deviances[0] - deviances[1], rel=1e-9)
