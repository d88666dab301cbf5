"""What first-order training is given: basis functions as one function of θ with its gradient, and a check of that.

The function is g(x; θ) = [o − μ, f_1 … f_k] of an input's attributes, and the product of its Jacobian in θ with a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtl.config import FunctionSettings
from mtl.errors import ConfigError, MtlError, OracleError
from mtl.gaussian import Array
from mtl.oracle.imports import load_object

SHARED = -1  # the owner of a parameter of more than one basis function


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
        return np.concatenate([np.full(p * self.hidden, SHARED), np.tile(np.arange(d), self.hidden + 1)])

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
    theta = start_of(function, p, d, seed)
    theta = theta + 0.1 * random.normal(size=theta.shape)  # not where a layer that starts at 0 hides the others
    upstream = random.normal(size=(len(z), d))
    half = len(z) // 2
    whole, part = values_of(function, theta, z, d), values_of(function, theta, z[:half], d)
    if not np.allclose(whole[:half], part, rtol=1e-6, atol=1e-9 * (1 + np.abs(whole).max(initial=0.0))):
        raise OracleError("the function's values of a row depend on the other rows: it would differ between partitions")
    gradient = gradient_of(function, theta, z, upstream)
    for j in sorted(random.choice(len(theta), min(parameters, len(theta)), replace=False)):
        step = np.zeros_like(theta)
        step[j] = 1e-5 * max(1.0, abs(theta[j]))
        rise = values_of(function, theta + step, z, d) - values_of(function, theta - step, z, d)
        expected = float(np.sum(upstream * rise) / (2 * step[j]))
        allowed = tolerance * (max(abs(expected), abs(gradient[j])) + 1e-2 * np.abs(gradient).max() + 1e-6)
        if abs(gradient[j] - expected) > allowed:
            raise OracleError(
                f"the gradient of the function is wrong in parameter {j} of {len(theta)}: "
                f"it says {gradient[j]:.6g}, finite differences of the values {expected:.6g}"
            )


def start_of(function: Differentiable, p: int, d: int, seed: int) -> Array:
    theta = _called("does not start", function.start, p, d, seed)
    return _numbers("start", theta, np.shape(theta)[:1] or (1,))


def values_of(function: Differentiable, theta: Array, attributes: Array, d: int) -> Array:
    if not len(attributes):
        return np.empty((0, d))
    values = _called("has no values", function.values, theta, attributes)
    return _numbers("values", values, (len(attributes), d))


def gradient_of(function: Differentiable, theta: Array, attributes: Array, upstream: Array) -> Array:
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
