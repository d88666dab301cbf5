"""Losses: what an event says of h(x; u), as a weighted squared loss of its own.

The model predicts σ(h) with h = o(x) + w_u·φ(x). Under a Gaussian belief about h, with mean m and variance v, an event of
weight c and label y enters the users' and the inputs' sums with a *working* precision and information

    c·ω  and  c·ω·z        so that its expected loss is  ½ cω E[h²] − cωz E[h] + const

exactly (squared), as an upper bound that touches at (m, v) (logistic: Jaakkola & Jordan 2000; the same as Pólya–Gamma,
Polson, Scott & Windle 2013), or to second order about (m, v) (Poisson: Newton). All three agree with the expected loss in
its derivatives by m and v, so that a fixed point of the sums is one of the loss.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy.special import expit, logit

from mtl.gaussian import Array

_LARGEST_LOG_RATE = 30.0  # e³⁰ events: beyond it a Poisson step is damped, not infinite


class Loss(Protocol):
    name: str
    is_quadratic: bool  # no working values are needed, and the noise σ² is learnt; else σ² = 1
    is_bounded: bool  # the working values bound the loss, so that no step on them can raise it

    def link(self, mean: float) -> float:
        """The h of a constant model that predicts ``mean``."""

    def response(self, mean: Array, variance: Array) -> Array:
        """E[σ(h)] for h ~ N(mean, variance)."""

    def deviation(self, mean: Array, variance: Array, noise: float) -> Array:
        """Standard deviation of a label about the prediction, (n,)."""

    def refusal(self, low: float, high: float, whole: bool) -> str | None:
        """What is wrong with labels between ``low`` and ``high``, all of them whole numbers or not."""

    def working(self, mean: Array, variance: Array, weight: Array, label: Array) -> tuple[Array, Array]:
        """(c·ω, c·ω·z) about h ~ N(mean, variance), for weights c and weighted labels c·y; all (n,)."""

    def expected(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        """Expected loss, or its bound, of each event (nats up to a constant of the labels), (n,)."""

    def surprise(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        """What the prediction of each event costs when its label is seen, up to a constant of the labels, (n,)."""

    def start(self, weight: Array, label: Array, mean_label: float) -> tuple[Array, Array]:
        """(mean, variance) of h to begin from, before anything is learnt."""


class Squared:
    name = "squared"
    is_quadratic = True
    is_bounded = True

    def link(self, mean: float) -> float:
        return mean

    def response(self, mean: Array, variance: Array) -> Array:
        return mean

    def deviation(self, mean: Array, variance: Array, noise: float) -> Array:
        return np.sqrt(noise + variance)

    def refusal(self, low: float, high: float, whole: bool) -> str | None:
        return None

    def working(self, mean: Array, variance: Array, weight: Array, label: Array) -> tuple[Array, Array]:
        return weight, label

    def expected(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        """½ E[(y − h)²] without ½ y²; times 1/σ² in the objective."""
        return weight * (mean**2 + variance) / 2 - label * mean

    def surprise(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        return weight * mean**2 / 2 - label * mean

    def start(self, weight: Array, label: Array, mean_label: float) -> tuple[Array, Array]:
        return np.full(len(weight), mean_label), np.zeros(len(weight))


class Logistic:
    """Labels 0 and 1: −log p = log 2cosh(h/2) − (y − ½)h, bounded by its tangent in h² at ξ² = E[h²]."""

    name = "logistic"
    is_quadratic = False
    is_bounded = True

    def link(self, mean: float) -> float:
        return float(logit(mean))

    def response(self, mean: Array, variance: Array) -> Array:
        """By the probit approximation (Bishop 2006, eq. 4.153): off by less than 0.02."""
        return expit(mean / np.sqrt(1 + np.pi / 8 * variance))

    def deviation(self, mean: Array, variance: Array, noise: float) -> Array:
        p = self.response(mean, variance)
        return np.sqrt(p * (1 - p))

    def refusal(self, low: float, high: float, whole: bool) -> str | None:
        return None if whole and low >= 0 and high <= 1 else "labels other than 0 and 1"

    def working(self, mean: Array, variance: Array, weight: Array, label: Array) -> tuple[Array, Array]:
        xi = np.sqrt(mean**2 + variance)
        omega = np.where(xi > 1e-6, np.tanh(xi / 2) / (2 * np.maximum(xi, 1e-6)), 0.25)
        return weight * omega, label - weight / 2

    def expected(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        xi = np.sqrt(mean**2 + variance)
        return weight * np.logaddexp(xi / 2, -xi / 2) - (label - weight / 2) * mean

    def surprise(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        h = mean / np.sqrt(1 + np.pi / 8 * variance)
        return weight * np.logaddexp(0, h) - label * h

    def start(self, weight: Array, label: Array, mean_label: float) -> tuple[Array, Array]:
        return np.full(len(weight), self.link(mean_label)), np.ones(len(weight))


class Poisson:
    """Labels 0, 1, 2, …: −log p = e^h − yh + log y!, with E[e^h] = e^(m + v/2)."""

    name = "poisson"
    is_quadratic = False
    is_bounded = False

    def link(self, mean: float) -> float:
        return float(np.log(mean))

    def response(self, mean: Array, variance: Array) -> Array:
        return np.exp(np.minimum(mean + variance / 2, _LARGEST_LOG_RATE))

    def deviation(self, mean: Array, variance: Array, noise: float) -> Array:
        rate = self.response(mean, variance)
        return np.sqrt(rate + rate**2 * np.expm1(np.minimum(variance, _LARGEST_LOG_RATE)))

    def refusal(self, low: float, high: float, whole: bool) -> str | None:
        return None if whole and low >= 0 else "labels that are no counts (0, 1, 2, …)"

    def working(self, mean: Array, variance: Array, weight: Array, label: Array) -> tuple[Array, Array]:
        rate = weight * self.response(mean, variance)
        return rate, rate * (mean - 1) + label

    def expected(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        return weight * self.response(mean, variance) - label * mean

    def surprise(self, mean: Array, variance: Array, weight: Array, label: Array) -> Array:
        return weight * self.response(mean, variance) - label * (mean + variance / 2)

    def start(self, weight: Array, label: Array, mean_label: float) -> tuple[Array, Array]:
        """Half-way from the label to the mean, as generalized linear models are started (McCullagh & Nelder 1989)."""
        return np.log((label / np.maximum(weight, 1e-300) + mean_label) / 2), np.zeros(len(weight))


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Squared(), Logistic(), Poisson())}
