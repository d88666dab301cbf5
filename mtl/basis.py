"""The inputs' side of a model: basis functions as an oracle's prediction plus a per-input residual.

Input x has c_x = [o_x, f_1(x) … f_k(x)] = g(z_x) + δ_x with z_x its attributes. g is either linear with its coefficients
integrated out (:class:`mtl.prior.Prior`) or k+1 fitted regressors of any kind (:class:`OracleBasis`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mtl import alternation, gaussian
from mtl.errors import OracleError
from mtl.gaussian import Array, Posterior
from mtl.prior import Moments

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

_ROUNDING = 1e-9  # a refit that is no better than rounding makes it is not worse

log = logging.getLogger("mtl")


class Regressor(Protocol):
    def predict(self, attributes: Array) -> Array:
        """(n, p) → (n,)."""


Oracle = Callable[[Array, Array, Array], Regressor]
"""fit(attributes (n, p), target (n,), weight (n,)) → Regressor: all that an oracle ever is given."""


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

    A refit visits the functions in turn. With the residuals integrated out, the events say of function i at input x

        weight_i(x) = W_x[i,i]      target_i(x) = g_i(x) + (v_x − W_x g(x))_i / W_x[i,i]
        W_x = (I + A_x S/σ²)⁻¹ A_x/σ²      v_x = (I + A_x S/σ²)⁻¹ b_x/σ²

    With S = 0 (no residual) this is the paper's weighted dataset, A_x[i,i]/σ² and (b_x[i] − Σ_l A_x[i,l] f_l)/A_x[i,i].
    A fit that would raise the objective is refused and counted, for an oracle is not always exact.
    """

    oracle: Oracle
    covariance: Array  # S, (d, d); zero where there is no residual
    residual: bool
    functions: tuple[Regressor, ...] = ()
    refused: int = 0
    _known: tuple[Array, Array] | None = field(default=None, repr=False, compare=False)  # attributes, their g

    @classmethod
    def start(cls, oracle: Oracle, d: int, variance: float, residual: bool) -> OracleBasis:
        return cls(oracle, variance * np.eye(d) if residual else np.zeros((d, d)), residual)

    def mean(self, attributes: Array) -> Array:
        """g of attributes (n, p): (n, d); 0 before the first fit."""
        if not self.functions:
            return np.zeros((len(attributes), len(self.covariance)))
        if self._known and self._known[0] is attributes:
            return self._known[1]
        return np.column_stack([_predict(f, attributes, i) for i, f in enumerate(self.functions)])

    def refit(self, precision: Array, information: Array, attributes: Array, noise: float) -> OracleBasis:
        """Every basis function once, each on its weighted dataset given the others.

        Args:
            precision, information: of :func:`mtl.alternation.input_evidence`.
            attributes: (n, p).

        Raises:
            OracleError: the oracle raised, or its predictions are not n finite numbers.
        """
        d = len(self.covariance)
        W, v = integrated_weights(precision, information, self.covariance, noise)
        g, functions, refused = self.mean(attributes).copy(), list(self.functions), self.refused
        for i in range(d):
            weight = W[:, i, i]
            told = weight > 1e-12 * weight.max(initial=0.0)
            if not told.any():
                raise OracleError(f"no event says anything of basis function {i}: are all labels equal?")
            gradient = v - np.einsum("nij,nj->ni", W, g)
            target = g[told, i] + gradient[told, i] / weight[told]
            try:
                candidate = self.oracle(attributes[told], target, weight[told])
            except OracleError:
                raise
            except Exception as error:
                raise OracleError(
                    f"the oracle failed on basis function {i} ({type(error).__name__}: {error})"
                ) from error
            fitted = _predict(candidate, attributes, i)
            before, after = (float(weight[told] @ (target - values[told]) ** 2) for values in (g[:, i], fitted))
            if len(functions) > i and after > before * (1 + _ROUNDING):
                refused += 1
                continue
            g[:, i] = fitted
            functions[i : i + 1] = [candidate]
        return replace(self, functions=tuple(functions), refused=refused, _known=(attributes, g))

    def __getstate__(self) -> dict:
        """Without the oracle and the training inputs: what is stored of a model only predicts."""
        return {**self.__dict__, "oracle": None, "_known": None}


def integrated_weights(precision: Array, information: Array, covariance: Array, noise: float) -> tuple[Array, Array]:
    """W_x (n, d, d) and v_x (n, d) of :class:`OracleBasis`: what the events say of g with the residuals integrated out."""
    d = len(covariance)
    A, b = gaussian.unpack(precision, d) / noise, information / noise
    spread = np.eye(d) + A @ covariance
    return np.linalg.solve(spread, A), np.linalg.solve(spread, b[..., None])[..., 0]


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
