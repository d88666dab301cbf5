"""Where the two sides of the alternation live and how they exchange sums.

The trainer (:mod:`mtl.train`) sees priors, moments and one number for the loss; an engine holds users, inputs and
what passes between them. :class:`LocalEngine` keeps all in this process, :class:`SparkEngine` the users' events in
Spark partitions and the inputs on the driver; `mtl.distributed` keeps both in Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession

from mtl import alternation, blocks, gaussian
from mtl.alternation import InputSums
from mtl.blocks import EventBlock
from mtl.features import Features
from mtl.forms import Form
from mtl.gaussian import Array, Posterior
from mtl.losses import Loss
from mtl.prior import Moments, VectorPrior
from mtl.working import beliefs
from mtl.zeros import WithZeros, zeros_of

_START_SCALE = 0.3  # standard deviation of the random start of the factors
_START_VARIANCE = 0.1
_START_CHUNK = 1024  # inputs that share one random stream

_ADAPTIVE = "spark.sql.adaptive.enabled"

_SUMS = pa.schema([(name, pa.binary()) for name in ("seen", "second", "first", "rest")])
_STATE = pa.schema([field for field in blocks.ARROW_SCHEMA if field.name != "users"])


FeatureWork = Callable[[int, Posterior, Array], pa.Table]
"""(first catalogue index, posteriors, attributes) of a run of inputs → rows."""

UserWork = Callable[[EventBlock, Features, Any], Iterator[pa.Table]]
"""(block, features of the inputs it saw, arguments) → rows."""


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
    mu: float  # μ, the link of the mean label
    squared_labels: float  # Σ c y² over the events that are trained on
    seed: int = 0
    known: Known | None = None
    precision: str = "double"  # of products and exchanged sums in passes: double or single
    zero_weight: float = 0.0  # w₀ of the zero of every pair of a user and an input (mtl.zeros)

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
        covariance = np.tile(gaussian.pack(_START_VARIANCE * np.eye(d)), (n, 1))
        learnt = Posterior(mean, covariance, np.full(n, d * np.log(_START_VARIANCE)))
        start = given.whole(learnt, given.of(self.attributes[first : first + n]))
        if self.known is not None:
            within = slice(*np.searchsorted(self.known.places, [first, first + n]))
            for values, known in zip(start, self.known.vectors, strict=True):
                values[self.known.places[within] - first] = known[within]
        return start


class Engine(Protocol):
    def update_users(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        """Users' posteriors given the inputs': their moments, and the deviance after the step.

        The deviance is Σ c E[(y − h)²] for squared loss, and twice the expected loss for another.
        """

    def update_inputs(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        """Inputs' posteriors given the users': their moments, and the deviance after the step."""

    def refit(self, prior: VectorPrior, noise: float) -> VectorPrior:
        """The inputs' prior with its oracle fitted to what the users' posteriors say."""

    inputs: Posterior
    """The inputs' posteriors, (inputs, d)."""

    rounding: float
    """Of the objective: a rise by less is none."""

    held_out: float
    """Summed surprise of the events held out, after the last users' half-step."""

    def snapshot(self) -> Any:
        """All that the steps change, for :meth:`restore`."""

    def restore(self, snapshot: Any) -> None: ...


@dataclass(frozen=True)
class BlockSums:
    """What one block of users says: (A_x, b_x) for the inputs it saw, its users' moments and its part of the loss."""

    seen: np.ndarray  # catalogue indices, sorted
    sums: InputSums
    moments: Moments
    constant: float  # what the deviance has beside what the sums give
    held_out: float  # summed surprise of the events held out
    zeros: Array | None = None  # what zeros of weight 1 of its users say to every input, where there are any


@dataclass(frozen=True)
class UserStep:
    """What a partition needs for its half-step: the part of a pass that is sent to the workers."""

    features: Features
    prior: VectorPrior
    noise: float
    loss: Loss
    mu: float
    step: float = 1.0  # how far working values move to their new ones

    def __call__(self, block: EventBlock) -> tuple[EventBlock, BlockSums]:
        """The users' posteriors and what they say to the inputs; the block with new working values, where it has any."""
        features = self.features.take(block.inputs)
        dtype = features.phi.dtype  # of the products and of what is sent, not of what is solved
        sums = InputSums.zeros(len(block.inputs), features.phi.shape[1], dtype)
        moments, constant, held_out = [], 0.0, 0.0
        zeros = np.zeros(sums.second.shape[1]) if isinstance(self.prior, WithZeros) else None
        block = self._started(block)
        precision, information = (block.weights, block.labels) if self.loss.is_quadratic else _copies(block)
        for users in block.parts():
            attributes, entries = block.attributes[users], block.entries(users)
            weights, labels = (
                block.matrix(values.astype(dtype, copy=False))[users] for values in (precision, information)
            )
            a, b = (of_users.astype(float, copy=False) for of_users in alternation.user_sums(weights, labels, features))
            posteriors = self.prior.posteriors(a, b, attributes, self.noise)
            moments.append(self.prior.moments(posteriors, attributes))
            if not self.loss.is_quadratic:
                mean, variance = beliefs(weights, posteriors, features)
                events = mean, variance, block.weights[entries], block.labels[entries]
                for values, fresh in zip((precision, information), self.loss.working(*events), strict=True):
                    values[entries] += self.step * (fresh - values[entries])
                surrogate = precision[entries] @ (mean**2 + variance) - 2 * information[entries] @ mean
                constant += 2 * float(self.loss.expected(*events).sum()) - float(surrogate)
                weights, labels = (block.matrix(values)[users] for values in (precision, information))
            if block.extra is not None:
                held_out += self._surprise(block, users, posteriors, features)
            said = alternation.input_sums(weights, labels, posteriors)
            sums.second[:] += said.second
            sums.first[:] += said.first
            if zeros is not None:
                zeros += zeros_of(posteriors)
        if not self.loss.is_quadratic:
            block = replace(block, precision=precision, information=information)
        return block, BlockSums(block.inputs, sums, sum(moments[1:], moments[0]), constant, held_out, zeros)

    def _surprise(self, block: EventBlock, users: slice, posteriors: Posterior, features: Features) -> float:
        """Of the events held out, under what the users know of the others."""
        extra = block.extra
        assert extra is not None
        pattern = extra.matrix(extra.weights, (len(block), len(block.inputs)))[users]
        entries = slice(int(extra.starts[users.start]), int(extra.starts[users.stop]))
        events = *beliefs(pattern, posteriors, features), extra.weights[entries], extra.labels[entries]
        return float(self.loss.surprise(*events) @ (extra.roles[entries] == blocks.HELD_OUT))

    def _started(self, block: EventBlock) -> EventBlock:
        """With working values to begin from."""
        if self.loss.is_quadratic or block.precision is not None:
            return block
        mean_label = float(self.loss.response(np.array(self.mu), np.array(0.0)))
        belief = self.loss.start(block.weights, block.labels, mean_label)
        precision, information = self.loss.working(*belief, block.weights, block.labels)
        return replace(block, precision=precision, information=information)


def _copies(block: EventBlock) -> tuple[Array, Array]:
    assert block.precision is not None
    assert block.information is not None
    return block.precision.copy(), block.information.copy()


class LocalEngine:
    """Everything in this process.

    Args:
        partitions: the users' events.
        specification: what is trained.
    """

    def __init__(self, partitions: Iterable[EventBlock], specification: Specification):
        self.partitions = list(partitions)
        self.specification, self.rounding = specification, specification.rounding
        self.inputs = specification.start(0, len(specification.attributes))
        self.sums = InputSums.zeros(*self.inputs.mean.shape)
        self.constant = self.held_out = 0.0
        self.applied = self._evidence()  # what the inputs' posteriors were computed from

    @property
    def features(self) -> Features:
        return Features.of(self.inputs.mean, self.inputs.covariance, self.specification.mu)

    def update_users(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        of = self.specification
        self.sums = InputSums.zeros(*self.inputs.mean.shape)
        self.constant = of.squared_labels if of.loss.is_quadratic else 0.0
        self.held_out = 0.0
        moments, zeros = [], np.zeros(self.sums.second.shape[1])
        features = self.features
        if of.zero_weight:
            prior = WithZeros.of(prior, features, of.zero_weight)
        work = UserStep(features.astype(of.precision), prior, noise, of.loss, of.mu, step)
        for said in self.each_block(work):
            self.sums.second[said.seen] += said.sums.second
            self.sums.first[said.seen] += said.sums.first
            self.constant += said.constant
            self.held_out += said.held_out
            moments.append(said.moments)
            zeros += 0.0 if said.zeros is None else said.zeros
        if of.zero_weight:
            self.sums.second[:] += of.zero_weight * zeros
        return sum(moments[1:], moments[0]), self._deviance()

    def update_inputs(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        attributes = self.specification.attributes
        precision, information = self._evidence()
        if step < 1.0:
            before = self.applied
            precision, information = (
                old + step * (new - old) for old, new in zip(before, (precision, information), strict=True)
            )
        self.applied = precision, information
        self.inputs = prior.posteriors(precision, information, attributes, noise)
        return prior.moments(self.inputs, attributes), self._deviance()

    def refit(self, prior: VectorPrior, noise: float) -> VectorPrior:
        return prior.refit(*self._evidence(), self.specification.attributes, noise)

    def train_on_all(self, squared_labels: float) -> None:
        """Begin again with the events held out among those that are trained on, all of whose Σ c y² is given."""
        self.specification = replace(self.specification, squared_labels=squared_labels)
        self.inputs = self.specification.start(0, len(self.specification.attributes))
        self.partitions = [block.with_extra(blocks.HELD_OUT) for block in self.partitions]

    def gram(self) -> Array:
        """Σ z zᵀ over all inputs, (p, p)."""
        attributes = self.specification.attributes
        return attributes.T @ attributes

    def snapshot(self) -> Any:
        return self.inputs, self.applied, self.sums, self.constant, self.partitions

    def restore(self, snapshot: Any) -> None:
        self.inputs, self.applied, self.sums, self.constant, self.partitions = snapshot

    def each_block(self, step: UserStep) -> Iterator[BlockSums]:
        stepped = [step(block) for block in self.partitions]
        self.partitions = [block for block, _ in stepped]
        return (said for _, said in stepped)

    def _evidence(self) -> tuple[Array, Array]:
        return alternation.input_evidence(self.sums, self.specification.mu)

    def _deviance(self) -> float:
        return self.constant + alternation.squared_error(self.sums, self.inputs, self.specification.mu)


class SparkEngine(LocalEngine):
    """The users' events in Spark, the inputs on the driver; per pass a broadcast out and one row a block back.

    Under another loss than the squared one a pass also leaves the blocks' working values, persisted where the blocks are.

    Args:
        rows: persisted rows of :data:`mtl.blocks.ARROW_SCHEMA`.
        specification: what is trained.
    """

    def __init__(self, rows: DataFrame, specification: Specification):
        super().__init__((), specification)
        self.rows = rows
        self.state = rows.drop("users")
        self.persisted: list[DataFrame] = []  # states of passes, the last one in use

    def train_on_all(self, squared_labels: float) -> None:
        super().train_on_all(squared_labels)
        self._unpersist(self.persisted)

        def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for block in blocks.from_arrow(batches):
                yield blocks.to_arrow(block.with_extra(blocks.HELD_OUT)).drop_columns(["users"])

        whole = self.rows.mapInArrow(partition, ", ".join(f"{name} binary" for name in _STATE.names))
        self.state = whole.persist(StorageLevel.MEMORY_AND_DISK)
        self.persisted = [self.state]

    def snapshot(self) -> Any:
        self._unpersist(self.persisted[:-1])
        return super().snapshot(), self.state, self.persisted

    def restore(self, snapshot: Any) -> None:
        local, self.state, persisted = snapshot
        self._unpersist(self.persisted[len(persisted) :])
        super().restore(local)

    def close(self) -> None:
        """Give back what is persisted, the rows included."""
        self._unpersist([*self.persisted, self.rows])

    def _unpersist(self, frames: list[DataFrame]) -> None:
        for frame in frames:
            frame.unpersist()
        self.persisted = [frame for frame in self.persisted if frame not in frames]

    def each_block(self, step: UserStep) -> Iterator[BlockSums]:
        keep = not step.loss.is_quadratic
        broadcast = self.rows.sparkSession.sparkContext.broadcast(step)
        columns = [*_SUMS.names, *(_STATE.names if keep else ())]
        passed = self.state.mapInArrow(_step_in_arrow(broadcast, keep), ", ".join(f"{name} binary" for name in columns))
        with _not_adapted(self.rows.sparkSession):
            if keep:
                passed = passed.persist(StorageLevel.MEMORY_AND_DISK)
                self.persisted = [*self.persisted, passed]
            said = passed.select(*_SUMS.names).toArrow()
        d, dtype = step.features.phi.shape[1], step.features.phi.dtype
        for batch in said.to_batches():
            for seen, second, first, rest in zip(*batch.columns, strict=True):
                index = np.frombuffer(seen.as_buffer(), np.int32)
                # The widths are spelt out for a block without events, whose buffers are empty.
                sums = InputSums(
                    np.frombuffer(second.as_buffer(), dtype).reshape(len(index), gaussian.packed_length(d + 1)),
                    np.frombuffer(first.as_buffer(), dtype).reshape(len(index), d + 1),
                )
                yield BlockSums(index, sums, *cloudpickle.loads(rest.as_py()))
        if keep:
            self.state = passed.select(*_STATE.names)
        else:
            broadcast.destroy()

    def feature_rows(self, work: FeatureWork, ddl: str) -> DataFrame:
        rows = work(0, self.inputs, self.specification.attributes)
        return self.rows.sparkSession.createDataFrame(rows, ddl)

    def user_rows(self, work: UserWork, arguments: Any, ddl: str) -> DataFrame:
        shared = self.rows.sparkSession.sparkContext.broadcast((self.features, arguments))

        def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            features, arguments = shared.value
            for block in blocks.from_arrow(batches):
                for rows in work(block, features.take(block.inputs), arguments):
                    yield from rows.to_batches()

        return self.rows.mapInArrow(partition, ddl)


@contextmanager
def _not_adapted(spark: SparkSession) -> Iterator[None]:
    """Plans made within are not adaptive: a pass has no shuffle to adapt, and an adaptive plan holds what it reads twice.

    A persisted state's plan holds that of the state before it, so n passes would cost 2ⁿ in memory and time.
    """
    before = spark.conf.get(_ADAPTIVE)
    spark.conf.set(_ADAPTIVE, "false")
    try:
        yield
    finally:
        spark.conf.set(_ADAPTIVE, before)


def _step_in_arrow(step: Any, keep: bool) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for block in blocks.from_arrow(batches):
            block, said = step.value(block)
            rest = cloudpickle.dumps((said.moments, said.constant, said.held_out, said.zeros))
            buffers = [said.seen.tobytes(), said.sums.second.tobytes(), said.sums.first.tobytes(), rest]
            names = [*_SUMS.names]
            if keep:
                names += _STATE.names
                buffers += [blocks.buffer(block, name) for name in _STATE.names]
            yield pa.record_batch([pa.array([buffer], pa.binary()) for buffer in buffers], names)

    return partition
