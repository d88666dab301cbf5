"""Small random problems: events of a planted model, as arrays, as blocks of users, and as an engine ready to train."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mtl import gaussian
from mtl.basis import OracleBasis
from mtl.blocks import EventBlock, build
from mtl.engine import LocalEngine
from mtl.forms import Form, partly_given
from mtl.gaussian import Array, Posterior
from mtl.losses import LOSSES
from mtl.prior import Prior, VectorPrior
from mtl.regressors import Oracle
from mtl.train import START_VARIANCE, Fit, Schedule, alternate
from mtl.userstep import Specification


@dataclass(frozen=True)
class Problem:
    """Events (user, input, label, weight) and both sides' attributes, the constant first."""

    user: np.ndarray
    input: np.ndarray
    label: Array
    weight: Array
    user_attributes: Array  # (users, p)
    input_attributes: Array  # (inputs, p)
    expected: Array  # labels without their noise

    def __len__(self) -> int:
        return len(self.label)

    @property
    def mean_label(self) -> float:
        return float(np.average(self.label, weights=self.weight))

    @property
    def label_variance(self) -> float:
        return float(np.average((self.label - self.mean_label) ** 2, weights=self.weight))

    def take(self, events: np.ndarray) -> Problem:
        """The same users and inputs with some of the events."""
        parts = {name: getattr(self, name)[events] for name in ("user", "input", "label", "weight", "expected")}
        return replace(self, **parts)

    def block(self, users: np.ndarray | None = None, role: np.ndarray | None = None) -> EventBlock:
        """The block of some users (all of them by default) with their attributes and events, of these roles."""
        users = np.arange(len(self.user_attributes)) if users is None else users
        mine = np.isin(self.user, users)
        return build(
            user_ids(self.user[mine]),
            self.input[mine],
            self.label[mine],
            self.weight[mine],
            user_ids(users),
            self.user_attributes[users],
            None if role is None else role[mine],
        )

    def specification(self, form: int | Form, loss: str = "squared", seed: int = 0) -> Specification:
        """Of a form, or of one with k learnt basis functions and nothing else."""
        chosen, squares = LOSSES[loss], float(self.weight @ self.label**2)
        mu, spread = chosen.link(self.mean_label), self.spread(loss)
        return Specification(self.input_attributes, as_form(form), chosen, mu, squares, seed, spread=spread)

    def spread(self, loss: str) -> float:
        return (self.label_variance if LOSSES[loss].is_quadratic else 0.0) or 1.0

    def engine(self, form: int | Form, seed: int = 0, partitions: int = 1, loss: str = "squared") -> LocalEngine:
        users = np.arange(len(self.user_attributes))
        parts = [self.block(users[users % partitions == i]) for i in range(partitions)]
        return LocalEngine(parts, self.specification(form, loss, seed))

    def user_prior(self, form: int | Form, loss: str = "squared") -> VectorPrior:
        given = as_form(form).users
        gram = self.user_attributes.T @ self.user_attributes
        return partly_given(Prior.start(gram, len(given.learnt), START_VARIANCE * self.spread(loss)), given)

    def input_prior(
        self, form: int | Form, oracle: Oracle | None = None, residual: bool = True, loss: str = "squared"
    ) -> VectorPrior:
        given = as_form(form).inputs
        gram, d = self.input_attributes.T @ self.input_attributes, len(given.learnt)
        variances = START_VARIANCE * self.specification(form, loss).input_units
        learnt: VectorPrior = Prior.start(gram, d, variances)
        if oracle:
            learnt = OracleBasis.start(oracle, d, variances, residual)
        return partly_given(learnt, given)

    def train(
        self,
        form: int | Form,
        schedule: Schedule,
        oracle: Oracle | None = None,
        residual: bool = True,
        engine: LocalEngine | None = None,
        loss: str = "squared",
    ) -> Fit:
        return alternate(
            engine or self.engine(form, loss=loss),
            self.user_prior(form, loss),
            self.input_prior(form, oracle, residual, loss),
            LOSSES[loss],
            len(self),
            self.label_variance,
            schedule,
        )


def as_form(form: int | Form) -> Form:
    return Form(form) if isinstance(form, int) else form


def planted(
    seed: int,
    users: int = 12,
    inputs: int = 10,
    k: int = 2,
    events: int = 80,
    noise: float = 0.3,
    attributes: int = 2,
    weighted: bool = True,
) -> Problem:
    """Events drawn with repetition from y = o_x + b_u + p_u·q_x + noise/√c, attributes telling half of every vector.

    Args:
        noise: standard deviation of the noise at weight 1, label units.
        attributes: of each side, beside the constant.
        weighted: weights between 1/4 and 4 instead of 1.
    """
    random = np.random.default_rng(seed)
    z_u, z_x = (np.column_stack([np.ones(n), random.normal(size=(n, attributes))]) for n in (users, inputs))
    w, c = (
        z @ random.normal(size=(attributes + 1, k + 1)) / np.sqrt(attributes + 1) + random.normal(size=(len(z), k + 1))
        for z in (z_u, z_x)
    )
    user, input = random.integers(users, size=events), random.integers(inputs, size=events)
    weight = np.exp2(random.uniform(-2, 2, events)) if weighted else np.ones(events)
    expected = 3 + w[user, 0] + c[input, 0] + np.sum(w[user, 1:] * c[input, 1:], axis=1)
    label = expected + noise * random.normal(size=events) / np.sqrt(weight)
    return Problem(user, input, label, weight, z_u, z_x, expected)


def gaussians(seed: int, n: int, d: int) -> Posterior:
    """n random Gaussians of dimension d, none of their covariances near diagonal or singular."""
    random = np.random.default_rng(seed)
    covariance = definite(seed, n, d) / (d + 1)
    return Posterior(random.normal(size=(n, d)), gaussian.pack(covariance), np.linalg.slogdet(covariance)[1])


def certain(mean: Array) -> Posterior:
    """Vectors (n, d) known exactly."""
    n, d = mean.shape
    return Posterior(mean, np.zeros((n, gaussian.packed_length(d))), np.full(n, -np.inf))


def definite(seed: int, n: int, d: int) -> Array:
    """n random positive definite matrices, (n, d, d), their condition below about a thousand."""
    root = np.random.default_rng([seed, 1]).normal(size=(n, d, d + 2))
    return root @ root.transpose(0, 2, 1) / d + 0.1 * np.eye(d)


def user_ids(users: np.ndarray) -> pa.Array:
    return pa.array([f"u{i}" for i in users], pa.string())
