"""The first-order algorithm: basis functions given as one function of θ with its gradient.

Per pass, users are eliminated: given the inputs, their posteriors are the closed form of their half-step (eq. 3 of the paper
solved, not stepped), and what they say of input x collapses to (A_x, b_x). With g(x; θ) = [o − μ, f_1 … f_k] and the residuals
integrated out (W_x and v_x of :class:`mtl.basis.OracleBasis`), the objective is, as a function of θ,

    J(θ) = Σ_x ½ g(x)ᵀ W_x g(x) − v_x·g(x) + const      ∂J/∂θ = Σ_x (∂g(x)/∂θ)ᵀ (W_x g(x) − v_x)

and by the envelope theorem that is the gradient of the whole objective with users (and residuals) at their optimum. Both are
sums over inputs, so they add across partitions. The user gives g and the product of its Jacobian with a vector; the system does
the rest. Price: a step sees all functions at once but only locally, where an exact oracle goes to the best function in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import scipy.optimize

from mtl.basis import FittedBasis, check_told, integrated_weights
from mtl.config import FunctionSettings
from mtl.differentiable import SHARED, Differentiable, gradient_of, start_of, values_of
from mtl.gaussian import Array

_ROUNDING = 1e-9  # of the objective: a rise by less is none


@dataclass(frozen=True)
class Slope:
    """The collapsed objective and its gradient at one θ, over some inputs; they add."""

    value: float  # Σ ½ gᵀWg − v·g, nats
    gradient: Array  # (m,)
    weight: Array  # Σ W[i,i], (d,)
    told: Array  # inputs with W[i,i] > 0, (d,)

    @classmethod
    def of(cls, function: Differentiable, theta: Array, W: Array, v: Array, attributes: Array) -> Slope:
        """Of n inputs with ``W`` (n, d, d), ``v`` (n, d) and ``attributes`` (n, p).

        Raises:
            OracleError: the function raised, or what it returned are no finite numbers of the right shape.
        """
        g = values_of(function, theta, attributes, v.shape[1])
        told = np.einsum("nij,nj->ni", W, g)
        gradient = gradient_of(function, theta, attributes, told - v)
        weight = np.einsum("nii->ni", W)
        return cls(
            float(np.sum(g * (told / 2 - v))), gradient, weight.sum(0), np.asarray((weight > 0).sum(0), dtype=float)
        )

    def __add__(self, other: Slope) -> Slope:
        return Slope(
            self.value + other.value,
            self.gradient + other.gradient,
            self.weight + other.weight,
            self.told + other.told,
        )


Objective = Callable[..., tuple[float, Array]]
"""θ, and optionally the rows of a mini-batch → J and ∂J/∂θ, those of a mini-batch scaled to all inputs."""


class Optimizer(Protocol):
    def run(self, objective: Objective, theta: Array, n: int) -> Optimizer:
        """Some steps from ``theta``; the caller keeps the best θ that ``objective`` was asked for. What is remembered."""

    def refused(self) -> Optimizer:
        """After steps of which none was kept."""


@dataclass(frozen=True)
class LBFGS:
    """Steps of L-BFGS on all inputs, with its line search; the curvature is forgotten between passes, for J changes."""

    steps: int

    def run(self, objective: Objective, theta: Array, n: int) -> LBFGS:
        options = {"maxiter": self.steps, "ftol": 1e-13, "gtol": 1e-9}
        scipy.optimize.minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
        return self

    def refused(self) -> LBFGS:
        return self


@dataclass(frozen=True)
class Adam:
    """Steps of Adam (Kingma and Ba 2015, algorithm 1) on mini-batches of inputs; its averages live on between passes."""

    steps: int
    learning_rate: float
    batch: int  # inputs in a mini-batch; 0: all
    seed: int = 0
    t: int = 0  # steps made
    first: Any = 0.0  # moving average of the gradient, (m,)
    second: Any = 0.0  # and of its square

    def run(self, objective: Objective, theta: Array, n: int) -> Adam:
        whole = self.batch == 0 or self.batch >= n
        m, s = self.first, self.second
        epoch = 1 if whole else -(-n // self.batch)
        for t in range(self.t + 1, self.t + self.steps + 1):
            rows = None if whole else np.random.default_rng([self.seed, t]).choice(n, self.batch, replace=False)
            _, gradient = objective(theta, rows)
            m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
            scale = self.learning_rate / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
            theta = theta - scale * m / (1 - 0.9**t)
            if t == self.t + self.steps or (not whole and t % epoch == 0):
                objective(theta)  # to be kept where it is the best
        return replace(self, t=self.t + self.steps, first=m, second=s)

    def refused(self) -> Adam:
        return replace(self, learning_rate=self.learning_rate / 2)


@dataclass(frozen=True)
class FunctionBasis(FittedBasis):
    """c_x ~ N(g(z_x; θ), S), or c_x = g(z_x; θ) exactly where there is no residual, θ by steps of an optimizer per pass.

    A refit goes on from the last θ and lowers J(θ) + ½ Σ_j λ c̄_j θ_j², c̄_j the mean weight W[i,i] of the function i that the
    parameter belongs to (of all, where it is shared): as for the ridge of :func:`mtl.oracle.linear.fit_ridge`, a parameter
    of 0 counts for λ average inputs. Of all θ that it tries it keeps the best that does not raise J itself.
    """

    function: Differentiable
    optimizer: Any  # an Optimizer; None in what is stored
    covariance: Array  # S, (d, d); zero where there is no residual
    residual: bool
    theta: Array  # (m,)
    weight_decay: float  # λ, inputs
    owners: np.ndarray = field(repr=False, compare=False)  # the function of each parameter, (m,); −1: shared
    refused: int = 0

    @classmethod
    def start(
        cls,
        function: Differentiable,
        optimizer: Optimizer,
        weight_decay: float,
        p: int,
        d: int,
        variance: float | Array,
        residual: bool,
        seed: int = 0,
    ) -> FunctionBasis:
        """Before training, for inputs of p attributes.

        Raises:
            OracleError: the function does not start.
        """
        theta = start_of(function, p, d, seed)
        own = getattr(function, "owners", None)
        owners = own(p, d) if own else np.full(len(theta), SHARED)
        covariance = variance * np.eye(d) if residual else np.zeros((d, d))
        return cls(function, optimizer, covariance, residual, theta, weight_decay, owners)

    def mean(self, attributes: Array) -> Array:
        return values_of(self.function, self.theta, attributes, len(self.covariance))

    def refit(self, precision: Array, information: Array, attributes: Array, noise: float) -> FunctionBasis:
        """The optimizer's steps on what the events say of the inputs.

        Raises:
            OracleError: no event says anything; or as :meth:`Slope.of`.
        """
        W, v = integrated_weights(precision, information, self.covariance, noise)
        told = np.flatnonzero(np.einsum("nii->n", W) > 0)
        W, v, z = W[told], v[told], attributes[told]

        def slope(theta: Array, rows: np.ndarray | None = None) -> Slope:
            part = slice(None) if rows is None else rows
            return Slope.of(self.function, theta, W[part], v[part], z[part])

        return self.descend(slope, len(told))

    def descend(self, slope: Callable[..., Slope], n: int) -> FunctionBasis:
        """The optimizer's steps, with ``slope`` of a θ over all n inputs, or over the rows (batch,) given beside it."""
        here = slope(self.theta)
        check_told(here.told)
        told = here.told > 0
        mean_weight = np.divide(here.weight, here.told, out=np.zeros(len(told)), where=told)
        penalty = self.weight_decay * np.append(mean_weight, mean_weight[told].mean())[self.owners]  # −1 is the last
        bound = here.value + _ROUNDING * max(1.0, abs(here.value))
        best, best_value = self.theta, here.value + penalty @ self.theta**2 / 2

        def objective(theta: Array, rows: np.ndarray | None = None) -> tuple[float, Array]:
            nonlocal best, best_value
            found, scale = slope(theta) if rows is None else slope(theta, rows), 1 if rows is None else n / len(rows)
            value = scale * found.value + penalty @ theta**2 / 2
            if rows is None and value < best_value and found.value <= bound:
                best, best_value = theta.copy(), value
            return value, scale * found.gradient + penalty * theta

        optimizer = self.optimizer.run(objective, self.theta, n)
        if best is self.theta:
            return replace(self, optimizer=optimizer.refused(), refused=self.refused + 1)
        return replace(self, optimizer=optimizer, theta=best)

    def __getstate__(self) -> dict:
        """Without the optimizer: what is stored of a model only predicts."""
        return {**self.__dict__, "optimizer": None}

    @property
    def counts(self) -> dict[str, int]:
        return {"refused_steps": self.refused}


def make_optimizer(settings: FunctionSettings, seed: int) -> Optimizer:
    if settings.optimizer == "lbfgs":
        return LBFGS(settings.steps)
    return Adam(settings.steps, settings.learning_rate, settings.batch, seed)
