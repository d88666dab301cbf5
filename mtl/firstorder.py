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

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import scipy.optimize

from mtl.basis import FittedBasis, integrated_weights
from mtl.config import FunctionSettings
from mtl.errors import ConfigError, MtlError, OracleError
from mtl.gaussian import Array
from mtl.oracle.imports import load_object

_ROUNDING = 1e-9  # of the objective: a rise by less is none
_SHARED = -1  # the owner of a parameter of more than one basis function

log = logging.getLogger("mtl")


class Differentiable(Protocol):
    """g(x; θ) = [o − μ, f_1 … f_k] of n inputs at once, d = k+1; a row's values must not depend on other rows."""

    def start(self, p: int, d: int, seed: int) -> Array:
        """θ before training, (m,), for inputs of p attributes (the first is the constant 1)."""

    def values(self, theta: Array, attributes: Array) -> Array:
        """θ (m,) and attributes (n, p) → (n, d)."""

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        """Σ_rows (∂values/∂θ)ᵀ upstream, for ``upstream`` (n, d): (m,)."""


@dataclass(frozen=True)
class LinearFunction:
    """g(z) = Bᵀz, θ = B (p, d) row by row: what the linear oracle fits, here for all functions jointly."""

    def start(self, p: int, d: int, seed: int) -> Array:
        return np.zeros(p * d)

    def values(self, theta: Array, attributes: Array) -> Array:
        return attributes @ theta.reshape(attributes.shape[1], -1)

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        return (attributes.T @ upstream).ravel()

    def owners(self, p: int, d: int) -> np.ndarray:
        return np.tile(np.arange(d), p)


@dataclass(frozen=True)
class TwoLayer:
    """g(z) = Vᵀ[1, tanh(Uᵀz)], one hidden layer that all basis functions share.

    θ = U (p, hidden), then V (hidden + 1, d), row by row. V starts at 0, so that training begins at g = 0 as with an oracle.
    """

    hidden: int = 32

    def start(self, p: int, d: int, seed: int) -> Array:
        inner = np.random.default_rng(seed).normal(scale=p**-0.5, size=p * self.hidden)
        return np.concatenate([inner, np.zeros((self.hidden + 1) * d)])

    def values(self, theta: Array, attributes: Array) -> Array:
        _, V, H = self._forward(theta, attributes)
        return V[0] + H @ V[1:]

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        _, V, H = self._forward(theta, attributes)
        inner = attributes.T @ (upstream @ V[1:].T * (1 - H**2))
        return np.concatenate([inner.ravel(), upstream.sum(0), (H.T @ upstream).ravel()])

    def owners(self, p: int, d: int) -> np.ndarray:
        return np.concatenate([np.full(p * self.hidden, _SHARED), np.tile(np.arange(d), self.hidden + 1)])

    def _forward(self, theta: Array, attributes: Array) -> tuple[Array, Array, Array]:
        """U (p, hidden), V (hidden + 1, d) and the hidden values (n, hidden)."""
        p = attributes.shape[1]
        U, V = theta[: p * self.hidden].reshape(p, self.hidden), theta[p * self.hidden :].reshape(self.hidden + 1, -1)
        return U, V, np.tanh(attributes @ U)


@dataclass(frozen=True)
class TorchFunction:
    """A ``torch.nn.Module`` (n, p) → (n, d) in double precision, its gradient by autograd; θ is all its parameters.

    In evaluation mode: dropout is off and batch normalization keeps its statistics, for rows must not depend on each other.
    """

    module: Any

    @classmethod
    def of(cls, factory: Callable[[int, int], Any], p: int, d: int, seed: int) -> TorchFunction:
        """``factory(p, d)`` is the module, its random start repeatable."""
        torch = _torch()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(factory(p, d).double().eval())

    def start(self, p: int, d: int, seed: int) -> Array:
        return _torch().nn.utils.parameters_to_vector(self.module.parameters()).detach().numpy().copy()

    def values(self, theta: Array, attributes: Array) -> Array:
        torch = _torch()
        with torch.no_grad():
            return self._call(torch.from_numpy(np.array(theta)), attributes).numpy()

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        torch = _torch()
        parameters = torch.from_numpy(np.array(theta)).requires_grad_()
        self._call(parameters, attributes).backward(torch.from_numpy(np.array(upstream)))
        return parameters.grad.numpy()

    def _call(self, theta: Any, attributes: Array) -> Any:
        torch = _torch()
        parameters, first = {}, 0
        for name, parameter in self.module.named_parameters():
            parameters[name] = theta[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()
        return torch.func.functional_call(self.module, parameters, (torch.from_numpy(np.array(attributes)),))


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError('function.kind = "torch" needs PyTorch: pip install "oracle-mtl[torch]"') from None
    return torch


# --- One pass's view of θ ---------------------------------------------------------------------------------------------


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
        g = _values(function, theta, attributes, v.shape[1])
        told = np.einsum("nij,nj->ni", W, g)
        gradient = _gradient(function, theta, attributes, told - v)
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
        variance: float,
        residual: bool,
        seed: int = 0,
    ) -> FunctionBasis:
        """Before training, for inputs of p attributes.

        Raises:
            OracleError: the function does not start.
        """
        theta = _start(function, p, d, seed)
        own = getattr(function, "owners", None)
        owners = own(p, d) if own else np.full(len(theta), _SHARED)
        covariance = variance * np.eye(d) if residual else np.zeros((d, d))
        return cls(function, optimizer, covariance, residual, theta, weight_decay, owners)

    def mean(self, attributes: Array) -> Array:
        return _values(self.function, self.theta, attributes, len(self.covariance))

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
        silent = here.told == 0
        if silent.any():
            raise OracleError(
                f"no event says anything of basis function {int(np.argmax(silent))}: are all labels equal?"
            )
        mean_weight = here.weight / here.told
        penalty = self.weight_decay * np.append(mean_weight, mean_weight.mean())[self.owners]  # −1 is the last
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


# --- What the user gives ----------------------------------------------------------------------------------------------


def make_function(settings: FunctionSettings, p: int, d: int, seed: int) -> Differentiable:
    """The configured function, for inputs of p attributes and d = k+1 values.

    Raises:
        ConfigError: the factory is missing, superfluous, cannot be imported or fails; PyTorch is wanted and not installed.
    """
    given = settings.kind in ("custom", "torch")
    if given and not settings.factory:
        raise ConfigError(
            f'function.kind {settings.kind} needs function.factory, such as "my_package.functions:Factors"'
        )
    if not given:
        if settings.factory:
            raise ConfigError(f"function.factory is for function.kind custom or torch, not {settings.kind}")
        return LinearFunction() if settings.kind == "linear" else TwoLayer(settings.hidden)
    if settings.kind == "torch":
        _torch()
    factory = load_object("function.factory", settings.factory)
    try:
        return TorchFunction.of(factory, p, d, seed) if settings.kind == "torch" else factory()
    except Exception as error:
        raise ConfigError(f"function.factory = {settings.factory!r}: {type(error).__name__}: {error}") from error


def make_optimizer(settings: FunctionSettings, seed: int) -> Optimizer:
    if settings.optimizer == "lbfgs":
        return LBFGS(settings.steps)
    return Adam(settings.steps, settings.learning_rate, settings.batch, seed)


def check_gradient(
    function: Differentiable,
    p: int,
    d: int,
    attributes: Array | None = None,
    seed: int = 0,
    parameters: int = 50,
    tolerance: float = 1e-4,
) -> None:
    """Compare a function's gradient with central finite differences of its values, near its start.

    Args:
        attributes: rows to do it on, (n, p); random ones by default.
        parameters: how many entries of θ are compared, chosen at random.
        tolerance: difference allowed, relative to the larger of the two and to the largest entry of the gradient.

    Raises:
        OracleError: they differ (naming the parameter and both values), or rows influence each other, or the function
            raised or returned what is no finite number of the right shape.
    """
    random = np.random.default_rng(seed)
    z = np.column_stack([np.ones(8), random.normal(size=(8, p - 1))]) if attributes is None else attributes
    theta = _start(function, p, d, seed)
    theta = theta + 0.1 * random.normal(size=theta.shape)  # not where a layer that starts at 0 hides the others
    upstream = random.normal(size=(len(z), d))
    half = len(z) // 2
    whole, part = _values(function, theta, z, d), _values(function, theta, z[:half], d)
    if not np.allclose(whole[:half], part, rtol=1e-6, atol=1e-9 * (1 + np.abs(whole).max(initial=0.0))):
        raise OracleError("the function's values of a row depend on the other rows: it would differ between partitions")
    gradient = _gradient(function, theta, z, upstream)
    for j in sorted(random.choice(len(theta), min(parameters, len(theta)), replace=False)):
        step = np.zeros_like(theta)
        step[j] = 1e-5 * max(1.0, abs(theta[j]))
        rise = _values(function, theta + step, z, d) - _values(function, theta - step, z, d)
        expected = float(np.sum(upstream * rise) / (2 * step[j]))
        allowed = tolerance * (max(abs(expected), abs(gradient[j])) + 1e-2 * np.abs(gradient).max() + 1e-6)
        if abs(gradient[j] - expected) > allowed:
            raise OracleError(
                f"the gradient of the function is wrong in parameter {j} of {len(theta)}: "
                f"it says {gradient[j]:.6g}, finite differences of the values {expected:.6g}"
            )


def _start(function: Differentiable, p: int, d: int, seed: int) -> Array:
    theta = _called("does not start", function.start, p, d, seed)
    return _numbers("start", theta, np.shape(theta)[:1] or (1,))


def _values(function: Differentiable, theta: Array, attributes: Array, d: int) -> Array:
    if not len(attributes):
        return np.empty((0, d))
    values = _called("has no values", function.values, theta, attributes)
    return _numbers("values", values, (len(attributes), d))


def _gradient(function: Differentiable, theta: Array, attributes: Array, upstream: Array) -> Array:
    if not len(attributes):
        return np.zeros_like(theta)
    return _numbers("gradient", _called("has no gradient", function.gradient, theta, attributes, upstream), theta.shape)


def _called(what: str, method: Callable, *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except MtlError:
        raise
    except Exception as error:
        raise OracleError(f"the function {what} ({type(error).__name__}: {error})") from error


def _numbers(method: str, returned: Any, shape: tuple[int, ...]) -> Array:
    try:
        numbers = np.asarray(returned, float)
    except (TypeError, ValueError) as error:
        raise OracleError(f"the function's {method} returned no array of numbers ({error})") from None
    if numbers.shape != shape:
        raise OracleError(f"the function's {method} returned shape {numbers.shape}, {shape} is wanted")
    if not np.isfinite(numbers).all():
        raise OracleError(
            f"the function's {method} returned {np.sum(~np.isfinite(numbers))} numbers that are not finite"
        )
    return numbers
