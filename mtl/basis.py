"""The inputs' side of a model: basis functions as an oracle's prediction plus a per-input residual.

Input x has c_x = [o_x, f_1(x) … f_k(x)] = g(z_x) + δ_x with z_x its attributes. g is either linear with its coefficients
integrated out (:class:`mtl.prior.Prior`) or k+1 fitted regressors of any kind (:class:`OracleBasis`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mtl import alternation, gaussian
from mtl.errors import OracleError
from mtl.gaussian import Array, Posterior
from mtl.prior import Moments
from mtl.regressors import Linear, Oracle, Regressor, combine

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

_ROUNDING = 1e-9  # of the weighted error: a gain by less is none
_TOLD = 1e-12  # of the largest weight: less is no evidence

FitAll = Callable[[Oracle, Array, Array, Array, list[int]], "list[tuple[Regressor, Array]]"]
"""(oracle, attributes (n, p), target (n, m), weight (n, m), which m functions these are) → m answers of :func:`fit_one`."""


class Strategy(Protocol):
    """What an oracle is asked for, and what is done with its answer; f is the function so far, r = gradient/weight."""

    def target(self, current: Array, newton: Array) -> Array:
        """f(z) and r, (n,) both → what is to be fitted."""

    def direction(self, current: Array, fitted: Array) -> Array:
        """f(z) and the oracle's predictions → where f is to move."""

    def moved(self, function: Regressor, fitted: Regressor, step: float) -> Regressor:
        """f after ``step`` of that direction."""


@dataclass(frozen=True)
class Refitting:
    """f ← the oracle's fit to f + r, the minimizer given the other functions."""

    def target(self, current: Array, newton: Array) -> Array:
        return current + newton

    def direction(self, current: Array, fitted: Array) -> Array:
        return fitted - current

    def moved(self, function: Regressor, fitted: Regressor, step: float) -> Regressor:
        return fitted if step == 1.0 else combine([(1 - step, function), (step, fitted)])


@dataclass(frozen=True)
class Boosting:
    """f ← f + ν·(the oracle's fit to r): a round of boosting per refit. Functions grow by one stage each time."""

    shrinkage: float  # ν

    def target(self, current: Array, newton: Array) -> Array:
        return newton

    def direction(self, current: Array, fitted: Array) -> Array:
        return self.shrinkage * fitted

    def moved(self, function: Regressor, fitted: Regressor, step: float) -> Regressor:
        return combine([(1.0, function), (step * self.shrinkage, fitted)])


class FittedBasis:
    """c_x ~ N(g(z_x), S) with g fitted, or c_x = g(z_x) exactly where there is no residual: all but g and how it is refitted.

    A frozen dataclass with these fields derives from it.
    """

    covariance: Array  # S, (d, d); zero where there is no residual
    residual: bool
    refused: int  # fits that would have raised the objective

    def mean(self, attributes: Array) -> Array:
        """g of attributes (n, p): (n, d)."""
        raise NotImplementedError

    @property
    def counts(self) -> dict[str, int]:
        return {"refused_oracle_steps": self.refused}

    def posteriors(self, precision: Array, information: Array, attributes: Array, noise: float) -> Posterior:
        return self.conditional(precision, information, self.mean(attributes), noise)

    def conditional(self, precision: Array, information: Array, mean: Array, noise: float) -> Posterior:
        if not self.residual:
            return Posterior(mean, np.zeros_like(precision), np.zeros(len(mean)))
        return alternation.posteriors(precision, information, mean, np.linalg.inv(self.covariance), noise)

    def conditional_mean(self, precision: Array, information: Array, mean: Array, noise: float) -> Array:
        if not self.residual:
            return mean
        return alternation.means(precision, information, mean, np.linalg.inv(self.covariance), noise)

    def moments(self, inputs: Posterior, attributes: Array) -> Moments:
        residual = inputs._replace(mean=inputs.mean - self.mean(attributes))
        return Moments.of(residual, np.empty((len(attributes), 0)))

    def learn(self, moments: Moments) -> Self:
        return replace(self, covariance=moments.second / moments.n) if self.residual else self  # type: ignore[type-var]

    def divergence(self, moments: Moments) -> float:
        if not self.residual:
            return 0.0
        d = len(self.covariance)
        log_determinant = moments.n * (np.linalg.slogdet(self.covariance)[1] - d) - moments.log_determinant
        return float(log_determinant + np.sum(np.linalg.inv(self.covariance) * moments.second)) / 2


@dataclass(frozen=True)
class OracleBasis(FittedBasis):
    """c_x ~ N(g(z_x), S) with g_0 … g_k fitted by an oracle, or c_x = g(z_x) exactly where there is no residual.

    With the residuals integrated out, the events say of g, up to a constant, and of function i at input x

        Q(g) = Σ_x ½ g(x)ᵀ W_x g(x) − v_xᵀ g(x)
        weight_i(x) = W_x[i,i]      gradient_i(x) = (v_x − W_x g(x))_i      target_i(x) = g_i(x) + gradient_i/weight_i
        W_x = (I + A_x S/σ²)⁻¹ A_x/σ²      v_x = (I + A_x S/σ²)⁻¹ b_x/σ²

    With S = 0 (no residual) this is the paper's weighted dataset, A_x[i,i]/σ² and (b_x[i] − Σ_l A_x[i,l] f_l)/A_x[i,i].

    A refit visits the functions in turn, each given the others as they are then (Gauss-Seidel). With ``fit_all`` all are
    fitted at once, given the others as they were (Jacobi), and accepted in turn. An oracle is not always exact, and Jacobi's
    targets are stale, so a function moves by s ∈ (0, 1] of the proposed direction δ, where the best s is that of Q,

        s* = Σ_x gradient_i δ / Σ_x weight_i δ²

    s = 1 where that gains at least half of what s* does. Steps with s < 1 are counted as damped. Where no step gains, the
    fit is refused and counted. So Q never rises.
    """

    oracle: Oracle
    covariance: Array  # S, (d, d); zero where there is no residual
    residual: bool
    functions: tuple[Regressor, ...] = ()
    refused: int = 0
    damped: int = 0
    strategy: Strategy = field(default=Refitting(), repr=False)
    fit_all: FitAll | None = field(default=None, repr=False)
    _known: tuple[Array, Array] | None = field(default=None, repr=False, compare=False)  # attributes, their g

    @classmethod
    def start(
        cls,
        oracle: Oracle,
        d: int,
        variance: float | Array,
        residual: bool,
        strategy: Strategy | None = None,
        fit_all: FitAll | None = None,
    ) -> OracleBasis:
        covariance = variance * np.eye(d) if residual else np.zeros((d, d))
        return cls(oracle, covariance, residual, strategy=strategy or Refitting(), fit_all=fit_all)

    def mean(self, attributes: Array) -> Array:
        """g of attributes (n, p): (n, d); 0 before the first fit."""
        if not self.functions:
            return np.zeros((len(attributes), len(self.covariance)))
        if self._known and self._known[0] is attributes:
            return self._known[1]
        return np.column_stack([_predict(f, attributes, i) for i, f in enumerate(self.functions)])

    def refit(self, precision: Array, information: Array, attributes: Array, noise: float) -> OracleBasis:
        """Every basis function that the events say something of once, each on its weighted dataset.

        Args:
            precision, information: of :func:`mtl.alternation.input_evidence`.
            attributes: (n, p).

        Raises:
            OracleError: the oracle raised, its predictions are not n finite numbers, or no event says anything.
        """
        d = len(self.covariance)
        W, v = integrated_weights(precision, information, self.covariance, noise)
        g = self.mean(attributes).copy()
        functions = list(self.functions or d * [Linear(np.zeros(attributes.shape[1]))])
        refused, damped = self.refused, self.damped
        weight = _weights(W)
        check_told(weight)
        told = np.flatnonzero(weight.any(axis=0)).tolist()

        def gradient(i: int) -> Array:
            return v[:, i] - np.einsum("nj,nj->n", W[:, i], g)

        def target(i: int) -> Array:
            newton = np.divide(gradient(i), weight[:, i], out=np.zeros(len(g)), where=weight[:, i] > 0)
            return self.strategy.target(g[:, i], newton)

        proposals = {}
        if self.fit_all is not None and len(told) > 1:
            targets = np.column_stack([target(i) for i in told])
            fits = self.fit_all(self.oracle, attributes, targets, weight[:, told], told)
            proposals = dict(zip(told, fits, strict=True))
        for i in told:
            fitted, values = proposals.get(i) or fit_one(self.oracle, attributes, target(i), weight[:, i], i)
            direction = self.strategy.direction(g[:, i], values)
            step = _step(weight[:, i], gradient(i), direction)
            refused += step == 0
            damped += 0 < step < 1
            if step:
                g[:, i] += step * direction
                functions[i] = self.strategy.moved(functions[i], fitted, step)
        return replace(self, functions=tuple(functions), refused=refused, damped=damped, _known=(attributes, g))

    def __getstate__(self) -> dict:
        """Without the oracle and the training inputs: what is stored of a model only predicts."""
        return {**self.__dict__, "oracle": None, "fit_all": None, "_known": None}

    @property
    def counts(self) -> dict[str, int]:
        return {"damped_oracle_steps": self.damped, "refused_oracle_steps": self.refused}


def integrated_weights(precision: Array, information: Array, covariance: Array, noise: float) -> tuple[Array, Array]:
    """W_x (n, d, d) and v_x (n, d) of :class:`OracleBasis`: what the events say of g with the residuals integrated out."""
    d = len(covariance)
    A, b = gaussian.unpack(precision, d) / noise, information / noise
    spread = np.eye(d) + A @ covariance
    return np.linalg.solve(spread, A), np.linalg.solve(spread, b[..., None])[..., 0]


def fit_one(oracle: Oracle, attributes: Array, target: Array, weight: Array, i: int) -> tuple[Regressor, Array]:
    """Basis function i fitted to the rows of positive weight, and its predictions for all, (n,).

    Raises:
        OracleError: the oracle raised, or its predictions are not n finite numbers.
    """
    told = weight > 0
    try:
        function = oracle(attributes[told], target[told], weight[told])
    except OracleError:
        raise
    except Exception as error:
        raise OracleError(f"the oracle failed on basis function {i} ({type(error).__name__}: {error})") from error
    return function, _predict(function, attributes, i)


def _weights(W: Array) -> Array:
    """W_x[i,i] (n, d), with 0 for what says nothing."""
    weight = np.einsum("nii->ni", W).copy()
    weight[weight <= _TOLD * weight.max(axis=0, initial=0.0)] = 0.0
    return weight


def check_told(told: np.ndarray) -> None:
    """
    Args:
        told: how much the events say of each basis function, or beside it of each input. Of some functions that may be
            nothing: of one that users have by an attribute, such as a category, that no user has.

    Raises:
        OracleError: none.
    """
    if not np.any(told):
        raise OracleError("no event says anything of any basis function: are all labels equal?")


def _step(weight: Array, gradient: Array, direction: Array) -> float:
    """How far to go, in (0, 1], from the exact line search on Q; 0 where no step gains."""
    told = weight > 0
    weight, gradient, direction = weight[told], gradient[told], direction[told]
    rounding = _ROUNDING * float(gradient @ (gradient / weight))  # of Σ weight (target − g)²
    return line_search(float(gradient @ direction), float(weight @ direction**2), rounding)


def line_search(slope: float, curvature: float, rounding: float = 0.0) -> float:
    """The step s in (0, 1] of which a sum of squares loses 2 s slope − s² curvature; 0 where none gains.

    A whole one is taken where it gains at least half of what the best would.

    Args:
        rounding: of that sum: a gain by less is none.
    """
    whole = 2 * slope - curvature
    best = slope**2 / curvature if slope > 0 and curvature > 0 else 0.0
    if whole >= -rounding and whole >= best / 2 - rounding:
        return 1.0
    return min(1.0, slope / curvature) if best > rounding else 0.0


def _predict(function: Regressor, attributes: Array, i: int) -> Array:
    if not len(attributes):
        return np.empty(0)  # scikit-learn refuses to predict nothing
    try:
        values = np.asarray(function.predict(attributes), float)
    except Exception as error:
        raise OracleError(
            f"the oracle of basis function {i} cannot predict ({type(error).__name__}: {error})"
        ) from error
    if values.shape != (len(attributes),):
        raise OracleError(
            f"the oracle of basis function {i} returned shape {values.shape} for {len(attributes)} rows: one number a row is wanted"
        )
    if not np.isfinite(values).all():
        raise OracleError(
            f"the oracle of basis function {i} returned {np.sum(~np.isfinite(values))} values that are not finite"
        )
    return values
