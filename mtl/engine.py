"""Where the two sides of the alternation live and how they exchange sums.

The trainer (:mod:`mtl.train`) sees priors, moments and one number for the error; an engine holds users, inputs and
what passes between them. :class:`LocalEngine` keeps all in this process, :class:`SparkEngine` the users' events in
Spark partitions and the inputs on the driver; `mtl.distributed` keeps both in Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from mtl import alternation, blocks, gaussian
from mtl.alternation import InputSums
from mtl.basis import InputPrior, OracleBasis
from mtl.blocks import EventBlock
from mtl.encode import Activity
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.prior import Moments, Prior

_START_SCALE = 0.3  # standard deviation of the random start of the factors
_START_VARIANCE = 0.1
_START_CHUNK = 1024  # inputs that share one random stream

_SUMS = pa.schema([(name, pa.binary()) for name in ("inputs", "second", "first", "moments")])


FeatureWork = Callable[[int, Posterior, Array], pa.Table]
"""(first catalogue index, posteriors, attributes) of a run of inputs → rows."""

UserWork = Callable[[EventBlock, Features, Any], Iterator[pa.Table]]
"""(block, features of the inputs it saw, arguments) → rows."""


class Engine(Protocol):
    def update_users(self, prior: Prior, noise: float) -> tuple[Moments, float]:
        """Users' posteriors given the inputs': their moments, and Σ c E[(y − h)²] after the step."""

    def update_inputs(self, prior: InputPrior, noise: float) -> tuple[Moments, float]:
        """Inputs' posteriors given the users': their moments, and Σ c E[(y − h)²] after the step."""

    def fit_oracle(self, basis: OracleBasis, noise: float) -> OracleBasis:
        """Refit the basis functions on their weighted datasets, given the users' posteriors."""


def random_start(n: int, d: int, seed: int, first: int = 0) -> Posterior:
    """The inputs ``first`` … ``first + n`` before anything is learnt: offset 0 and random factors, whoever holds them."""
    chunks = range(first // _START_CHUNK, (first + n - 1) // _START_CHUNK + 1)
    shape = (_START_CHUNK, d - 1)
    drawn = [np.random.default_rng([seed, chunk]).normal(scale=_START_SCALE, size=shape) for chunk in chunks]
    start = first % _START_CHUNK
    mean = np.column_stack([np.zeros(n), np.concatenate(drawn)[start : start + n]])
    covariance = np.tile(gaussian.pack(_START_VARIANCE * np.eye(d)), (n, 1))
    return Posterior(mean, covariance, np.full(n, d * np.log(_START_VARIANCE)))


@dataclass(frozen=True)
class UserStep:
    """What a partition needs for its half-step: the part of a pass that is sent to the workers."""

    features: Features
    prior: Prior
    noise: float
    activity: Activity | None = None

    def sums(self, partition: Iterable[EventBlock]) -> tuple[np.ndarray, InputSums, Moments]:
        """(A_x, b_x) over the partition's users, for the inputs it saw (catalogue indices, sorted), and the users' moments."""
        d = self.features.phi.shape[1]
        total = InputSums.zeros(len(self.features), d)
        seen = np.zeros(len(self.features), bool)
        moments = Moments.zero(len(self.prior.gram), d)
        for block in partition:
            features = self.features.take(block.inputs)
            sums = InputSums.zeros(len(block.inputs), d)
            for part, weights, labels in block.parts():
                attributes = block.described(part, self.activity)
                a, b = alternation.user_sums(weights, labels, features)
                users = self.prior.posteriors(a, b, attributes, self.noise)
                step = alternation.input_sums(weights, labels, users)
                sums.second[:] += step.second
                sums.first[:] += step.first
                moments += Moments.of(users, attributes)
            seen[block.inputs] = True
            total.second[block.inputs] += sums.second
            total.first[block.inputs] += sums.first
        inputs = np.flatnonzero(seen)
        return inputs, InputSums(total.second[inputs], total.first[inputs]), moments


class LocalEngine:
    """Everything in this process.

    Args:
        partitions: the users' events.
        attributes: of all inputs, (inputs, p).
        mean_label: μ.
        squared_labels: Σ c y² over all events.
        k: number of basis functions.
        activity: of the users, where it is one of their attributes.
    """

    def __init__(
        self,
        partitions: Iterable[EventBlock],
        attributes: Array,
        mean_label: float,
        squared_labels: float,
        k: int,
        seed: int = 0,
        activity: Activity | None = None,
    ):
        self.activity = activity
        self.partitions = list(partitions)
        self.attributes = attributes
        self.mean_label = mean_label
        self.squared_labels = squared_labels
        self.inputs = random_start(len(attributes), k + 1, seed)
        self.sums = InputSums.zeros(len(attributes), k + 1)

    @property
    def features(self) -> Features:
        return Features.of(self.inputs.mean, self.inputs.covariance, self.mean_label)

    def update_users(self, prior: Prior, noise: float) -> tuple[Moments, float]:
        d = self.inputs.mean.shape[1]
        self.sums = InputSums.zeros(len(self.attributes), d)
        moments = Moments.zero(len(prior.gram), d)
        for inputs, sums, of_partition in self.each_partition(UserStep(self.features, prior, noise, self.activity)):
            self.sums.second[inputs] += sums.second
            self.sums.first[inputs] += sums.first
            moments += of_partition
        return moments, self._squared_error()

    def update_inputs(self, prior: InputPrior, noise: float) -> tuple[Moments, float]:
        precision, information = alternation.input_evidence(self.sums, self.mean_label)
        self.inputs = prior.posteriors(precision, information, self.attributes, noise)
        return prior.moments(self.inputs, self.attributes), self._squared_error()

    def fit_oracle(self, basis: OracleBasis, noise: float) -> OracleBasis:
        precision, information = alternation.input_evidence(self.sums, self.mean_label)
        return basis.refit(precision, information, self.attributes, noise)

    def gram(self) -> Array:
        """Σ z zᵀ over all inputs, (p, p)."""
        return self.attributes.T @ self.attributes

    def each_partition(self, step: UserStep) -> Iterator[tuple[np.ndarray, InputSums, Moments]]:
        yield step.sums(self.partitions)

    def _squared_error(self) -> float:
        return self.squared_labels + alternation.squared_error(self.sums, self.inputs, self.mean_label)


class SparkEngine(LocalEngine):
    """The users' events in Spark, the inputs on the driver; per pass a broadcast out and one row a partition back.

    Args:
        partitions: persisted rows of :data:`mtl.blocks.ARROW_SCHEMA`; the others as of :class:`LocalEngine`.
    """

    def __init__(self, partitions: DataFrame, *arguments: Any, **named: Any):
        super().__init__((), *arguments, **named)
        self.blocks = partitions

    def each_partition(self, step: UserStep) -> Iterator[tuple[np.ndarray, InputSums, Moments]]:
        width = step.features.phi.shape[1] + 1
        broadcast = self.blocks.sparkSession.sparkContext.broadcast(step)
        try:
            rows = self.blocks.drop("users").mapInArrow(
                _sums_in_arrow(broadcast), ", ".join(f"{name} binary" for name in _SUMS.names)
            )
            for batch in rows.toArrow().to_batches():
                for inputs, second, first, moments in zip(*(batch.column(name) for name in _SUMS.names), strict=True):
                    index = np.frombuffer(inputs.as_buffer(), np.int64)
                    # The widths are spelt out for a partition without events, whose buffers are empty.
                    sums = InputSums(
                        np.frombuffer(second.as_buffer()).reshape(len(index), gaussian.packed_length(width)),
                        np.frombuffer(first.as_buffer()).reshape(len(index), width),
                    )
                    yield index, sums, cloudpickle.loads(moments.as_py())
        finally:
            broadcast.destroy()

    def feature_rows(self, work: FeatureWork, ddl: str) -> DataFrame:
        return self.blocks.sparkSession.createDataFrame(work(0, self.inputs, self.attributes), ddl)

    def user_rows(self, work: UserWork, arguments: Any, ddl: str) -> DataFrame:
        shared = self.blocks.sparkSession.sparkContext.broadcast((self.features, arguments))

        def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            features, arguments = shared.value
            for block in blocks.from_arrow(batches):
                for rows in work(block, features.take(block.inputs), arguments):
                    yield from rows.to_batches()

        return self.blocks.mapInArrow(partition, ddl)


def _sums_in_arrow(step: Any) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        inputs, sums, moments = step.value.sums(blocks.from_arrow(batches))
        buffers = (inputs.tobytes(), sums.second.tobytes(), sums.first.tobytes(), cloudpickle.dumps(moments))
        yield pa.record_batch([pa.array([buffer], pa.binary()) for buffer in buffers], schema=_SUMS)

    return partition
