"""Where the two sides of the alternation live and how they exchange sums.

The trainer (:mod:`mtl.train`) sees priors, moments and one number for the loss; an engine holds users, inputs and
what passes between them. :class:`LocalEngine` keeps all in this process, :class:`SparkEngine` the users' events in
Spark partitions and the inputs on the driver; `mtl.distributed` keeps both in Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession

from mtl import alternation, blocks, gaussian
from mtl.alternation import InputSums
from mtl.blocks import EventBlock
from mtl.effects import Effects
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.prior import Moments, VectorPrior
from mtl.sharing import share
from mtl.userstep import BlockSums, Specification, UserStep
from mtl.zeros import WithZeros

_ADAPTIVE = "spark.sql.adaptive.enabled"

_SUMS = pa.schema([(name, pa.binary()) for name in ("seen", "second", "first", "rest")])
_STATE = pa.schema([field for field in blocks.ARROW_SCHEMA if field.name != "users"])


FeatureWork = Callable[[int, Posterior, Array], pa.Table]
"""(first catalogue index, posteriors, attributes) of a run of inputs → rows."""

UserWork = Callable[[EventBlock, Features, Any], Iterator[pa.Table]]
"""(block, features of the inputs it saw, arguments) → rows."""


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

    applied: Any
    """What the inputs' posteriors were computed from, of which a step of less than 1 keeps a part."""

    effects: Effects
    """Of the events' contexts."""

    @property
    def divergence(self) -> float:
        """KL of these from their priors, and the energy of what earlier events said (nats)."""

    held_out: float
    """Summed surprise of the events held out, after the last users' half-step."""

    def snapshot(self) -> Any:
        """All that the steps change, for :meth:`restore`."""

    def restore(self, snapshot: Any) -> None: ...


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
        self.constant = self.held_out = self.users_energy = 0.0
        self.effects, self.turn = specification.effects, 0
        self.applied = self._evidence(0.0)  # what the inputs' posteriors were computed from

    @property
    def features(self) -> Features:
        return Features.of(self.inputs.mean, self.inputs.covariance, self.specification.mu)

    @property
    def divergence(self) -> float:
        earlier = self.specification.earlier
        of_inputs = 0.0 if earlier is None else earlier.energy(self.inputs)
        return sum((effect.divergence for effect in self.effects), self.users_energy + of_inputs)

    def update_users(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        if self.effects:
            self._update_effect(prior, noise, step)
        of = self.specification
        self.sums = InputSums.zeros(*self.inputs.mean.shape)
        self.constant = of.squared_labels if of.loss.is_quadratic else 0.0
        self.held_out = self.users_energy = 0.0
        moments, zeros = [], np.zeros(self.sums.second.shape[1])
        features = self.features
        if of.zero_weight:
            prior = WithZeros.of(prior, features, of.zero_weight)
        work = UserStep(features.astype(of.precision), prior, noise, of.loss, of.mu, step, self.effects)
        for said in self.each_block(work):
            self.sums.second[said.seen] += said.sums.second
            self.sums.first[said.seen] += said.sums.first
            self.constant += said.constant
            self.held_out += said.held_out
            self.users_energy += said.earlier
            moments.append(said.moments)
            zeros += 0.0 if said.zeros is None else said.zeros
        if of.zero_weight:
            self.sums.second[:] += of.zero_weight * zeros
        return sum(moments[1:], moments[0]), self._deviance()

    def _update_effect(self, prior: VectorPrior, noise: float, step: float) -> None:
        """One kind of effect, in turn, given the inputs and the users by them: a pass of its own, for what the events say
        of effects and of inputs is exact only given the other."""
        of, measured = self.specification, self.turn % len(self.effects)
        features = self.features.astype(of.precision)
        work = UserStep(features, prior, noise, of.loss, of.mu, step, self.effects, measured)
        precision, information = np.sum([np.array(said.effect) for said in self.each_block(work)], axis=0)
        learnt = self.effects[measured].learn(precision, information, noise)
        self.effects = (*self.effects[:measured], learnt, *self.effects[measured + 1 :])
        self.turn += 1

    def update_inputs(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        attributes = self.specification.attributes
        precision, information = self._evidence(noise)
        if step < 1.0:
            before = self.applied
            precision, information = (
                old + step * (new - old) for old, new in zip(before, (precision, information), strict=True)
            )
        self.applied = precision, information
        self.inputs = prior.posteriors(precision, information, attributes, noise)
        return prior.moments(self.inputs, attributes), self._deviance()

    def refit(self, prior: VectorPrior, noise: float) -> VectorPrior:
        return prior.refit(*self._evidence(noise), self.specification.attributes, noise)

    def train_on_all(self, squared_labels: float) -> None:
        """Begin again with the events held out among those that are trained on, all of whose Σ c y² is given."""
        self.specification = replace(self.specification, squared_labels=squared_labels)
        self.inputs = self.specification.start(0, len(self.specification.attributes))
        self.effects = self.specification.effects
        self.partitions = [block.with_extra(blocks.HELD_OUT) for block in self.partitions]

    def gram(self) -> Array:
        """Σ z zᵀ over all inputs, (p, p)."""
        attributes = self.specification.attributes
        return attributes.T @ attributes

    def snapshot(self) -> Any:
        sums = self.sums, self.constant, self.users_energy
        return self.inputs, self.applied, sums, self.partitions, self.effects

    def restore(self, snapshot: Any) -> None:
        self.inputs, self.applied, sums, self.partitions, self.effects = snapshot
        self.sums, self.constant, self.users_energy = sums

    def each_block(self, step: UserStep) -> Iterator[BlockSums]:
        stepped = [step(block) for block in self.partitions]
        self.partitions = [block for block, _ in stepped]
        return (said for _, said in stepped)

    def _evidence(self, noise: float) -> tuple[Array, Array]:
        """What all events say of the inputs, in the units of sums."""
        told, earlier = alternation.input_evidence(self.sums, self.specification.mu), self.specification.earlier
        return told if earlier is None else earlier.beside(*told, noise)

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
        broadcast = share(self.rows.sparkSession, step)
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
        shared = share(self.rows.sparkSession, (self.features, arguments))

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
            rest = cloudpickle.dumps(
                (said.moments, said.constant, said.held_out, said.zeros, said.earlier, said.effect)
            )
            buffers = [said.seen.tobytes(), said.sums.second.tobytes(), said.sums.first.tobytes(), rest]
            names = [*_SUMS.names]
            if keep:
                names += _STATE.names
                buffers += [blocks.buffer(block, name) for name in _STATE.names]
            yield pa.record_batch([pa.array([buffer], pa.binary()) for buffer in buffers], names)

    return partition
