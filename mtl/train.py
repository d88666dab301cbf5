"""Alternating minimization: the order of steps, the objective, and when to stop.

One iteration is the users' half-step, the users' prior, the oracle, the inputs' half-step, the inputs' prior and the noise.
Each minimizes the negative evidence bound

    J = Σ c E[loss] + KL(users) + KL(inputs),      with n/2 log 2πσ² + Σ c E[(y − h)²] / 2σ² for squared loss,

over what it sets, so that J, recorded after each half-step and each prior, does not rise where the oracle is exact and the
loss is squared or bounded. Where one of them is neither (a black box, Poisson's Newton steps), an iteration that raised J is
taken back and repeated with half the step: the recorded trace never rises. Poisson's, which is judged by the users' half-step
that ends it, begins and ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtl.effects import Effects
from mtl.gaussian import Posterior
from mtl.losses import Loss
from mtl.prior import Moments, VectorPrior

if TYPE_CHECKING:
    from mtl.engine import Engine  # whose module imports pyspark

START_VARIANCE = 0.2  # of every prior before anything is learnt, in the units of Specification.spread and input_units
# Of the labels' variance: from all of it the factors of small problems often die before they are found.
START_NOISE = 0.5
_NOISE_FLOOR = 1e-9  # of the labels' variance: a perfect fit must not divide by zero
_SMALLEST_STEP = 1 / 32
_RESUMING_STEPS = 10  # of the users, after which working values, which a state does not hold, are back


@dataclass(frozen=True)
class Fit:
    """What training learnt, beside the inputs that the engine holds."""

    users: VectorPrior
    inputs: VectorPrior
    noise: float  # σ², squared label units; 1 where the loss is not squared
    objective: tuple[float, ...]  # J after each half-step, of Poisson loss after each iteration (nats)
    iterations: int
    damped: int = 0  # iterations that had raised J and were repeated with a smaller step
    held_out: tuple[float, ...] = ()  # summed surprise of the events held out, after 0, 1, … iterations

    @property
    def best(self) -> int:
        """The number of iterations, at least 1, after which the events held out were predicted best."""
        return 1 + int(np.argmin(self.held_out[1:])) if len(self.held_out) > 1 else self.iterations


class Noise(NamedTuple):
    """What an earlier version knew of the noise."""

    variance: float  # σ², squared label units
    n: float = 0.0  # events that it learnt it from, beside those of this training; 0: it is only begun from


class State(NamedTuple):
    """Where a training stands after some iterations: what it goes on from."""

    iteration: int
    vectors: Posterior  # of the inputs, (inputs, d),
    applied: Any  # and what they were computed from, in the engine's own form
    users: VectorPrior  # before the users' half-step that is next
    inputs: VectorPrior
    noise: float
    objective: list[float]
    held_out: list[float]
    previous: float  # the objective an iteration ago
    effects: Effects
    step: float  # of the next iteration
    damped: int


@dataclass(frozen=True)
class Schedule:
    """When to stop.

    After ``iterations``; or when one lowers the objective by less than ``tolerance`` an event (nats); or when ``patience`` of
    them have not improved on the events held out.
    """

    iterations: int
    tolerance: float | None = None
    patience: int | None = None

    def is_settled(self, before: float, objective: float, n_events: float) -> bool:
        return self.tolerance is not None and before - objective < self.tolerance * n_events

    def is_overfit(self, held_out: list[float]) -> bool:
        return self.patience is not None and len(held_out) - 1 - int(np.argmin(held_out)) >= self.patience


def alternate(
    engine: Engine,
    users: VectorPrior,
    inputs: VectorPrior,
    loss: Loss,
    n_events: float,
    label_variance: float,
    schedule: Schedule,
    report: Callable[[int, float], None] = lambda iteration, objective: None,
    known: Noise | None = None,
    locked: bool = False,
    resume: State | None = None,
    save: Callable[[State], None] | None = None,
) -> Fit:
    """Train by oracle-mtl.

    Args:
        engine: holds users and inputs.
        users, inputs: priors to start from.
        n_events: number of events, zeros of implicit feedback among them; what they count where old ones are forgotten.
        label_variance: Σ c (y − μ)² / n_events.
        report: called with the iteration (from 1) and the objective after it.
        known: the noise of an earlier version, to start from and to learn on from; its events are terms of J like those of now.
        locked: whether the inputs stay as the engine has them, and only the users' prior and the noise are learnt.
        resume: go on from here; the engine holds its vectors, effects and what was applied.
        save: called with the state after every iteration.
    """
    noise = 1.0
    if loss.is_quadratic:
        noise = known.variance if known else START_NOISE * label_variance
    floor = _NOISE_FLOOR * label_variance
    before_n, before_deviance = (known.n, known.n * known.variance) if known else (0.0, 0.0)
    trace: list[float] = []
    held_out: list[float] = []
    step, damped, iteration, previous = 1.0, 0, 0, np.inf
    if resume:
        iteration, _, _, users, inputs, noise, trace, held_out, previous, _, step, damped = resume

    def objective(deviance: float) -> float:
        normalizer = 0.0
        if loss.is_quadratic:
            normalizer = (n_events + before_n) / 2 * np.log(2 * np.pi * noise) + before_deviance / (2 * noise)
        divergence = users.divergence(user_moments) + (0.0 if locked else inputs.divergence(input_moments))
        return float(normalizer + deviance / (2 * noise) + divergence + engine.divergence)

    def noise_of(deviance: float) -> float:
        return max((deviance + before_deviance) / (n_events + before_n), floor) if loss.is_quadratic else 1.0

    def update_inputs() -> tuple[VectorPrior, Moments, float, float]:
        """The inputs' half-step: prior, moments, noise, deviance."""
        if locked:
            return inputs, Moments.zero(0, 0), noise_of(user_deviance), user_deviance
        refitted = engine.refit(inputs, noise)
        moments, deviance = engine.update_inputs(refitted, noise, step)
        return refitted.learn(moments), moments, noise_of(deviance), deviance

    def is_last(reached: float) -> bool:
        """Whether the iteration that reached this objective is."""
        nonlocal previous
        report(iteration, reached)
        before, previous = previous, reached
        return schedule.is_settled(before, reached, n_events) or iteration >= schedule.iterations

    for _ in range(_RESUMING_STEPS if resume and not loss.is_quadratic else 1):
        user_moments, user_deviance = engine.update_users(users, noise)
    users = users.learn(user_moments)
    if not resume:
        held_out.append(engine.held_out)
    while True:
        kept = engine.snapshot(), users, inputs, noise, user_moments, user_deviance, previous, len(trace)
        inputs, input_moments, noise, deviance = update_inputs()
        iteration += 1
        if loss.is_bounded:
            trace.append(objective(deviance))
            if is_last(trace[-1]):
                break
        before = users
        user_moments, user_deviance = engine.update_users(users, noise, step)
        users = users.learn(user_moments)
        reached = objective(user_deviance)
        if trace and reached > trace[-1] + engine.rounding * abs(trace[-1]):
            snapshot, users, inputs, noise, user_moments, user_deviance, previous, length = kept
            engine.restore(snapshot)
            del trace[length:]
            if step <= _SMALLEST_STEP:
                break
            step, damped, iteration = step / 2, damped + 1, iteration - 1
            continue
        trace.append(reached)
        held_out.append(engine.held_out)
        if (not loss.is_bounded and is_last(reached)) or schedule.is_overfit(held_out):
            break
        step = min(1.0, 2 * step)
        if save:
            of_all = [*trace], [*held_out], previous, engine.effects, step, damped
            save(State(iteration, engine.inputs, engine.applied, before, inputs, noise, *of_all))
    if not locked:
        # So that what the engine holds and the priors returned are of one model. Where a whole step is not sure to lower the
        # objective, from the evidence that the last one took.
        engine.update_inputs(inputs, noise, 1.0 if loss.is_bounded and step == 1.0 else 0.0)
    return Fit(users, inputs, noise, tuple(trace), iteration, damped, tuple(held_out))
