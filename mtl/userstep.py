"""The users' half-step where their events are: what is trained, what a block of users is sent, and what it says back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from mtl import alternation, blocks, gaussian
from mtl.alternation import Extended, InputSums
from mtl.blocks import EventBlock
from mtl.earlier import Evidence
from mtl.effects import Effects, Offsets, part_of
from mtl.features import Features
from mtl.forms import Form
from mtl.gaussian import Array, Posterior
from mtl.losses import Loss
from mtl.prior import Moments, VectorPrior
from mtl.working import added, beliefs, means
from mtl.zeros import WithZeros, zeros_of

_START_SCALE = 0.3  # standard deviation of the random start of the factors
_START_VARIANCE = 0.1  # of inputs before anything is learnt, in units of Specification.input_units
_START_CHUNK = 1024  # inputs that share one random stream
# Of the matrices of users whose posteriors are held at once: larger arrays get their memory from the system anew each time,
# which costs as much as what is done with it.
_BYTES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Known:
    """Inputs that training begins from instead of at random."""

    places: np.ndarray  # catalogue indices, sorted, (m,)
    vectors: Posterior  # (m, d)


@dataclass(frozen=True)
class Specification:
    """What is trained, beside the users' events."""

    attributes: Array  # of all inputs, (inputs, p)
    form: Form
    loss: Loss
    mu: float  # μ, the link of the mean label less the mean offset, or that of the version begun from
    squared_labels: float  # Σ c y² over the events that are trained on
    seed: int = 0
    known: Known | None = None
    precision: str = "double"  # of products and exchanged sums in passes: double or single
    zero_weight: float = 0.0  # w₀ of the zero of every pair of a user and an input (mtl.zeros)
    effects: Effects = ()  # of the events' contexts, to start from
    earlier: Evidence | None = None  # what earlier events said of all inputs
    spread: float = 1.0  # squared units of h: the labels' variance where h is in their units

    @property
    def input_units(self) -> Array:
        """Squared units of what is learnt of an input: those of h, but of factors, whose units users' weights have, 1."""
        units = np.full(self.form.d, self.spread)
        units[1 : 1 + self.form.k] = 1.0
        return units[self.form.inputs.learnt]

    @property
    def rounding(self) -> float:
        """Of the objective, by the precision of passes."""
        return 1e-9 if self.precision == "double" else 1e-6

    def start(self, first: int, n: int) -> Posterior:
        """The inputs ``first`` … ``first + n`` before anything is learnt, whoever holds them.

        Offset 0 and random factors, but for those that are known from an earlier version.
        """
        chunks = range(first // _START_CHUNK, (first + n - 1) // _START_CHUNK + 1)
        shape = (_START_CHUNK, self.form.k)
        drawn = [np.random.default_rng([self.seed, chunk]).normal(scale=_START_SCALE, size=shape) for chunk in chunks]
        skip, given = first % _START_CHUNK, self.form.inputs
        d = len(given.learnt)
        mean = np.zeros((n, d))
        mean[:, 1 : 1 + self.form.k] = np.concatenate(drawn)[skip : skip + n]
        variances = _START_VARIANCE * self.input_units
        covariance = np.tile(gaussian.pack(np.diag(variances)), (n, 1))
        learnt = Posterior(mean, covariance, np.full(n, np.log(variances).sum()))
        start = given.whole(learnt, given.of(self.attributes[first : first + n]))
        if self.known is not None:
            within = slice(*np.searchsorted(self.known.places, [first, first + n]))
            for values, known in zip(start, self.known.vectors, strict=True):
                values[self.known.places[within] - first] = known[within]
        return start


@dataclass(frozen=True)
class BlockSums:
    """What one block of users says: (A_x, b_x) for the inputs it saw, its users' moments and its part of the loss."""

    seen: np.ndarray  # catalogue indices, sorted
    sums: InputSums
    moments: Moments
    constant: float  # what the deviance has beside what the sums give
    held_out: float  # summed surprise of the events held out
    zeros: Array | None = None  # what zeros of weight 1 of its users say to every input, where there are any
    earlier: float = 0.0  # energy of what earlier events said of its users
    effect: tuple[Array, Array] | None = None  # of the effect that is measured: what :meth:`Effect.learn` takes


@dataclass(frozen=True)
class UserStep:
    """What a partition needs for its half-step: the part of a pass that is sent to the workers."""

    features: Features
    prior: VectorPrior
    noise: float
    loss: Loss
    mu: float
    step: float = 1.0  # how far working values move to their new ones
    effects: Effects = ()
    measured: int | None = None  # the effect that the events are to say something of

    def __call__(self, block: EventBlock) -> tuple[EventBlock, BlockSums]:
        """The users' posteriors and what they say to the inputs; the block with new working values, where it has any."""
        features = self.features.take(block.inputs)
        dtype = features.phi.dtype  # of the products and of what is sent, not of what is solved
        sums = InputSums.zeros(len(block.inputs), features.phi.shape[1], dtype)
        moments, constant, held_out, energy = [], 0.0, 0.0, 0.0
        zeros = np.zeros(sums.second.shape[1]) if isinstance(self.prior, WithZeros) else None
        block = self._started(block)
        precision, information = (block.weights, block.labels) if self.loss.is_quadratic else _copies(block)
        apart = block.of_role(blocks.HELD_OUT) if block.has(blocks.HELD_OUT) else None
        offsets = block.offsets(self.effects)
        fitted = np.empty(len(block.places) if self.measured is not None else 0)  # o + w·φ of every entry
        for users in block.parts():
            weights, labels = self._matrices(block, users, precision, information, offsets, dtype)
            a, b = alternation.user_sums(weights, labels, features)
            extended = Extended.empty(len(a), b.shape[1], dtype)
            for part in gaussian.parts(len(a), b.shape[1], _BYTES_AT_ONCE):
                few = slice(users.start + part.start, users.start + part.stop)
                attributes, entries = block.attributes[few], block.entries(few)
                posteriors, of_earlier = self._posteriors(block, few, a[part].astype(float), b[part].astype(float))
                energy += of_earlier
                moments.append(self.prior.moments(posteriors, attributes))
                for values, of_few in zip(extended, Extended.of(posteriors, dtype), strict=True):
                    values[part] = of_few
                if zeros is not None:
                    zeros += zeros_of(posteriors)
                if apart is not None:
                    held_out += self._surprise(apart, few, posteriors, features)
                if self.measured is not None:
                    fitted[entries] = means(weights[part], posteriors, features)
                if not self.loss.is_quadratic:
                    believed = added(beliefs(weights[part], posteriors, features), part_of(offsets, entries))
                    events = *believed, block.weights[entries], block.labels[entries]
                    constant += self._rework(events, precision[entries], information[entries])
            if self.measured is not None:
                continue
            if not self.loss.is_quadratic:
                weights, labels = self._matrices(block, users, precision, information, offsets)
            said = alternation.input_sums(weights, labels, extended)
            sums.second[:] += said.second
            sums.first[:] += said.first
        if not self.loss.is_quadratic:
            block = replace(block, precision=precision, information=information)
        effect = None
        if offsets is not None:
            mean, variance = offsets
            constant += float(precision @ (mean**2 + variance) - 2 * information @ mean)
            if self.measured is not None:
                effect = self._effect(block, precision, information - precision * (fitted + mean))
        return block, BlockSums(
            block.inputs, sums, sum(moments[1:], moments[0]), constant, held_out, zeros, energy, effect
        )

    def _posteriors(self, block: EventBlock, users: slice, a: Array, b: Array) -> tuple[Posterior, float]:
        """Of some users by their sums and what earlier events said of them; and the energy of that."""
        attributes = block.attributes[users]
        if block.earlier is None:
            return self.prior.posteriors(a, b, attributes, self.noise), 0.0
        earlier = block.earlier.take(users)
        posteriors = self.prior.posteriors(*earlier.beside(a, b, self.noise), attributes, self.noise)
        return posteriors, earlier.energy(posteriors)

    def _matrices(
        self,
        block: EventBlock,
        users: slice,
        precision: Array,
        information: Array,
        offsets: Offsets | None,
        dtype: Any = np.float64,
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """What enters the sums of some users: working values of what is left of h without the offsets."""
        if offsets is not None:
            information = information - precision * offsets.mean
        precision, information = (values.astype(dtype, copy=False) for values in (precision, information))
        return block.matrix(precision)[users], block.matrix(information)[users]

    def _effect(self, block: EventBlock, precision: Array, residual: Array) -> tuple[Array, Array]:
        """What the entries say of the measured effect: Σ c and Σ c (z − rest of h) of each of its values.

        Args:
            residual: c (z − h) of each entry.
        """
        assert block.contexts is not None
        assert self.measured is not None
        # Without entries a block has forgotten how many contexts there are.
        effect, code = self.effects[self.measured], block.contexts.reshape(-1, len(self.effects))[:, self.measured]
        rest = residual + precision * effect.mean[code]

        def of_values(values: Array) -> Array:
            return np.bincount(code + 1, values, len(effect.mean))[1:].astype(float)  # the first are of no value

        return of_values(precision), of_values(rest)

    def _rework(self, events: tuple[Array, ...], precision: Array, information: Array) -> float:
        """Move the events' working values, in place; what the deviance has beside what sums of these give.

        Args:
            events: mean and variance of h, weights and weighted labels.
        """
        for values, fresh in zip((precision, information), self.loss.working(*events), strict=True):
            values += self.step * (fresh - values)
        mean, variance, *_ = events
        surrogate = precision @ (mean**2 + variance) - 2 * information @ mean
        return 2 * float(self.loss.expected(*events).sum()) - float(surrogate)

    def _surprise(self, held_out: EventBlock, users: slice, posteriors: Posterior, features: Features) -> float:
        """Of the events held out, under what the users know of the others."""
        entries = held_out.entries(users)
        believed = beliefs(held_out.weight_matrix[users], posteriors, features)
        believed = added(believed, part_of(held_out.offsets(self.effects), entries))
        return float(self.loss.surprise(*believed, held_out.weights[entries], held_out.labels[entries]).sum())

    def _started(self, block: EventBlock) -> EventBlock:
        """With working values to begin from."""
        if self.loss.is_quadratic or block.precision is not None:
            return block
        offsets = block.offsets(self.effects)
        h = np.full(len(block.weights), self.mu) + (0.0 if offsets is None else offsets.mean)
        belief = self.loss.start(block.weights, block.labels, self.loss.response(h, np.zeros_like(h)))
        precision, information = self.loss.working(*belief, block.weights, block.labels)
        return replace(block, precision=precision, information=information)


def _copies(block: EventBlock) -> tuple[Array, Array]:
    assert block.precision is not None
    assert block.information is not None
    return block.precision.copy(), block.information.copy()
