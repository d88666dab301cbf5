"""Alternating minimization: the order of steps, the objective, and when to stop.

One iteration is the users' half-step, the users' prior, the oracle, the inputs' half-step, the inputs' prior and the noise.
Each minimizes the negative evidence bound

    J = n/2 log 2πσ² + Σ c E[(y − h)²] / 2σ² + KL(users) + KL(inputs)

over what it sets, so that J, recorded after each half-step and each prior, never rises while the oracle is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtl.basis import InputPrior, OracleBasis
from mtl.engine import Engine
from mtl.prior import Moments, Prior

log = logging.getLogger("mtl")

START_VARIANCE = 0.2  # of every prior before anything is learnt
START_NOISE = (
    0.5  # of the labels' variance: from all of it the factors of small problems often die before they are found
)
_NOISE_FLOOR = 1e-9  # of the labels' variance: a perfect fit must not divide by zero


@dataclass(frozen=True)
class Fit:
    """What training learnt, beside the inputs that the engine holds."""

    users: Prior
    inputs: InputPrior
    noise: float  # σ², squared label units
    objective: tuple[float, ...]  # J after each half-step, nats
    iterations: int


@dataclass(frozen=True)
class Schedule:
    """When to stop: after ``iterations``, or when one lowers the objective by less than ``tolerance`` of it."""

    iterations: int
    tolerance: float | None = None


def alternate(
    engine: Engine,
    users: Prior,
    inputs: InputPrior,
    n_events: int,
    label_variance: float,
    schedule: Schedule,
    report: Callable[[int, float], None] = lambda iteration, objective: None,
) -> Fit:
    """Train by oracle-mtl.

    Args:
        engine: holds users and inputs.
        users, inputs: priors to start from.
        n_events: number of events.
        label_variance: Σ c (y − μ)² / n_events.
        report: called with the iteration (from 1) and the objective after it.
    """
    noise, objective = START_NOISE * label_variance, []
    floor = _NOISE_FLOOR * label_variance

    def record(error: float) -> None:
        assert input_moments is not None
        data = n_events / 2 * np.log(2 * np.pi * noise) + error / (2 * noise)
        objective.append(float(data + users.divergence(user_moments) + inputs.divergence(input_moments)))

    input_moments: Moments | None = None
    iteration, previous = 0, np.inf
    while iteration < schedule.iterations:
        iteration += 1
        user_moments, error = engine.update_users(users, noise)
        users = users.learn(user_moments)
        if input_moments is not None:
            record(error)
        if isinstance(inputs, OracleBasis):
            inputs = engine.fit_oracle(inputs, noise)
        input_moments, error = engine.update_inputs(inputs, noise)
        inputs = inputs.learn(input_moments)
        noise = max(error / n_events, floor)
        record(error)
        report(iteration, objective[-1])
        if schedule.tolerance is not None and previous - objective[-1] < schedule.tolerance * abs(objective[-1]):
            break
        previous = objective[-1]
    engine.update_inputs(inputs, noise)  # so that what the engine holds and the priors returned are of one model
    return Fit(users, inputs, noise, tuple(objective), iteration)
